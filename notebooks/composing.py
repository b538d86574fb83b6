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
# # Balancers in a chain
# How do clipping, Adam, masks, `optax.partition`, `per_layer` and `compose` interact
# with a balancer? The example is a small network with two regression tasks. The targets
# of the second task are ten times as large, so that its loss and its gradients
# dominate.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import mtljax

plt.style.use("tableau-colorblind10")
FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS = 30 if FAST else 300

keys = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(keys[0], (128, 6))
Y = jnp.stack([jnp.sin(2 * X[:, 0]), 10 * X[:, 1] * X[:, 2]], axis=1)
START = {
    "hidden": 0.4 * jax.random.normal(keys[1], (6, 24)),
    "output": 0.2 * jax.random.normal(keys[2], (24, 24)),
    "heads": {"a": 0.2 * jnp.ones(24), "b": 0.2 * jnp.ones(24)},
}


def task_losses(params):
    h = jnp.tanh(jnp.tanh(X @ params["hidden"]) @ params["output"])
    predictions = jnp.stack([h @ params["heads"][task] for task in "ab"], axis=1)
    return ((predictions - Y) ** 2).mean(0)


task_grads = mtljax.value_and_task_grads(task_losses)

# %% [markdown]
# ## The norm after each transformation
# A balancer must be the first transformation that reads the stacked gradients. Its
# output has the shape of the parameters, so every optax transformation can follow it.
# The next cell applies the links of a chain one after another and records the norm of
# the update after each of them.


# %%
def train(links, params=START, steps=STEPS):
    def step(carry, _):
        params, states = carry
        losses, update = task_grads(params)
        norms, new = [], []
        for link, old in zip(links, states, strict=True):
            full = optax.with_extra_args_support(link)
            update, state = full.update(update, old, params, losses=losses)
            new.append(state)
            norms.append(optax.tree.norm(update))
        params = optax.apply_updates(params, update)
        return (params, new), (losses, jnp.stack(norms))

    states = [link.init(params) for link in links]
    return jax.lax.scan(step, (params, states), length=steps)[1]


BALANCERS = {
    "equal weights": mtljax.linear(2),
    "MGDA": mtljax.mgda(2),
    "IMTL-G": mtljax.imtl_g(2),
}
norms = {}
for name, balancer in BALANCERS.items():
    links = [balancer, optax.clip_by_global_norm(1.0), optax.adam(3e-3)]
    norms[name] = np.asarray(jax.jit(lambda links=links: train(links))()[1])

fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained", sharey=True)
titles = ["after the balancer", "after clipping", "after Adam"]
for i, (axis, title) in enumerate(zip(axes, titles, strict=True)):
    for name, values in norms.items():
        axis.plot(values[:, i], label=name)
    axis.set(title=title, xlabel="step", yscale="log")
axes[0].set_ylabel("norm of the update")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
# Figure: Norm of the update over the steps after the balancer, after clipping and after
# Adam, for equal weights, MGDA and IMTL-G.
plt.show()

# %% [markdown]
# The norm after the balancer depends on the method. Clipping sets an upper bound, which
# removes the difference only while all norms exceed it. Adam divides by the root mean
# square of the recent updates. It removes a constant factor completely, as the first
# step shows. A norm that decays during training, as that of MGDA, still makes the steps
# shorter. Tune the learning rate of each method before you compare them.


# %%
def ratio(step, link):
    """The largest norm after a link, divided by the smallest one."""
    values = [v[step, link] for v in norms.values()]
    return max(values) / min(values)


for step in (0, -1):
    print("step", step % STEPS, "ratios", [f"{ratio(step, i):.3g}" for i in range(3)])
assert all((v[:, 1] <= 1.0001).all() for v in norms.values())
assert ratio(0, 2) < 1.01
assert ratio(0, 0) > 2

# %% [markdown]
# ## The weights under masks, partitions and wrappers
# The weights of a method follow from the gradients that it reads. Labels, groups and
# wrappers change this input, so they change the weights. The method is Aligned-MTL.

# %%
losses, grads = task_grads(START)
LABELS = mtljax.label_params(START, own="heads")
shared = mtljax.value_and_task_grads(task_losses, labels=LABELS)(START)[1]


def weights(optimizer, grads=grads, **kwargs):
    """Returns an update of the first step, and the state that follows it."""
    state = optimizer.init(START)
    return optimizer.update(grads, state, START, losses=losses, **kwargs)


