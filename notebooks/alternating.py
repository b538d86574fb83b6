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
# # Alternating task updates
# What changes if tasks take steps one after another, with their own optimizer states?
# `mtljax.alternating.alternate` takes one optimizer step per task on each batch. To
# first order this equals one step on the *sum* of the losses at the same learning rate.
# A comparison with the *mean* of T losses needs T times the learning rate.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax
from mtljax.alternating import alternate
from mtljax.data import load

plt.style.use("tableau-colorblind10")
FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
LOOKS = {
    "alternating": {"color": "C1", "marker": "o", "markersize": 11, "mfc": "none"},
    "joint, sum": {"color": "C0", "marker": "s", "markersize": 7, "linestyle": "--"},
    "joint, mean": {"color": "black", "marker": "^", "markersize": 4, "linestyle": ":"},
}

# %% [markdown]
# ## Two quadratic losses in the plane
# With gradient descent at a small rate the paths of alternation and of the sum are
# almost the same. The mean follows the same path at half the speed: compare the
# markers, one for ten batches. With Adam, the sum and the mean coincide, because Adam
# removes a constant factor. Alternation keeps a state per task, so both tasks take
# steps of about the same size. Along $\theta_1$ their gradients have opposite signs,
# and the steps cancel. The run ends at another point than the minimum of the sum.

# %%
CENTRES = jnp.array([[-1.0, 0.0], [1.0, 0.6]])
CURVATURES = jnp.array([[1.0, 4.0], [0.4, 0.2]])
BEGIN = jnp.array([-0.2, 1.8])


def quadratic(theta, task, batch):
    del batch
    return 0.5 * jnp.sum(CURVATURES[task] * (theta - CENTRES[task]) ** 2)


def joint(loss, optimizer, factor, num_tasks):
    """A step on the sum of the losses, times a factor."""

    def step(params, state, batch):
        def total(params):
            losses = jnp.stack([loss(params, t, batch) for t in range(num_tasks)])
            return factor * losses.sum(), losses

        (_, losses), grad = jax.value_and_grad(total, has_aux=True)(params)
        updates, state = optimizer.update(grad, state, params)
        return losses, optax.apply_updates(params, updates), state

    return optimizer.init, step


def in_turn(loss, optimizer, num_tasks, labels=None):
    method = alternate(optimizer, num_tasks, key=jax.random.key(0), labels=labels)
    return method.init, lambda p, s, batch: method.step(loss, p, s, batch)


def path(method, steps):
    init, step = method

    def body(carry, _):
        _, *new = step(*carry, None)
        return tuple(new), new[0]

    _, points = jax.lax.scan(body, (BEGIN, init(BEGIN)), length=steps)
    return np.concatenate([BEGIN[None], points])


def methods(optimizer):
    return {
        "alternating": in_turn(quadratic, optimizer, 2),
        "joint, sum": joint(quadratic, optimizer, 1.0, 2),
        "joint, mean": joint(quadratic, optimizer, 0.5, 2),
    }


PATHS = {
    title: {name: path(method, 150) for name, method in methods(optimizer).items()}
    for title, optimizer in {
        "gradient descent, rate 0.05": optax.sgd(0.05),
        "Adam, rate 0.05": optax.adam(0.05),
    }.items()
}

# %%
a, b = np.meshgrid(np.linspace(-1.9, 1.9, 80), np.linspace(-0.6, 2.2, 80))
grid = jnp.stack([a, b], -1).reshape(-1, 2)
total = sum(jax.vmap(quadratic, (0, None, None))(grid, t, None) for t in (0, 1))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.9), layout="constrained", sharey=True)
for axis, (title, paths) in zip(axes, PATHS.items(), strict=True):
    axis.contour(a, b, np.reshape(total, a.shape), 12, colors="0.85", linewidths=0.8)
    for t, name in enumerate(("minimum of task 1", "minimum of task 2")):
        axis.plot(*CENTRES[t], "P", color="black", markersize=9)
        axis.annotate(
            name, CENTRES[t], (0, -16), textcoords="offset points", ha="center"
        )
    for name, points in paths.items():
        axis.plot(*points.T, markevery=10, label=name, **LOOKS[name])
    axis.set(title=title, xlabel=r"$\theta_1$", xlim=(-1.9, 1.9), ylim=(-0.6, 2.2))
axes[0].set_ylabel(r"$\theta_2$")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
# Figure: Paths of alternating and joint steps towards the minimum of a quadratic
# problem with two tasks. With gradient descent the three paths agree, with Adam the
# alternating path differs.
plt.show()


def distance(paths, first, second):
    return np.abs(paths[first] - paths[second]).max()


descent, adam = PATHS.values()
print("alternating and sum", distance(descent, "alternating", "joint, sum"))
assert distance(descent, "alternating", "joint, sum") < 0.05
assert distance(adam, "joint, sum", "joint, mean") < 0.01
assert distance(adam, "alternating", "joint, sum") > 0.1

# %% [markdown]
# ## Digits: the effect of the learning rate
# Three tasks on two overlaid digits: the classes `left` and `right`, and the difference
# of their ink. The learning rates are a `vmap` axis. Each batch costs three backward
# passes with alternation, and one pass of the sum with a joint step.

