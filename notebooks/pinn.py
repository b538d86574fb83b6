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
# # A physics-informed network
# How do loss and gradient balancing change a physics-informed network? The network
# approximates the solution of the Helmholtz equation
#
# $$u''(x) + k^2 u(x) = f(x), \quad x \in (0, 1), \qquad u(0) = 0, \quad u'(1) = g,$$
#
# with the exact solution $u = \sin(3 \pi x) + x$. The three losses are the residual of
# the equation and the errors of the two boundary conditions. They have different units,
# so that equal weights are an arbitrary choice.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax

plt.style.use("tableau-colorblind10")
FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS = 300 if FAST else 3_000
TERMS = ("residual", "left", "right")
FREQUENCY, K = 3 * jnp.pi, 4.0
X = jnp.linspace(0, 1, 48)
GRID = jnp.linspace(0, 1, 200)


def exact(x):
    return jnp.sin(FREQUENCY * x) + x


def source(x):
    return -(FREQUENCY**2) * jnp.sin(FREQUENCY * x) + K**2 * exact(x)


def network(params, x):
    h = jnp.tanh(2 * x * params["w1"] + params["b1"])
    h = jnp.tanh(h @ params["w2"] + params["b2"])
    return h @ params["w3"]


def task_losses(params):
    u = lambda x: network(params, x)
    slope = lambda x: jax.jvp(u, (x,), (1.0,))[1]
    curvature = lambda x: jax.jvp(slope, (x,), (1.0,))[1]
    residual = jax.vmap(lambda x: curvature(x) + K**2 * u(x) - source(x))(X)
    right = jax.jvp(exact, (1.0,), (1.0,))[1]
    return {
        "residual": jnp.mean(residual**2),
        "left": (u(0.0) - exact(0.0)) ** 2,
        "right": (slope(1.0) - right) ** 2,
    }


# %% [markdown]
# All methods use Adam with the same learning rate and a cosine decay. Three seeds are
# one `vmap` axis. The constant weights of `weighted` were chosen by hand. They are a
# strong baseline if you can tune them. `gradient norms` is
# `mtljax.gradient_norm_weighting`, which gives all weighted gradients the same norm.
# The losses have names, so the balancers are built with the same names.

# %%
METHODS = {
    "equal weights": mtljax.linear(TERMS),
    "weighted": mtljax.linear(TERMS, weights=[1.0, 1000.0, 10.0]),
    "gradient norms": mtljax.gradient_norm_weighting(TERMS),
    "ConFIG": mtljax.conflict_free(TERMS),
    "Nash-MTL": mtljax.nash_mtl(TERMS),
}
WIDTH, SEEDS = 32, 3


def train(balancer, key):
    optimizer = optax.chain(
        balancer, optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))
    )
    keys = jax.random.split(key, 4)
    params = {
        "w1": jax.random.normal(keys[0], (WIDTH,)) * 2,
        "b1": jax.random.normal(keys[1], (WIDTH,)),
        "w2": jax.random.normal(keys[2], (WIDTH, WIDTH)) / jnp.sqrt(WIDTH),
        "b2": jnp.zeros(WIDTH),
        "w3": jax.random.normal(keys[3], (WIDTH,)) / jnp.sqrt(WIDTH),
    }

    def step(carry, _):
        params, state = carry
        losses, grads = mtljax.value_and_task_grads(task_losses)(params)
        updates, state = optimizer.update(grads, state, params, losses=losses)
        weights = optax.tree.get(state, "task_weights")
        return (optax.apply_updates(params, updates), state), (losses, weights)

    carry = params, optimizer.init(params)
    (params, _), history = jax.lax.scan(step, carry, length=STEPS)
    return jax.vmap(lambda x: network(params, x))(GRID), history


KEYS = jax.random.split(jax.random.key(0), SEEDS)
runs = {}
for name, balancer in METHODS.items():
    run = jax.jit(jax.vmap(lambda key, b=balancer: train(b, key)))(KEYS)
    runs[name] = jax.tree.map(np.asarray, run)

TRUE = np.asarray(exact(GRID))
errors = {
    name: np.linalg.norm(u - TRUE, axis=1) / np.linalg.norm(TRUE)
    for name, (u, _) in runs.items()
}
for name, values in errors.items():
    print(f"{name:20} relative L2 error", *(f"{v:.2e}" for v in values))

# %% [markdown]
# ## Solution and error
# The run with the median error of each method. At the scale of the solution the
# networks cannot be distinguished, so the right panel shows the error.

# %%
COLORS = dict(zip(METHODS, ("C0", "C1", "C3", "C4", "black"), strict=True))
STYLES = dict(zip(METHODS, ("-", "--", "-.", ":", "-"), strict=True))
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
axes[0].plot(GRID, TRUE, color="0.75", linewidth=6, label="exact")
for name, (u, _) in runs.items():
    median = u[np.argsort(errors[name])[SEEDS // 2]]
    look = {"color": COLORS[name], "linestyle": STYLES[name]}
    axes[0].plot(GRID, median, label=name, **look)
    axes[1].plot(GRID, np.abs(median - TRUE) + 1e-7, **look)
axes[0].set(title="solution", xlabel="x", ylabel="u(x)")
axes[1].set(title="absolute error", xlabel="x", yscale="log")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
# Figure: Solution and absolute error of a Helmholtz equation for five methods. Equal
# weights have the largest error near both boundaries.
plt.show()

# %% [markdown]
# ## Loss terms during training
# Geometric means over the three seeds and over windows of steps. With equal weights the
# residual dominates, and the boundary conditions are fulfilled last. The other methods
# enlarge the weights of the boundary terms, at almost the same final residual.


# %%
def smooth(values, window=STEPS // 60):
    logs = np.log(np.maximum(values, 1e-12)).mean(0)
    return np.exp(logs.reshape(-1, window).mean(1))


fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
for axis, term in zip(axes, TERMS, strict=True):
    for name, (_, (losses, _)) in runs.items():
        values = smooth(losses[term])
        at = np.linspace(0, STEPS, len(values))
        axis.plot(at, values, color=COLORS[name], linestyle=STYLES[name], label=name)
    axis.set(title=term, xlabel="step", yscale="log")
axes[0].set_ylabel("loss")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
# Figure: Losses of the residual and of the two boundary conditions over the steps, for
# five methods.
plt.show()

# %% [markdown]
# ## Error of five methods

# %%
fig, axis = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
for i, values in enumerate(errors.values()):
    axis.plot(values, np.full(SEEDS, i), "o", color="0.5", markersize=6)
    axis.plot(np.median(values), i, "|", color="C0", markersize=20, markeredgewidth=3)
axis.set_yticks(range(len(errors)), errors)
axis.invert_yaxis()
axis.set(xlabel="relative L2 error (dots: seeds, bar: median)", xscale="log")
# Figure: Relative L2 error of five methods, with the seeds as dots and the median as a
# bar. Equal weights have the largest median.
plt.show()

# %% [markdown]
# In this small example every method but equal weights reaches an error of about 1e-3 to
# 2e-3. The tuned constant weights are as good as the balancers. A balancer saves the
# tuning, at the cost of three backward passes per step. Three seeds do not decide an
# order among the last four methods.

# %%
medians = {name: np.median(values) for name, values in errors.items()}
weights = runs["gradient norms"][1][1].mean((0, 1))
print("mean weights of gradient norms:", *weights.round(2))
assert all(np.isfinite(v).all() for v in errors.values())
if not FAST:
    worst = max(value for name, value in medians.items() if name != "equal weights")
    assert worst < 0.5 * medians["equal weights"], medians

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