aligned = mtljax.aligned_mtl(2)
own = optax.with_extra_args_support(optax.identity())
partition = optax.partition({"shared": aligned, "own": own}, LABELS)
composed = mtljax.compose(mtljax.scale_invariant(2), aligned)
mask = jnp.array([True, False])
rows = {
    "all parameters": weights(aligned)[1].task_weights,
    "partition: shared parameters": optax.tree.get(
        weights(partition, shared)[1], "task_weights"
    ),
    "compose(scale_invariant, .)": weights(composed)[1].task_weights,
    "mask: task b is absent": weights(aligned, mask=mask)[1].task_weights,
}
groups = weights(mtljax.per_layer(aligned))[1].groups
rows |= {f"per_layer: {name}": state.task_weights for name, state in groups.items()}
rows = {name: np.asarray(w / w.sum()) for name, w in rows.items()}

fig, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
share = np.array(list(rows.values()))
axis.barh(list(rows), share[:, 0], label="task a")
axis.barh(list(rows), share[:, 1], left=share[:, 0], label="task b (large scale)")
axis.set(xlabel="share of the task weight", xlim=(0, 1))
axis.invert_yaxis()
fig.legend(loc="outside upper center", ncols=2)
# Figure: Share of the weight of two tasks for eight ways to apply a balancer: all
# parameters, partition, compose, a mask, and four groups of per_layer.
plt.show()
for name, row in rows.items():
    print(f"{name:33} {row.round(3)}")

# %% [markdown]
# - A mask removes a task: the weight of task b is zero, and the update is the gradient
#   of task a.
# - With `per_layer`, each leaf has its own weights. The head of a task has only one
#   nonzero gradient.
# - `compose` divides the gradients by the losses before the second balancer reads them.
#   The direction of IMTL-G does not depend on the scale of a loss, so composing does
#   not change it.

# %%
masked, _ = weights(aligned, mask=mask)
alone = jax.tree.map(lambda g: g[0], grads)
assert all(map(np.allclose, jax.tree.leaves(masked), jax.tree.leaves(alone)))


def direction(balancer):
    update, _ = weights(balancer)
    return ravel_pytree(update)[0] / optax.tree.norm(update)


imtl = mtljax.imtl_g(2)
cosine = direction(imtl) @ direction(mtljax.compose(mtljax.scale_invariant(2), imtl))
assert cosine > 0.9999, cosine

# %% [markdown]
# ## The order of the chain
# Clipping after the balancer limits the norm of the step. Clipping each task before the
# balancer changes the task weights: it is another method. The next cell compares both
# with gradient descent, which does not remove the norm.


# %%
def per_task(transformation):
    """Applies a stateless transformation to each task of the stacked gradients."""

    def update(grads, state, params=None):
        del params
        return jax.vmap(lambda g: transformation.update(g, state)[0])(grads), state

    return optax.GradientTransformation(transformation.init, update)


clip, sgd, equal = optax.clip_by_global_norm(1.0), optax.sgd(0.03), mtljax.linear(2)
ORDERS = {
    "balancer, clip, sgd": [equal, clip, sgd],
    "clip each task, balancer, sgd": [per_task(clip), equal, sgd],
}
curves = {
    name: np.asarray(jax.jit(lambda links=links: train(links))()[0])
    for name, links in ORDERS.items()
}
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for task, axis in enumerate(axes):
    for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
        axis.plot(values[:, task], style, label=name)
    axis.set(title=f"task {'ab'[task]}", xlabel="step", ylim=(0, None))
axes[0].set_ylabel("loss")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
# Figure: Losses of two tasks over the steps. Clipping each task before the balancer
# lowers the loss of task a. The loss of task b is the same.
plt.show()

# %% [markdown]
# If the balancer comes first, the task with the large scale determines the direction.
# If each task is clipped first, both gradients have at most the norm 1, and task a
# improves faster. Task b, whose loss is larger, hardly changes. An optimizer before the
# balancer is an error: its state has the shape of the parameters, and its input does
# not.

# %%
try:
    jax.jit(lambda: train([optax.adam(3e-3), equal]))()
except (TypeError, ValueError) as error:
    print(type(error).__name__, str(error)[:300])
else:
    raise AssertionError("The wrong order raised no error.")
if not FAST:
    last = {name: values[-1] for name, values in curves.items()}
    first, second = last.values()
    assert second[0] < 0.7 * first[0], last

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
