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
# # Loss landscapes with and without SAM
# Do solutions of sharpness-aware minimisation per task lie in flatter regions?
# `mtljax.sharpness.value_and_flat_grad` evaluates the gradient of each task at its own
# worst point of a ball with radius `rho`. Two networks are trained on 500 images of two
# overlaid digits: one with equal weights, and one with the same balancer and SAM.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax
from mtljax.data import load
from mtljax.sharpness import value_and_flat_grad
from mtljax.trajectory import loss_slice, random_direction

plt.style.use("tableau-colorblind10")
FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS = 100 if FAST else 1_000
BATCH = 100

digits = load("multidigits", train_size=500, val_size=0, test_size=1000)


def arrays(split):
    image = jnp.asarray(split["image"].reshape(-1, 144) / 16, jnp.float32)
    return image, jnp.stack([split["left"], split["right"]], axis=1)


TRAIN, TEST = arrays(digits.train), arrays(digits.test)


def logits(params, image):
    h = jax.nn.relu(image @ params["trunk"])
    return jnp.einsum("bi,ito->bto", h, params["heads"])


def task_losses(params, batch):
    image, labels = batch
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits(params, image), labels).mean(0)


def accuracy(params, data):
    image, labels = data
    return (logits(params, image).argmax(-1) == labels).mean(0)


# %% [markdown]
# Both networks start from the same parameters and read the same batches. The radius 0
# gives the plain balanced gradient. A step with SAM costs 3 forward and 4 backward
# passes, and a step with equal weights one of each.


# %%
def train(rho, seed=0):
    grad_fn = value_and_flat_grad(task_losses, mtljax.linear(2), rho=rho)
    optimizer = optax.adam(3e-3)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "trunk": jax.random.normal(keys[0], (144, 64)) / 12,
        "heads": jax.random.normal(keys[1], (64, 2, 10)) / 8,
    }

    def step(carry, key):
        params, state, opt_state = carry
        rows = jax.random.choice(key, len(TRAIN[0]), (BATCH,))
        losses, grad, state = grad_fn(params, state, (TRAIN[0][rows], TRAIN[1][rows]))
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    carry = params, grad_fn.init(params), optimizer.init(params)
    (params, _, _), losses = jax.lax.scan(step, carry, jax.random.split(keys[2], STEPS))
    return params, losses


runs = {
    "equal weights": jax.jit(lambda: train(0.0))(),
    "SAM per task": jax.jit(lambda: train(0.5))(),
}
for name, (params, losses) in runs.items():
    print(
        f"{name:14} train losses {losses[-1].round(4)}"
        f"  test accuracy {accuracy(params, TEST).round(3)}"
    )

# %% [markdown]
# ## Slices along random directions
# The directions are filter-normalised ([Li et al.,
# 2017](https://arxiv.org/abs/1712.09913)): each filter of a direction has the norm of
# the same filter of the network. Otherwise a network with larger weights would appear
# flatter. The lines are the training losses of each task along five directions.

# %%
WHOLE = jax.tree.map(lambda x: x[None], TRAIN)  # one batch


@jax.jit
def slices(params, key):
    direction = random_direction(key, params)
    return loss_slice(task_losses, params, (direction,), WHOLE, num_points=31)


DIRECTIONS = jax.random.split(jax.random.key(2), 5)
lines = {
    name: jax.tree.map(np.asarray, jax.vmap(slices, (None, 0))(params, DIRECTIONS))
    for name, (params, _) in runs.items()
}
fig, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", sharey=True)
for task, axis in enumerate(axes):
    for (name, (at, values)), style in zip(lines.items(), ("--", "-"), strict=True):
        for i in range(len(DIRECTIONS)):
            look = {"color": "C0" if style == "-" else "C1", "linewidth": 1.1}
            look["label"] = name if i == 0 else None
            axis.plot(at[i], values[i, :, task], style, **look)
    axis.set(title=("left digit", "right digit")[task], xlabel="distance / filter norm")
axes[0].set_ylabel("training loss")
axes[0].legend(frameon=False)
# Figure: Training loss of two tasks along a random direction. The loss around solutions
# of SAM per task rises less than around those of equal weights.
plt.show()

# %% [markdown]
# ## The plane of two directions


# %%
@jax.jit
def plane(params):
    directions = tuple(random_direction(key, params) for key in DIRECTIONS[:2])
    return loss_slice(task_losses, params, directions, WHOLE, num_points=21)


fig, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained", sharey=True)
levels = np.geomspace(0.003, 10, 16)
for axis, (name, (params, _)) in zip(axes, runs.items(), strict=True):
    at, values = jax.tree.map(np.asarray, plane(params))
    mean = values.mean(-1).T
    filled = axis.contourf(
        at, at, mean, levels, norm="log", cmap="viridis", extend="max"
    )
    axis.contour(at, at, mean, [0.1, 1.0], colors="white", linewidths=1)
    axis.plot(0, 0, "k+", markersize=10)
    axis.set(title=name, xlabel="first direction", aspect="equal")
axes[0].set_ylabel("second direction")
ticks = [0.01, 0.1, 1, 10]
bar = fig.colorbar(filled, ax=axes, label="mean training loss", ticks=ticks)
bar.minorticks_off()
# Figure: Mean training loss on a random plane around a solution of equal weights and
# one of SAM per task. The low region of SAM is wider.
plt.show()

# %% [markdown]
# The white lines are the losses 0.1 and 1. The loss of the SAM solution exceeds 0.1.
#
# ## Accuracy under noise on the weights
# Sharpness is of practical interest if the weights change after training, for example
# by quantisation. The noise is relative to the norm of each filter.

# %%
NOISE = jnp.linspace(0, 1, 9)


@jax.jit
def noisy(params):
    def at(level, key):
        direction = random_direction(key, params)
        moved = jax.tree.map(lambda p, d: p + level * d, params, direction)
        return accuracy(moved, TEST).mean()

    keys = jax.random.split(jax.random.key(3), 20)
    return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(NOISE, keys)


fig, axis = plt.subplots(figsize=(5, 3), layout="constrained")
robust = {name: np.asarray(noisy(params)) for name, (params, _) in runs.items()}
for (name, values), style, color in zip(
    robust.items(), ("--o", "-s"), ("C1", "C0"), strict=True
):
    axis.errorbar(
        NOISE,
        values.mean(1),
        values.std(1),
        fmt=style,
        color=color,
        capsize=2,
        markersize=4,
        label=name,
    )
axis.set(xlabel="noise / filter norm", ylabel="test accuracy")
axis.legend(frameon=False)
# Figure: Test accuracy over the norm of weight noise for equal weights and SAM per
# task. The curves overlap within their spread.
plt.show()

# %% [markdown]
# The training loss of the SAM solution rises less along random directions, for both
# tasks. The loss at the solution itself is larger. In this small example neither the
# test accuracy nor the accuracy under noise differs by more than the spread of the
# noise. A flatter training loss alone does not show that a solution is better.

# %%
rises = {
    name: (values[:, [0, -1]] - values[:, [15]]).mean((0, 1))
    for name, (_, values) in lines.items()
}
for name, rise in rises.items():
    print(f"{name:14} mean rise of the losses at distance 1: {rise.round(2)}")
plain, flat = robust.values()
assert all(values[:, 15].min() >= 0 for _, values in lines.values())
if not FAST:
    assert (rises["SAM per task"] < 0.85 * rises["equal weights"]).all(), rises
    apart = np.abs(plain.mean(1) - flat.mean(1))
    assert (apart[1:] < (plain.std(1) + flat.std(1))[1:]).all(), apart

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
