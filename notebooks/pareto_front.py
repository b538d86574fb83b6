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
# # A concave Pareto front
# Which scalarisations find all parts of a Pareto front? Constant weights minimise a
# linear function of the losses. On a concave front such a minimum is at one of the two
# ends, whatever the weights are. The problem of Fonseca and Fleming has a concave
# front.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax

FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS = 200 if FAST else 2_000


def task_losses(x):
    shift = 1 / jnp.sqrt(2.0)
    return 1 - jnp.exp(-jnp.stack([((x - shift) ** 2).sum(), ((x + shift) ** 2).sum()]))


line = jnp.linspace(-1, 1, 400)[:, None] / jnp.sqrt(2.0) * jnp.ones((1, 2))
FRONT = np.asarray(jax.vmap(task_losses)(line))

# %% [markdown]
# A preference is an ordinary array. The nine preferences are a `vmap` axis, so that one
# compiled program computes the whole set.

# %%
METHODS = {
    "linear": lambda p: mtljax.linear(2, weights=p),
    "stch": lambda p: mtljax.stch(2, preference=p, mu=0.05),
    "cosmos": lambda p: mtljax.cosmos(2, preference=p),
    "pbi": lambda p: mtljax.pbi(2, preference=p),
}
first = jnp.linspace(0.1, 0.9, 9)
PREFERENCES = jnp.stack([first, 1 - first], axis=1)


def solve(make, preference):
    balancer = make(preference)
    optimizer = optax.chain(balancer, optax.adam(0.02))
    start = jnp.array([0.3, -0.4])

    def step(carry, _):
        x, state = carry
        losses, grads = mtljax.value_and_task_grads(task_losses)(x)
        updates, state = optimizer.update(grads, state, x, losses=losses)
        return (optax.apply_updates(x, updates), state), losses

    (x, _), path = jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)
    return task_losses(x), path


results = {}
for name, make in METHODS.items():
    solve_all = jax.jit(jax.vmap(lambda p, make=make: solve(make, p)))
    results[name] = [np.asarray(x) for x in solve_all(PREFERENCES)]

# %%
fig, axes = plt.subplots(1, 4, figsize=(11, 3.1), layout="constrained", sharey=True)
colors = plt.cm.viridis(np.linspace(0, 0.9, len(PREFERENCES)))
for axis, (name, (found, path)) in zip(axes, results.items(), strict=True):
    axis.plot(*FRONT.T, color="0.8", linewidth=6, solid_capstyle="round")
    for point, curve, color in zip(found, path, colors, strict=True):
        axis.plot(*curve.T, color=color, linewidth=0.8)
        axis.plot(*point, "o", color=color, markeredgecolor="white", markersize=8)
    axis.set(title=name, xlabel="first loss", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
axes[0].set_ylabel("second loss")
# Figure: Paths and end points of nine preferences on a concave Pareto front. linear
# ends at the two ends of the front, stch, cosmos and pbi end along it.
plt.show()

# %% [markdown]
# Every line is a run, and its colour is the preference. Constant weights end at the two
# ends of the front only. The other scalarisations spread their points along it.
#
# The hypervolume is the area that a set of points dominates, up to a reference point.
# It measures how well the set represents the front.

# %%
reference = jnp.array([1.1, 1.1])
volumes = {
    name: float(mtljax.metrics.hypervolume(jnp.asarray(found), reference))
    for name, (found, _) in results.items()
}
best = float(mtljax.metrics.hypervolume(jnp.asarray(FRONT), reference))
fig, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
bars = axis.barh(list(volumes), list(volumes.values()), color="tab:blue")
axis.bar_label(bars, fmt="%.3f", label_type="center", color="white")
axis.axvline(best, color="black", linestyle="--")
axis.text(best, -0.72, " whole front", fontsize=8)
axis.set(xlabel="hypervolume", xlim=(0, 1.25 * best))
axis.invert_yaxis()
# Figure: Hypervolume of linear, stch, cosmos and pbi compared with that of the whole
# front. linear has the smallest hypervolume.
plt.show()

# %%
if not FAST:
    for name, value in {"linear": 0.2516, "stch": 0.4948, "cosmos": 0.4572}.items():
        assert abs(volumes[name] / value - 1) < 0.01, (name, volumes[name])
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
