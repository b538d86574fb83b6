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
# # Task weights and gradient conflict
# What do task weights and the cosines between task gradients do during training? Most
# descriptions of a method concern one step. This notebook records every step of a run
# on real digits with three tasks: the classes of two overlaid digits (`left` and
# `right`), and the difference of their ink (`ink`), a regression with a larger loss.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mtljax
from mtljax import metrics
from mtljax.data import load

plt.style.use("tableau-colorblind10")
FAST = os.environ.get("MTLJAX_NOTEBOOK_FAST") == "1"
STEPS = 200 if FAST else 2_000
TASKS = ("left", "right", "ink")
BATCH = 64

digits = load("multidigits", train_size=4000, val_size=0, test_size=0).train
DATA = {task: jnp.asarray(digits[task]) for task in TASKS}
DATA["image"] = jnp.asarray(digits["image"].reshape(-1, 144) / 16, jnp.float32)


def init(key, width=48):
    shapes = {"trunk": (144, width), "left": (width, 10), "right": (width, 10)}
    shapes |= {"ink": (width, 1)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / jnp.sqrt(shape[0])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def task_losses(params, batch):
    h = jax.nn.relu(batch["image"] @ params["trunk"])
    classify = optax.softmax_cross_entropy_with_integer_labels
    return {
        "left": classify(h @ params["left"], batch["left"]).mean(),
        "right": classify(h @ params["right"], batch["right"]).mean(),
        "ink": jnp.mean((h @ params["ink"][:, 0] - batch["ink"]) ** 2),
    }


# %% [markdown]
# The Gramian of the stacked gradients contains everything that is recorded here: the
# norms on its diagonal and the cosines. The labels restrict it to the shared
# parameters. All methods start from the same parameters and read the same batches. Task
# weights are divided by their sum, because the methods have different scales.

# %%
LABELS = {"trunk": "shared", "left": "own", "right": "own", "ink": "own"}
task_grads = mtljax.value_and_task_grads(task_losses, labels=LABELS)
METHODS = {
    "uncertainty": mtljax.uncertainty(TASKS),
    "DWA": mtljax.dwa(TASKS),
    "MGDA": mtljax.mgda(TASKS),
    "CAGrad": mtljax.cagrad(TASKS),
    "IMTL-G": mtljax.imtl_g(TASKS),
    "Nash-MTL": mtljax.nash_mtl(TASKS),
}


def train(balancer):
    adam = optax.with_extra_args_support(optax.adam(2e-3))
    optimizer = optax.partition(
        {"shared": optax.chain(balancer, optax.adam(2e-3)), "own": adam}, LABELS
    )

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(DATA["image"]))
        batch = jax.tree.map(lambda x: x[rows], DATA)
        losses, grads = task_grads(params, batch)
        gramian = mtljax.stack.gramian({"trunk": grads["trunk"]})
        updates, state = optimizer.update(grads, state, params, losses=losses)
        weights = optax.tree.get(state, "task_weights")
        record = {
            "losses": losses,
            "weights": weights / weights.sum(),
            "cosines": metrics.cosine_matrix(gramian),
            "conflict": metrics.conflict_rate(gramian),
        }
        return (optax.apply_updates(params, updates), state), record

    params = init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


runs = {}
for name, balancer in METHODS.items():
    run = jax.jit(lambda balancer=balancer: train(balancer))()
    runs[name] = jax.tree.map(np.asarray, run)


