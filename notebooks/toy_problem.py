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
# # A two-task problem with narrow valleys
# Which methods reach the Pareto set, and where do they stop? The two-task problem of
# [Liu et al. (2021)](https://arxiv.org/abs/2110.14048) has two parameters, so that the
# whole path of a run can be drawn. Its losses have deep valleys and gradients of very
# different norms. Near the valleys the gradients conflict.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.lines import Line2D

import mtljax

FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
EVERY = 50  # a point of the path is recorded every 50 steps
STEPS = 3_500 if FAST else 35_000
SCALES = jnp.array([1.0, 0.1])  # factor of the first loss
STARTS = jnp.array([[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]])

# %% [markdown]
# In the upper half-plane ($b > 0$) the losses are logarithms, and in the lower
# half-plane they are parabolas with minima at $a = 7$ and $a = -7$. The Pareto set is
# close to the segment between them, at $b \approx -8.4$.


# %%
def task_losses(theta, scale):
    a, b = theta
    log = lambda v: jnp.log(jnp.maximum(jnp.abs(v), 5e-6)) + 6
    upper, lower = jnp.maximum(jnp.tanh(b / 2), 0), jnp.maximum(jnp.tanh(-b / 2), 0)
    f1 = log((-a - 7) / 2 - jnp.tanh(-b))
    f2 = log((-a + 3) / 2 + jnp.tanh(-b) + 2)
    g1 = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    g2 = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    return jnp.stack([scale * (upper * f1 + lower * g1), upper * f2 + lower * g2])


# The values of the original PyTorch code.
for theta, losses in {
    (-8.5, 7.5): (6.5524, 7.9008),
    (9.0, 9.0): (7.9439, 6.6915),
    (0.3, -0.2): (-1.4853, -1.4016),
}.items():
    found = task_losses(jnp.array(theta), 1.0)
    np.testing.assert_allclose(found, losses, atol=1e-3)

# %% [markdown]
# All methods use Adam with the learning rate 1e-3 and the same number of steps. The ten
# runs of a method (five starts, two scales) are one `vmap` axis. Some methods require
# positive losses. The losses are at least -20, so the methods receive `losses + 40`.
# The shift does not change a gradient. FAMO also reads the losses after the step.

# %%
KEY = jax.random.key(0)
METHODS = {
    "equal weights": mtljax.linear(2),
    "scale invariant": mtljax.scale_invariant(2),
    "uncertainty": mtljax.uncertainty(2),
    "FAMO": mtljax.famo(2),
    "PCGrad": mtljax.pcgrad(2, key=KEY),
    "CAGrad": mtljax.cagrad(2, c=0.4),
    "UPGrad": mtljax.upgrad(2),
    "Aligned-MTL": mtljax.aligned_mtl(2),
    "MGDA": mtljax.mgda(2),
    "IMTL-G": mtljax.imtl_g(2),
    "Nash-MTL": mtljax.nash_mtl(2),
    "FairGrad": mtljax.fairgrad(2),
}


