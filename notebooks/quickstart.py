# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Two losses that disagree
# How does each balancer combine two conflicting gradients of different norms? The first
# example is a 2 × 3 matrix, and the second a small network.

# %%
import jax
import jax.numpy as jnp
import optax

import mtljax

# %% [markdown]
# The rows are task gradients. Their inner product is negative, so a step along one
# increases the loss of the other. A balancer is an optax transformation. Its input is
# the stacked gradients, and its output is one update.


# %%
def show(values):
    return " ".join(f"{float(value):8.3f}" for value in values)


params = {"w": jnp.zeros(3)}
grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
losses = jnp.array([0.5, 2.0])
names = ["linear", "scale_invariant", "uncertainty", "famo", "stch", "mgda", "pcgrad"]
names += ["imtl_g", "cagrad", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad"]
for name in names:
    balancer = mtljax.get_method(name).build(2, key=jax.random.key(0))
    state = balancer.init(params)
    update, state = jax.jit(balancer.update)(grads, state, losses=losses)
    gains = grads["w"] @ update["w"]  # > 0: the task's loss falls
    worse = "  <- one task gets worse" if gains.min() < -1e-4 else ""
    print(f"{name:22} weights {show(state.task_weights)}  gains {show(gains)}{worse}")

# %% [markdown]
# MGDA and Nash-MTL guarantee that no task gets worse, to first order:

# %%
for balancer in (mtljax.mgda(2), mtljax.nash_mtl(2)):
    update, _ = balancer.update(grads, balancer.init(params))
    assert (grads["w"] @ update["w"]).min() > -1e-4

# %% [markdown]
# On a network, the balancer and the optimizer are one chain. Four seeds are a `vmap`
# axis.


# %%
def task_losses(params, x):
    hidden = jnp.tanh(x @ params["trunk"])
    a, b = hidden @ params["a"], hidden @ params["b"]
    return jnp.stack(
        [jnp.mean((a - x[:, 0]) ** 2), 100 * jnp.mean((b - x[:, 1] + x[:, 2]) ** 2)]
    )


def train(key, balancer):
    key, *keys = jax.random.split(key, 4)
    shapes = {"trunk": (4, 16), "a": (16,), "b": (16,)}
    params = {
        name: 0.5 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    optimizer = optax.chain(balancer, optax.clip_by_global_norm(1.0), optax.adam(3e-3))

    def step(carry, key):
        params, state = carry
        x = jax.random.normal(key, (64, 4))
        values, grads = mtljax.value_and_task_grads(task_losses)(params, x)
        updates, state = optimizer.update(grads, state, params, losses=values)
        return (optax.apply_updates(params, updates), state), values

    keys = jax.random.split(key, 600)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


final = {}
for balancer in (mtljax.linear(2), mtljax.scale_invariant(2), mtljax.nash_mtl(2)):
    seeds = jax.random.split(jax.random.key(1), 4)
    curves = jax.jit(jax.vmap(lambda key, b=balancer: train(key, b)))(seeds)
    final[balancer.name] = curves[:, -50:].mean((0, 1))
    print(f"{balancer.name:16} last losses {show(final[balancer.name])}")

# %% [markdown]
# Equal weights favour the loss with the larger unit. Methods that do not depend on the
# unit reduce the small loss further:

# %%
assert final["nash_mtl"][0] < final["linear"][0]
assert final["scale_invariant"][0] < final["linear"][0]

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