def smooth(values, window=STEPS // 40):
    """Means of consecutive windows of steps."""
    return values.reshape(-1, window, *values.shape[1:]).mean(1)


MIDDLES = smooth(np.arange(STEPS))

# %% [markdown]
# ## Weights over time

# %%
fig, axes = plt.subplots(
    2, 3, figsize=(9, 4.6), layout="constrained", sharex=True, sharey=True
)
looks = list(zip(TASKS, ("-", "--", "-"), (1.6, 1.6, 2.6), strict=True))
for axis, (name, run) in zip(axes.flat, runs.items(), strict=True):
    for i, (task, style, width) in enumerate(looks):
        values = smooth(run["weights"][:, i])
        axis.plot(MIDDLES, values, style, linewidth=width, label=task)
    axis.axhline(1 / 3, color="0.6", linewidth=0.8, zorder=0)
    axis.set(title=name, ylim=(0, 0.65))
for axis in axes[-1]:
    axis.set_xlabel("step")
for axis in axes[:, 0]:
    axis.set_ylabel("share of the weight")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
# Figure: Shares of the task weights over the steps for six methods and three tasks. All
# methods except DWA give the regression task ink the smallest share.
plt.show()

# %% [markdown]
# - `ink` has the largest gradients. All methods but DWA reduce its weight.
#   `uncertainty` learns this slowly, and the other methods read it from each Gramian.
# - MGDA gives the smallest weight to `ink`, because the min-norm point is close to the
#   short gradients.
# - IMTL-G and Nash-MTL have almost the same weights. For orthogonal gradients both are
#   proportional to the inverse norms, and the cosines below are small.
# - DWA compares consecutive losses of each task. On single batches their ratio is noise
#   around 1. The paper compares means over epochs (`window=`).

# %%
shares = {name: run["weights"][STEPS // 2 :].mean(0) for name, run in runs.items()}
for name, share in shares.items():
    print(f"{name:12} mean shares of the second half", share.round(3))
    assert np.isclose(share.sum(), 1, atol=1e-3), share
if not FAST:
    assert min(shares, key=lambda name: shares[name][2]) == "MGDA"
    assert np.abs(shares["IMTL-G"] - shares["Nash-MTL"]).max() < 0.05
    assert np.abs(shares["DWA"] - 1 / 3).max() < 0.02

# %% [markdown]
# ## Cosines and conflict
# The left panel shows the mean cosine of each pair of tasks in windows of steps, for
# the run with almost equal weights (DWA). The right panel shows the cosines of single
# steps.

# %%
PAIRS = {"left, right": (0, 1), "left, ink": (0, 2), "right, ink": (1, 2)}
cosines = {name: runs["DWA"]["cosines"][:, i, j] for name, (i, j) in PAIRS.items()}
fig, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
image = axes[0].imshow(
    np.stack([smooth(values) for values in cosines.values()]),
    cmap="PuOr",
    vmin=-0.1,
    vmax=0.1,
    aspect="auto",
    extent=(0, STEPS, len(PAIRS) - 0.5, -0.5),
)
axes[0].set_yticks(range(len(PAIRS)), PAIRS)
axes[0].set(title="means over windows", xlabel="step")
fig.colorbar(image, ax=axes[0], label="cosine")
for (name, values), style in zip(cosines.items(), ("-", "--", "-."), strict=True):
    bins = np.linspace(-0.4, 0.4, 41)
    axes[1].hist(values, bins, histtype="step", linestyle=style, lw=1.6, label=name)
axes[1].axvline(0, color="black", linewidth=0.8)
axes[1].set(title="single steps", xlabel="cosine", ylabel="number of steps")
axes[1].legend(frameon=False)
# Figure: Cosines of pairs of task gradients, as means over windows of steps and as a
# histogram over single steps. They are centred near zero.
plt.show()

rates = {name: float(run["conflict"].mean()) for name, run in runs.items()}
for name, rate in rates.items():
    print(f"{name:12} conflict rate {rate:.2f}")

# %% [markdown]
# The gradients of these tasks are almost orthogonal. The sign of a cosine close to zero
# depends on the batch, so that about half of the pairs are in conflict at each step,
# with every method. A conflict rate of one half is therefore what unrelated tasks have.
# Report the distribution of the cosines in addition to the rate.

# %%
assert all(
    0 <= run["conflict"].min() <= run["conflict"].max() <= 1 for run in runs.values()
)
if not FAST:
    assert all(0.4 < rate < 0.6 for rate in rates.values()), rates
    assert all(abs(values.mean()) < 0.05 for values in cosines.values())

# %% [markdown]
# ## The effect of the weights
# Conflict differs little between the methods, but the weight of `ink` does. The next
# figure shows the training losses of the last 200 steps against this weight.

# %%
last = {
    name: {
        task: float(values[-STEPS // 10 :].mean())
        for task, values in run["losses"].items()
    }
    for name, run in runs.items()
}
ink = {name: values["ink"] for name, values in last.items()}
digit = {name: (values["left"] + values["right"]) / 2 for name, values in last.items()}
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
titles = ("ink", "mean of left and right")
for axis, title, values in zip(axes, titles, (ink, digit), strict=True):
    for (name, value), marker in zip(values.items(), "os^DvP", strict=True):
        axis.plot(shares[name][2], value, marker, markersize=9, label=name)
    axis.set(title=title, xlabel="share of the weight of ink", ylabel="training loss")
    axis.set_xscale("log")
    axis.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    axis.set_xticks([], minor=True)
    axis.margins(0.1)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
# Figure: Training losses over the share of the weight of ink for six methods. A larger
# share tends to lower the loss of ink and to raise the mean loss of the two digits.
plt.show()

# %% [markdown]
# A method that reduces the weight of `ink` more has a larger loss of `ink`, and mostly
# a smaller loss of the other tasks. In this example the choice of a method is mainly
# the choice of a trade-off between the tasks.

# %%
if not FAST:
    assert min(ink, key=ink.get) == "DWA", ink
    assert max(ink, key=ink.get) == "MGDA", ink
    assert max(digit, key=digit.get) == "DWA", digit

# %%
print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
