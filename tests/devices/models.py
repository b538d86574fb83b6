"""Three small networks with named axes; each has a trunk and three tasks.

The sizes of axes differ from one another and from the number of tasks, so that a
collective of one array is not taken for another. Sizes are multiples of eight where
a mesh splits them. Batches come in two sizes, below and above the widths: which of
the two decides whether the Gramian engine forms gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from devices.layouts import Place

TASKS = 3


class Model(NamedTuple):
    """A model and its data.

    Attributes:
      names: The names of the axes of every parameter, a tree like the parameters.
      params: Their values.
      batches: Small and large: a tuple of arguments of ``task_losses``, and the
        names of their axes.
      batch_names: The names of the axes of these arguments.
      labels: Shared and own parameters, or None.
      losses: ``losses(place)(params, *batch) -> losses[T]``.
    """

    names: Any
    params: Any
    batches: dict[str, Any]
    batch_names: Any
    labels: Any
    losses: Callable[[Place], Callable[..., jax.Array]]


def values(shapes: Any, seed: int = 0) -> Any:
    """Normal values of the scale that keeps activations near one."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    arrays = [
        rng.normal(size=shape) / np.sqrt(max(1, int(np.prod(shape[:-1]))))
        for shape in leaves
    ]
    return jax.tree.unflatten(treedef, [jnp.asarray(x, jnp.float32) for x in arrays])


def dense(widths: tuple[int, ...], tasks: int, sizes: dict[str, int]) -> Model:
    """Layers with biases, and a head for every task.

    The axes of the layers alternate, so that with tensor parallelism the first
    product splits its columns, and the second its rows.
    """
    ends = [("embed", "mlp")[i % 2] for i in range(len(widths))]
    layers = list(zip(widths, widths[1:], ends, ends[1:], strict=False))
    last = ends[-1]
    shapes = {
        "trunk": [{"w": (a, b), "b": (b,)} for a, b, _, _ in layers],
        "heads": [(widths[-1],)] * tasks,
    }
    names = {
        "trunk": [{"w": (start, end), "b": (end,)} for *_, start, end in layers],
        "heads": [(last,)] * tasks,
    }

    def used(name):
        return None if name == "embed" else name

    def losses(place):
        def task_losses(params, x, y):
            h = x
            for p, (*_, start, end) in zip(params["trunk"], layers, strict=True):
                w = place.use(p["w"], used(start), used(end))
                b = place.use(p["b"], used(end))
                h = place.einsum("ni,io->no", h, w, names=("batch", used(end)))
                h = jnp.tanh(h + b[None])
            heads = [place.use(v, used(last)) for v in params["heads"]]
            found = [place.einsum("no,o->n", h, v, names=("batch",)) for v in heads]
            pairs = zip(found, y, strict=True)
            return jnp.stack([jnp.mean((f - t) ** 2) + 0.1 for f, t in pairs])

        return task_losses

    def batch(size):
        rng = np.random.default_rng(size)
        x = jnp.asarray(rng.normal(size=(size, widths[0])), jnp.float32)
        y = [jnp.asarray(rng.normal(size=size), jnp.float32) for _ in range(tasks)]
        return x, y

    return Model(
        names,
        values(shapes),
        {name: batch(size) for name, size in sizes.items()},
        (("batch", None), [("batch",)] * tasks),
        {"trunk": "shared", "heads": "own"},
        losses,
    )


def mlp() -> Model:
    """Two hidden layers of different widths."""
    return dense((24, 48, 32), TASKS, {"small": 16, "large": 128})


def wide() -> Model:
    """Fewer examples than the width: the Gramian engine forms no gradient."""
    return dense((256, 256, 256, 256), 4, {"small": 64})


def tall() -> Model:
    """More examples than the width: it forms them all."""
    return dense((64, 64, 64, 64), 4, {"large": 1024})