def run(balancer, start, scale):
    def shifted(theta):
        return task_losses(theta, scale) + 40

    adam = optax.adam(1e-3)

    def step(_, carry):
        theta, state, adam_state = carry
        losses, grads = mtljax.value_and_task_grads(shifted)(theta)
        update, state = balancer.update(grads, state, losses=losses)
        update, adam_state = adam.update(update, adam_state)
        theta = optax.apply_updates(theta, update)
        if balancer.observe is not None:
            state = mtljax.observe(balancer, state, losses=shifted(theta))
        return theta, state, adam_state

    def record(carry, _):
        return jax.lax.fori_loop(0, EVERY, step, carry), carry[0]

    carry = start, balancer.init(start), adam.init(start)
    (last, _, _), path = jax.lax.scan(record, carry, length=STEPS // EVERY)
    return jnp.concatenate([path, last[None]])


paths = {}  # arrays [scales, starts, points, 2]
for name, balancer in METHODS.items():
    many = jax.vmap(lambda start, scale, b=balancer: run(b, start, scale), (0, None))
    many = jax.vmap(many, (None, 0))
    paths[name] = np.asarray(jax.jit(many)(STARTS, SCALES))


def reached(path):
    return abs(path[..., -1, 1] + 8.4) < 0.15


# %%
a, b = np.linspace(-12, 12, 200), np.linspace(-11, 11, 200)
GRID = jnp.stack(jnp.meshgrid(a, b), axis=-1).reshape(-1, 2)


def landscape(axis, scale):
    mean = np.asarray(jax.vmap(task_losses, (0, None))(GRID, scale)).mean(1)
    levels = np.unique(np.quantile(mean, np.linspace(0.002, 0.998, 36)))
    mean = mean.reshape(len(b), len(a))
    axis.contourf(a, b, mean, levels, cmap="Blues_r", extend="both", alpha=0.6)
    axis.plot([-7, 7], [-8.4, -8.4], color="0.65", linewidth=8, solid_capstyle="round")
    axis.set(xlim=(-12, 12), ylim=(-11, 11), xticks=[], yticks=[])


def draw(axis, path):
    for curve, success in zip(path, reached(path), strict=True):
        axis.plot(*curve.T, color="black", linewidth=1)
        axis.plot(*curve[0], "o", color="black", markersize=4)
        color = "#009e73" if success else "#d55e00"
        shape = "*" if success else "X"
        size = 12 if success else 9
        axis.plot(*curve[-1], shape, color=color, markersize=size, mec="white", mew=0.7)


def panels(index):
    fig, axes = plt.subplots(3, 4, figsize=(10, 7.6), layout="constrained")
    for axis, (name, path) in zip(axes.flat, paths.items(), strict=True):
        landscape(axis, SCALES[index])
        draw(axis, path[index])
        axis.set_title(f"{name}: {reached(path[index]).sum()} of 5", fontsize=11)
    marks = [
        Line2D([], [], color="black", marker="o", markersize=4, label="path and start"),
        Line2D([], [], color="0.65", linewidth=8, label="Pareto set"),
        Line2D([], [], color="#009e73", marker="*", ls="", ms=11, label="reached"),
        Line2D([], [], color="#d55e00", marker="X", ls="", ms=8, label="not reached"),
    ]
    fig.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("a")
    for axis in axes[:, 0]:
        axis.set_ylabel("b")
    plt.show()


# Figure: Paths of twelve methods from five starts, on the landscape of the mean loss.
# The titles state how many starts reach the Pareto set.
panels(0)

# %% [markdown]
# Above: the first loss has scale 1. A darker colour is a smaller mean loss, and the
# title counts the starts from which a run reached the Pareto set after 35,000 steps.
#
# - From the three lower starts every method reaches the Pareto set.
# - From the two upper starts, equal weights and the loss-balancing methods stop in a
#   narrow valley of one task. At its bottom the gradient of this task is large and
#   changes its sign from step to step.
# - PCGrad, CAGrad and UPGrad leave the valley, and they are still moving at the last
#   step.
# - MGDA, IMTL-G, Nash-MTL, FairGrad and Aligned-MTL reach the Pareto set from all
#   starts. Their end points differ.
#
# The shift of the losses makes the scale-invariant method and FAMO similar to equal
# weights here, because the relative change of `losses + 40` is small. This problem
# shows how gradients are combined. It is not a benchmark of loss balancing.
#
# The next figure contains the same runs with the first loss at scale 0.1.

# %%
# Figure: Paths of the same twelve methods with the first loss at scale 0.1. The titles
# state how many starts reach the Pareto set.
panels(1)

# %%
counts = {name: reached(path).sum(1).tolist() for name, path in paths.items()}
for name, (one, tenth) in counts.items():
    print(f"{name:16} scale 1: {one} of 5    scale 0.1: {tenth} of 5")
if not FAST:
    for name in ("MGDA", "IMTL-G", "Nash-MTL", "FairGrad"):
        assert counts[name] == [5, 5], name
    for name in ("equal weights", "scale invariant", "uncertainty", "FAMO"):
        assert counts[name][0] == 3, name

# %% [markdown]
# ## Paths in the space of the losses
# The grey band is the Pareto front. A path that moves down and to the left improves
# both tasks. The end points show the preference of a method. Equal weights end at the
# point with the smallest sum of the losses. MGDA ends close to the point of the front
# that it meets first.

# %%
line = jnp.stack([jnp.linspace(-7, 7, 200), jnp.full(200, -8.36)], axis=1)
front = np.asarray(jax.vmap(task_losses, (0, None))(line, 1.0))
fig, axes = plt.subplots(
    1, 4, figsize=(11, 3.2), layout="constrained", sharex=True, sharey=True
)
names = ("equal weights", "CAGrad", "MGDA", "Nash-MTL")
for axis, name in zip(axes, names, strict=True):
    axis.plot(*front.T, color="0.65", linewidth=8, solid_capstyle="round")
    curves = jax.vmap(jax.vmap(task_losses, (0, None)), (0, None))(paths[name][0], 1.0)
    for curve, success in zip(np.asarray(curves), reached(paths[name][0]), strict=True):
        axis.plot(*curve.T, color="black", linewidth=0.9)
        axis.plot(*curve[0], "o", color="black", markersize=4)
        shape, color = ("*", "#009e73") if success else ("X", "#d55e00")
        axis.plot(*curve[-1], shape, color=color, markersize=11, mec="white", mew=0.7)
    axis.set(title=name, xlabel="loss of task 1")
axes[0].set_ylabel("loss of task 2")
# Figure: Paths of equal weights, CAGrad, MGDA and Nash-MTL in the plane of the two
# losses. MGDA and Nash-MTL reach the Pareto front from all five starts.
plt.show()

equal = paths["equal weights"][0]
ends = np.asarray(jax.vmap(task_losses, (0, None))(equal[:, -1], 1.0).sum(1))
if not FAST:
    assert np.allclose(ends[reached(equal)], front.sum(1).min(), atol=0.05)

# %% [markdown]
# ## Summary
# One row of six methods at scale 1. The README shows this figure.

# %%
fig, axes = plt.subplots(1, 6, figsize=(12, 2.6), layout="constrained")
names = ["equal weights", "PCGrad", "CAGrad", "MGDA", "IMTL-G", "Nash-MTL"]
for axis, name in zip(axes, names, strict=True):
    landscape(axis, SCALES[0])
    draw(axis, paths[name][0])
    axis.set_title(f"{name}: {reached(paths[name][0]).sum()} of 5", fontsize=13)
if "MTLJAX_TOY_FIGURE" in os.environ:
    fig.savefig(os.environ["MTLJAX_TOY_FIGURE"], dpi=100)
# Figure: Paths of six methods from five starts. Equal weights, PCGrad and CAGrad reach
# the Pareto set from three starts, MGDA, IMTL-G and Nash-MTL from all five.
plt.show()

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