# %%
STEPS = 60 if FAST else 600
T = 3
digits = load("multidigits", train_size=4000, val_size=0, test_size=1000)


def arrays(split):
    image = jnp.asarray(split["image"].reshape(-1, 144) / 16, jnp.float32)
    return image, *(jnp.asarray(split[k]) for k in ("left", "right", "ink"))


TRAIN, TEST = arrays(digits.train), arrays(digits.test)
LABELS = {"trunk": "shared", "heads": "own"}  # a row of the heads per task


def digit_loss(params, task, batch):
    """The loss of one task, which receives its own head."""
    image, left, right, ink = batch
    outputs = jax.nn.relu(image @ params["trunk"]) @ params["heads"]
    classify = optax.softmax_cross_entropy_with_integer_labels
    values = [
        classify(outputs, left).mean(),
        classify(outputs, right).mean(),
        jnp.mean((outputs[:, 0] - ink) ** 2) / 9,
    ]
    return jnp.stack(values)[task]


def joint_digit_loss(params, task, batch):
    return digit_loss(params | {"heads": params["heads"][task]}, task, batch)


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "trunk": jax.random.normal(keys[0], (144, 48)) / 12,
        "heads": jax.random.normal(keys[1], (T, 48, 10)) / 7,
    }


def train(kind, rate):
    optimizer = optax.sgd(rate)
    if kind == "alternating":
        init, step = in_turn(digit_loss, optimizer, T, LABELS)
    else:
        factor = 1.0 if kind == "joint, sum" else 1 / T
        init, step = joint(joint_digit_loss, optimizer, factor, T)

    def body(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(TRAIN[0]))
        batch = jax.tree.map(lambda x: x[rows], TRAIN)
        losses, params, state = step(params, state, batch)
        return (params, state), losses.mean()

    params = start()
    keys = jax.random.split(jax.random.key(1), STEPS)
    (params, _), curve = jax.lax.scan(body, (params, init(params)), keys)
    test = jnp.stack([joint_digit_loss(params, t, TEST) for t in range(T)])
    return curve, test.mean()


RATES = 0.01 * 3.0 ** jnp.arange(5)
runs = {
    kind: jax.tree.map(
        np.asarray, jax.jit(jax.vmap(lambda r, kind=kind: train(kind, r)))(RATES)
    )
    for kind in LOOKS
}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
for kind, (_, test) in runs.items():
    axes[0].plot(RATES, test, label=kind, **LOOKS[kind])
    matched = RATES / T if kind == "joint, mean" else RATES
    axes[1].plot(matched, test, label=kind, **LOOKS[kind])
axes[0].set(title="unmatched", xlabel="learning rate", ylabel="mean test loss")
axes[1].set(title="matched", xlabel="learning rate of the sum")
for axis in axes:
    axis.set_xscale("log")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
# Figure: Mean test loss over the learning rate for alternating and joint steps. The
# curves differ at equal rates and agree at matched rates, except for the largest rate.
plt.show()

# %% [markdown]
# On the left, the mean of the losses appears to need a larger learning rate, and
# alternation appears to be faster. On the right, the same runs are drawn at matched
# rates. The mean at the rate $3 \eta$ is exactly the sum at $\eta$, and alternation is
# almost the same. At the largest rate all rules are close to divergence, and their
# order there means little.
#
# ## Digits: the cost
# A batch of alternation costs three backward passes, one for each task. A joint step
# costs one. The next figure shows the training loss at the rate 0.27 of the sum.


# %%
def smooth(curve, window=STEPS // 60):
    return curve.reshape(-1, window).mean(1)


fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for kind, (curves, _) in runs.items():
    curve = smooth(curves[4 if kind == "joint, mean" else 3])
    batches = np.linspace(0, STEPS, len(curve))
    passes = batches * (T if kind == "alternating" else 1)
    look = LOOKS[kind] | {"marker": None, "label": kind}
    axes[0].plot(batches, curve, **look)
    axes[1].plot(passes, curve, **look)
axes[0].set(xlabel="batches", ylabel="mean training loss", yscale="log")
axes[1].set(xlabel="backward passes")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
# Figure: Mean training loss over batches and over backward passes. Alternating and
# joint steps agree over batches, and alternating steps need three times the passes.
plt.show()

# %% [markdown]
# In this small example, alternation is not better than a joint step at the matched
# rate. Its states per task can still be useful with Adam, where they remove the scale
# of each loss. `mtljax.alternating.adatask` has the same states without the
# alternation. For tasks with separate data, `schedule="per_batch"` takes one step per
# batch.

# %%
for kind, (_, test) in runs.items():
    print(f"{kind:12}", *(f"{value:.3f}" for value in test))
tests = {kind: test for kind, (_, test) in runs.items()}
shifted = tests["joint, mean"][1:3]  # the rate 3 eta of the mean
assert np.allclose(shifted, tests["joint, sum"][:2], rtol=1e-3)
assert np.allclose(tests["alternating"][:2], tests["joint, sum"][:2], rtol=0.02)
if not FAST:
    best = {kind: test.min() for kind, test in tests.items()}
    assert best["alternating"] > 0.97 * best["joint, sum"], best

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