def transformer() -> Model:
    """An embedding, a block of attention and an MLP, layer norms; all shared."""
    vocabulary, width, heads, size, hidden, length = 40, 32, 4, 8, 64, 5
    shapes = {
        "table": (vocabulary, width),
        "norm1": {"scale": (width,), "bias": (width,)},
        "query": (width, heads, size),
        "key": (width, heads, size),
        "value": (width, heads, size),
        "out": (heads, size, width),
        "norm2": {"scale": (width,), "bias": (width,)},
        "up": (width, hidden),
        "down": (hidden, width),
        "last": (width, TASKS),
    }
    names = {
        "table": (None, "embed"),
        "norm1": {"scale": (None,), "bias": (None,)},
        "query": ("embed", "heads", None),
        "key": ("embed", "heads", None),
        "value": ("embed", "heads", None),
        "out": ("heads", None, "embed"),
        "norm2": {"scale": (None,), "bias": (None,)},
        "up": ("embed", "mlp"),
        "down": ("mlp", "embed"),
        "last": ("embed", None),
    }

    def norm(p, x):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * (
            1 + p["scale"][None, None]
        ) + p["bias"][None, None]

    def losses(place):
        def task_losses(p, ids, y):
            tokens = ("batch", None, None)
            table = place.use(p["table"], None, None)
            x = place.take(table, ids, names=tokens)
            h = norm(p["norm1"], x)
            split = ("batch", None, "heads", None)

            def project(name):
                w = place.use(p[name], None, "heads", None)
                return place.einsum("nld,dhk->nlhk", h, w, names=split)

            q, k, v = (project(name) for name in ("query", "key", "value"))
            square = ("batch", "heads", None, None)
            scores = place.einsum("nqhd,nkhd->nhqk", q, k, names=square)
            weights = jax.nn.softmax(scores / np.sqrt(size))
            mixed = place.einsum("nhqk,nkhd->nqhd", weights, v, names=split)
            w = place.use(p["out"], "heads", None, None)
            x = x + place.einsum("nlhk,hkd->nld", mixed, w, names=tokens)
            h = norm(p["norm2"], x)
            up, down = (
                place.use(p["up"], None, "mlp"),
                place.use(p["down"], "mlp", None),
            )
            h = place.einsum("nld,dm->nlm", h, up, names=("batch", None, "mlp"))
            h = jax.nn.gelu(h)
            x = x + place.einsum("nlm,md->nld", h, down, names=tokens)
            last = place.use(p["last"], None, None)
            out = place.einsum("nd,dt->nt", x.mean(1), last, names=("batch", None))
            return ((out - y) ** 2).mean(0) + 0.1

        return task_losses

    def batch(count):
        rng = np.random.default_rng(count)
        ids = jnp.asarray(rng.integers(0, vocabulary, (count, length)), jnp.int32)
        return ids, jnp.asarray(rng.normal(size=(count, TASKS)), jnp.float32)

    return Model(
        names,
        values(shapes),
        {"small": batch(8), "large": batch(56)},
        (("batch", None), ("batch", None)),
        None,
        losses,
    )


def convolution() -> Model:
    """Two convolutions with batch statistics, and a head for every task."""
    channels, first, second, side = 3, 16, 24, 6
    shapes = {
        "trunk": {
            "conv1": (3, 3, channels, first),
            "scale1": (first,),
            "bias1": (first,),
            "conv2": (3, 3, first, second),
            "scale2": (second,),
            "bias2": (second,),
        },
        "heads": [(second,)] * TASKS,
    }
    names = {
        "trunk": {
            "conv1": (None, None, None, "mlp"),
            "scale1": ("mlp",),
            "bias1": ("mlp",),
            "conv2": (None, None, "mlp", "embed"),
            "scale2": (None,),
            "bias2": (None,),
        },
        "heads": [("embed",)] * TASKS,
    }

    def normalise(x, scale, bias):
        mean = x.mean((0, 1, 2), keepdims=True)
        variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-3)
        return x * (1 + scale[None, None, None]) + bias[None, None, None]

    def losses(place):
        def conv(x, w, stride):
            return jax.lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        def task_losses(params, x, y):
            p = params["trunk"]
            w1 = place.use(p["conv1"], None, None, None, "mlp")
            x = normalise(conv(x, w1, 1), p["scale1"], p["bias1"])
            w2 = place.use(p["conv2"], None, None, "mlp", None)
            x = normalise(conv(jax.nn.relu(x), w2, 2), p["scale2"], p["bias2"])
            h = jnp.tanh(x).mean((1, 2))
            heads = [place.use(v, None) for v in params["heads"]]
            found = [place.einsum("no,o->n", h, v, names=("batch",)) for v in heads]
            pairs = zip(found, y, strict=True)
            return jnp.stack([jnp.mean((f - t) ** 2) + 0.1 for f, t in pairs])

        return task_losses

    def batch(size):
        rng = np.random.default_rng(size)
        x = jnp.asarray(rng.normal(size=(size, side, side, channels)), jnp.float32)
        y = [jnp.asarray(rng.normal(size=size), jnp.float32) for _ in range(TASKS)]
        return x, y

    return Model(
        names,
        values(shapes),
        {"small": batch(8), "large": batch(40)},
        (("batch", None, None, None), [("batch",)] * TASKS),
        {"trunk": "shared", "heads": "own"},
        losses,
    )


MODELS = {"mlp": mlp, "transformer": transformer, "convolution": convolution}
SIZED = {"wide": wide, "tall": tall}  # for what is counted in bytes
