"""How T backward passes run, by default decided from static shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Passes(NamedTuple):
    """How T backward passes run."""

    strategy: Any
    chunk_size: int
    together: int = 1  # passes that "map" makes in one turn of its loop


class Body(NamedTuple):
    """What one backward pass consists of."""

    largest: int  # entries of its largest value
    convolves: bool
    ops: int


# Passes up to which they are unrolled. XLA:CPU runs batched products and grouped
# convolutions slowly: separate passes win until their number makes the program long.
_UNROLL = {"cpu": 16}
# And the operations of all of them: some twenty seconds of compilation.
_UNROLLED_OPS = 10_000
# A pass of fewer operations that convolves is faster alone. In a longer one, what lies
# between the convolutions leaves a core idle, which another pass fills.
_LONG = 100
# Bytes that the values of all passes may take at once.
_LIVE = {"cpu": 1 << 28}
# And those of a chunk, where not all fit: a loop on a CPU is fastest near its caches.
_CHUNK = {"cpu": 1 << 25}
# Passes that convolve up to which a loop makes one in a turn.
_ALONE = 8
# Where a pass alone is as large as a chunk, a loop is as fast from here on, leaner,
# and compiles sooner.
_UNROLL_LARGE = 8


def few(tasks: int, body: Body) -> bool:
    """Whether that many passes are unrolled."""
    limit = _UNROLL.get(jax.default_backend(), 1)
    fills = tasks == 1 or not body.convolves or body.ops >= _LONG
    return fills and tasks <= limit and tasks * body.ops <= _UNROLLED_OPS


def loops_sooner(tasks: int, body: Body) -> bool:
    """Whether a loop is as good as unrolling: one pass is as large as a chunk."""
    large = 16 * body.largest >= _CHUNK.get(jax.default_backend(), 1 << 32)
    return large and not body.convolves and tasks > _UNROLL_LARGE


def batched(tasks: int, body: Body) -> Passes:
    """All passes at once, or some at a time where their values do not fit together.

    Convolutions on a CPU run one by one: a batch takes longer, and more memory. Where
    there are many, two in a turn fill the gaps of each other.
    """
    backend, default = jax.default_backend(), 1 << 32
    if backend == "cpu" and body.convolves:
        pairs = tasks > _ALONE and tasks % 2 == 0
        return Passes("map", 1, together=2 if pairs else 1)
    each = 16 * body.largest  # four bytes an entry, and a few such values at a time
    if each * tasks <= _LIVE.get(backend, default):
        return Passes("vmap", tasks)
    some = _CHUNK.get(backend, default) // each
    return Passes("chunked", some) if some > 1 else Passes("map", 1)


def pick(asked: Passes, num_tasks: int, body: Body) -> Passes:
    """Resolves ``"auto"`` from the backend, T and the size of a pass."""
    if asked.strategy != "auto":
        return asked
    if few(num_tasks, body):
        return Passes("unrolled", 1)
    return batched(num_tasks, body)


def map_tasks(
    function: Callable[[Any], Any],
    rows: Any,
    passes: Passes,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
) -> Any:
    """``function`` of every row of a stacked tree, the results stacked.

    Tasks lie along ``in_axes`` and ``out_axes``: 0, or a tree of axes.
    """
    strategy, chunk_size, together = passes
    if strategy == "vmap":
        return jax.vmap(function, (in_axes,), out_axes)(rows)
    if isinstance(in_axes, int):
        in_axes = jax.tree.map(lambda _: in_axes, rows)
    if strategy in ("map", "chunked"):
        rows = jax.tree.map(lambda x, axis: jnp.moveaxis(x, axis, 0), rows, in_axes)
        num_tasks = jax.tree.leaves(rows)[0].shape[0]
        if strategy == "map":
            stacked = jax.lax.scan(
                lambda _, row: (None, function(row)), None, rows, unroll=together
            )[1]
        else:
            size = min(chunk_size, num_tasks)
            stacked = jax.lax.map(function, rows, batch_size=size)
        if isinstance(out_axes, int):
            out_axes = jax.tree.map(lambda _: out_axes, stacked)
        return jax.tree.map(lambda x, axis: jnp.moveaxis(x, 0, axis), stacked, out_axes)
    leaf, axis = jax.tree.leaves(rows)[0], jax.tree.leaves(in_axes)[0]
    each = [
        function(
            jax.tree.map(
                lambda x, axis, task=task: jax.lax.index_in_dim(x, task, axis, False),
                rows,
                in_axes,
            )
        )
        for task in range(leaf.shape[axis])
    ]
    if isinstance(out_axes, int):
        out_axes = jax.tree.map(lambda _: out_axes, each[0])
    return jax.tree.map(lambda axis, *row: jnp.stack(row, axis), out_axes, *each)
