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
# # A toy problem with two tasks
# Which methods reach the Pareto set, and where do the others stop? The problem has two
# parameters, so that the whole trajectory of a method is a curve in the plane. It was
# introduced with CAGrad ([Liu et al., 2021](https://arxiv.org/abs/2110.14048)) and is
# also used in the paper of Nash-MTL ([Navon et al.,
# 2022](https://arxiv.org/abs/2202.01017)).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax

FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS, EVERY = (3_500, 50) if FAST else (35_000, 50)


def task_losses(theta, scale=1.0):
    a, b = theta

    def log(v):
        return jnp.log(jnp.maximum(jnp.abs(v), 5e-6)) + 6

    upper, lower = jnp.maximum(jnp.tanh(b / 2), 0), jnp.maximum(jnp.tanh(-b / 2), 0)
    first = log((-a - 7) / 2 - jnp.tanh(-b))
    second = log((-a + 3) / 2 + jnp.tanh(-b) + 2)
    first_bowl = ((-a + 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    second_bowl = ((-a - 7) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    return jnp.stack(
        [
            scale * (upper * first + lower * first_bowl),
            upper * second + lower * second_bowl,
        ]
    )


# Values of the PyTorch code that was published with the paper of Nash-MTL.
GOLDEN = {(-8.5, 7.5): (6.5524, 7.9008), (0.3, -0.2): (-1.4853, -1.4016)}
for point, values in GOLDEN.items():
    assert np.allclose(task_losses(jnp.array(point)), values, atol=1e-3)

# %% [markdown]
# Both losses have a minimum at b ≈ −8.4. The Pareto set is close to the segment between
# the minima. Two of the five starting points are in the upper half, where narrow
# valleys make the gradients conflict.
#
# Every method starts at the same points and uses Adam with the same learning rate. The
# five starts and the two scales of the first loss are one `vmap` axis of ten runs. The
# losses reach −20. Methods that need positive losses read `losses + 40`, which makes
# `scale_invariant` and `famo` similar to equal weights here.

# %%
STARTS = jnp.array([[-8.5, 7.5], [0.0, 0.0], [9.0, 9.0], [-7.5, -0.5], [9.0, -1.0]])
SCALES = jnp.array([1.0, 0.1])
METHODS = ["linear", "scale_invariant", "uncertainty", "famo", "mgda", "pcgrad"]
METHODS += ["imtl_g", "cagrad", "nash_mtl", "fairgrad", "aligned_mtl", "upgrad"]


def trajectory(name, start, scale, key):
    balancer = mtljax.get_method(name).build(2, key=key)
    optimizer = optax.adam(1e-3)
    shift = 40.0 if balancer.positive_losses else 0.0

    def shifted(theta):
        return task_losses(theta, scale) + shift

    grad_fn = mtljax.value_and_balanced_grad(shifted, balancer)

    def step(carry, _):
        theta, state, opt_state = carry
        _, grad, state = grad_fn(theta, state)
        updates, opt_state = optimizer.update(grad, opt_state, theta)
        theta = optax.apply_updates(theta, updates)
        if balancer.observe is not None:  # FAMO reads the losses after the step
            state = mtljax.observe(balancer, state, losses=shifted(theta))
        return (theta, state, opt_state), None

    def record(carry, _):
        carry, _ = jax.lax.scan(step, carry, length=EVERY)
        return carry, carry[0]

    carry = start, balancer.init(start), optimizer.init(start)
    _, path = jax.lax.scan(record, carry, length=STEPS // EVERY)
    return jnp.concatenate([start[None], path])


def trajectories(name):
    over_starts = jax.vmap(trajectory, (None, 0, None, None))
    over_scales = jax.vmap(over_starts, (None, None, 0, None))
    run = jax.jit(over_scales, static_argnums=0)
    return np.asarray(run(name, STARTS, SCALES, jax.random.key(0)))


paths = {name: trajectories(name) for name in METHODS}  # [scale, start, point, 2]

# %% [markdown]
# The colours show the mean loss (darker is lower). The grey band is the Pareto set. A
# run has reached it if its last point is within 0.15 of b = −8.4. A star marks the last
# point of a run: green if the run has reached the Pareto set, red if it has not.


# %%
def reached(path):
    return np.abs(path[..., -1, 1] + 8.4) < 0.15


GRID = np.meshgrid(np.linspace(-10.5, 10.5, 160), np.linspace(-10.5, 10.5, 160))
POINTS = jnp.stack([jnp.asarray(g).ravel() for g in GRID], axis=1)
MEANS = [
    np.asarray(jax.vmap(lambda p, s=s: task_losses(p, s).mean())(POINTS)).reshape(
        160, 160
    )
    for s in (1.0, 0.1)
]


def panel(axis, mean, found):
    levels = np.unique(np.quantile(mean, np.linspace(0, 1, 36)))
    axis.contourf(*GRID, mean, levels=levels, cmap="Blues_r", extend="both", alpha=0.6)
    axis.plot([-7, 7], [-8.4, -8.4], color="0.75", linewidth=7, solid_capstyle="round")
    for path, good in zip(found, reached(found), strict=True):
        axis.plot(*path.T, color="black", linewidth=1)
        axis.plot(*path[0], "o", color="black", markersize=4)
        color = "tab:green" if good else "tab:red"
        axis.plot(*path[-1], "*", color=color, markersize=11, markeredgecolor="white")
    axis.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), xticks=[], yticks=[])


def figure(index):
    fig, axes = plt.subplots(3, 4, figsize=(10, 8), layout="constrained")
    for axis, (name, found) in zip(axes.flat, paths.items(), strict=True):
        panel(axis, MEANS[index], found[index])
        label = mtljax.METHODS[name].label
        axis.set_title(f"{label}: {reached(found[index]).sum()} of 5", fontsize=10)
    fig.supxlabel("a")
    fig.supylabel("b")
    return fig


figure(0)
plt.show()

# %% [markdown]
# With the first loss multiplied by 0.1, as in the paper of Nash-MTL:

# %%
figure(1)
plt.show()

# %% [markdown]
# PCGrad, CAGrad and UPGrad are still moving along the valley at the last step. The
# counts hold after 35 000 steps. With more steps, the picture differs.

# %%
counts = {name: reached(found).sum(1).tolist() for name, found in paths.items()}
for name, (full, tenth) in counts.items():
    print(f"{name:16} scale 1: {full} of 5   scale 0.1: {tenth} of 5")
if not FAST:
    for name in ("mgda", "imtl_g", "nash_mtl", "fairgrad"):
        assert counts[name] == [5, 5]
    for name in ("linear", "uncertainty", "pcgrad", "cagrad", "upgrad"):
        assert counts[name] == [3, 4]
    assert counts["aligned_mtl"] == [5, 4]

# %% [markdown]
# The same runs in the plane of the two losses. The Pareto front is the lower left
# border of the possible pairs.

# %%
fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", sharey=True)
front = jnp.stack([jnp.linspace(-7, 7, 100), jnp.full(100, -8.4)], axis=1)
front = np.asarray(jax.vmap(task_losses)(front))
for axis, name in zip(axes, ("linear", "cagrad", "nash_mtl"), strict=True):
    axis.plot(*front.T, color="0.75", linewidth=6, solid_capstyle="round")
    for path, good in zip(paths[name][0], reached(paths[name][0]), strict=True):
        values = np.asarray(jax.vmap(task_losses)(jnp.asarray(path)))
        axis.plot(*values.T, color="black", linewidth=1)
        color = "tab:green" if good else "tab:red"
        axis.plot(*values[-1], "*", color=color, markersize=11, markeredgecolor="white")
    axis.set(title=mtljax.METHODS[name].label, xlabel="first loss")
axes[0].set_ylabel("second loss")
plt.show()

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
