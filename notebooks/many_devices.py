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
# # Eight devices
# How is a step split over eight devices, and does the result agree with one device? The
# devices of this notebook are virtual: JAX divides the CPU into eight. The number must
# be set before the first use of a device. The program is the same for real devices.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mtljax

plt.style.use("tableau-colorblind10")
assert len(jax.devices()) == 8

# %% [markdown]
# A network with four tasks. Nothing in the losses mentions a device.

# %%
WIDTH, BATCH, T = 768, 128, 4
keys = jax.random.split(jax.random.key(0), 5)
PARAMS = {
    "in": jax.random.normal(keys[0], (64, WIDTH)) / 8,
    "hidden": jax.random.normal(keys[1], (WIDTH, WIDTH)) / 28,
    "heads": jax.random.normal(keys[2], (WIDTH, T)) / 28,
}
X, Y = jax.random.normal(keys[3], (BATCH, 64)), jax.random.normal(keys[4], (BATCH, T))


def task_losses(params, x, y):
    h = jnp.tanh(jnp.tanh(x @ params["in"]) @ params["hidden"])
    return ((h @ params["heads"] - y) ** 2).mean(0)


# %% [markdown]
# ## Layouts
# Only the placement of the arguments changes. On this mesh the compiler chooses the
# placement of the results, and `grad_shardings` requests that of the parameters.
#
# - *data parallel*: the batch is split, and each device has all parameters;
# - *FSDP*: the parameters are split too.

# %%
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def place(tree, spec):
    return jax.device_put(tree, NamedSharding(MESH, spec))


DATA = place((X, Y), P("data"))
LAYOUTS = {
    "one device": (PARAMS, (X, Y)),
    "data parallel": (place(PARAMS, P()), DATA),
    "FSDP": (place(PARAMS, P("data")), DATA),
}


def compiled(balancer, engine, params, data):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    grad_fn = mtljax.value_and_balanced_grad(
        task_losses, balancer, engine=engine, grad_shardings=shardings
    )
    state = balancer.init(params)
    program = jax.jit(grad_fn).lower(params, state, *data).compile()
    return program, program(params, state, *data)


METHODS = {
    "equal weights, losses": (mtljax.linear(T), "losses"),
    "MGDA, Gramian": (mtljax.mgda(T), "gramian"),
    "MGDA, stacked": (mtljax.mgda(T), "stacked"),
}
results = {
    (method, layout): compiled(*METHODS[method], *LAYOUTS[layout])
    for method in METHODS
    for layout in LAYOUTS
}

# %% [markdown]
# ## The parts of each device
# The colour and the number show the device of each part of an array. The gradient of a
# parameter is divided in the same way as the parameter.


# %%
def draw(axis, array, title):
    rows, columns = array.shape
    indices = array.sharding.devices_indices_map(array.shape)
    parts = {}
    for device, index in indices.items():
        parts.setdefault(str(index), (index, []))[1].append(device.id)
    for index, devices in parts.values():
        (top, bottom, _), (left, right, _) = (
            s.indices(n) for s, n in zip(index, array.shape, strict=True)
        )
        whole = len(devices) > 1
        color = "0.85" if whole else plt.cm.cividis(devices[0] / 7)
        axis.add_patch(
            plt.Rectangle(
                (left, top),
                right - left,
                bottom - top,
                facecolor=color,
                edgecolor="white",
            )
        )
        text = "all devices" if whole else str(devices[0])
        ink = "black" if whole or devices[0] > 3 else "white"
        axis.text(
            (left + right) / 2,
            (top + bottom) / 2,
            text,
            color=ink,
            fontsize=9,
            ha="center",
            va="center",
        )
    axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], title=title)
    axis.set_xlabel(f"{rows} x {columns}")


fig, axes = plt.subplots(2, 3, figsize=(8, 5), layout="constrained")
for row, layout in zip(axes, ("data parallel", "FSDP"), strict=True):
    params, (x, _) = LAYOUTS[layout]
    _, grad, _ = results["MGDA, Gramian", layout][1]
    draw(row[0], x, "batch")
    draw(row[1], params["hidden"], "parameter")
    draw(row[2], grad["hidden"], "gradient")
    row[0].set_ylabel(layout, fontsize=12)
# Figure: Parts of the batch, of a parameter and of its gradient on eight devices. Data
# parallelism splits the batch only, FSDP splits all three.
plt.show()
for layout in ("data parallel", "FSDP"):
    for method in METHODS:
        grad = results[method, layout][1][1]
        for name, leaf in LAYOUTS[layout][0].items():
            assert grad[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)

# %% [markdown]
# ## Memory of each device
# The compiler reports the temporary memory of a program. The engine `stacked` stores T
# gradients of the parameters. The Gramian engine stores T gradients of the activations
# instead, which are smaller if the batch is smaller than the width of a layer. The
# engine `losses` needs one backward pass.

# %%
memory = {
    at: program.memory_analysis().temp_size_in_bytes / 2**20
    for at, (program, _) in results.items()
}
fig, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for i, method in enumerate(METHODS):
    at = np.arange(len(LAYOUTS)) + 0.26 * (i - 1)
    bars = axis.bar(
        at, [memory[method, layout] for layout in LAYOUTS], 0.24, label=method
    )
    axis.bar_label(bars, fmt="%.1f", fontsize=8)
axis.set_xticks(range(len(LAYOUTS)), LAYOUTS)
axis.set(ylabel="temporary memory (MiB)")
fig.legend(loc="outside lower center", ncols=3)
# Figure: Temporary memory of equal weights and of two engines of MGDA, on one device,
# with data parallelism and with FSDP. Stacked gradients need the most memory.
plt.show()
one = {method: memory[method, "one device"] for method in METHODS}
assert one["equal weights, losses"] < one["MGDA, Gramian"] < one["MGDA, stacked"], one

# %% [markdown]
# ## Error against one device
# Devices add in another order, so that results agree up to rounding.


# %%
def distance(a, b):
    """Relative distance of two trees in the largest element of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    arrays = [(np.asarray(x), np.asarray(y)) for x, y in pairs]
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in arrays)


errors = {
    (method, layout): distance(
        results[method, layout][1][1], results[method, "one device"][1][1]
    )
    for method in METHODS
    for layout in ("data parallel", "FSDP")
}
fig, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for layout, marker, size in (("data parallel", "o", 13), ("FSDP", "s", 6)):
    values = [errors[method, layout] for method in METHODS]
    look = {"markersize": size, "mfc": "none", "markeredgewidth": 2}
    axis.plot(values, range(len(METHODS)), marker, label=layout, **look)
axis.axvline(np.finfo(np.float32).eps, color="0.6", linestyle="--")
axis.text(np.finfo(np.float32).eps, -0.45, " float32 rounding", fontsize=9)
axis.set_yticks(range(len(METHODS)), METHODS)
axis.set(xscale="log", xlim=(1e-8, 1e-4), ylim=(-0.6, 2.4))
axis.set_xlabel("largest relative error of the gradient")
fig.legend(loc="outside right center")
# Figure: Largest relative error of the gradient against one device. All errors are
# between 1e-7 and 1e-6.
plt.show()
assert max(errors.values()) < 1e-5, errors

# %%
import optax

print("jax", jax.__version__, "optax", optax.__version__, "mtljax", mtljax.__version__)
