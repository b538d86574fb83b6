"""Selects how T backward passes are run, by default from static shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Passes(NamedTuple):
    """Strategy of the T backward passes."""

    strategy: Any
    chunk_size: int
    together: int = 1  # number of passes per iteration of the loop of "map"


class Body(NamedTuple):
    """Description of one backward pass."""

    largest: int  # number of entries of its largest value
    convolves: bool
    ops: int


# Maximum number of passes that are unrolled. XLA:CPU runs batched products and grouped
# convolutions slowly, so separate passes are faster until the program is too long.
_UNROLL = {"cpu": 16}
# Maximum number of operations of all passes, about twenty seconds of compilation.
_UNROLLED_OPS = 10_000
# A convolving pass with fewer operations is faster in a loop. In a longer pass, the
# operations between the convolutions use one core, and another pass can use the rest.
_LONG = 100
# Maximum number of bytes of the values of all passes that run at once.
_LIVE = {"cpu": 1 << 28}
# Number of bytes per chunk if not all fit: loops on a CPU are fastest near cache size.
_CHUNK = {"cpu": 1 << 25}
# Maximum number of convolving passes for a loop with one pass per iteration.
_ALONE = 8
# If one pass is as large as a chunk, a loop over more passes than this is as fast as
# unrolling, needs less memory and compiles faster.
_UNROLL_LARGE = 8


def few(tasks: int, body: Body) -> bool:
    """Whether that many passes are unrolled."""
    limit = _UNROLL.get(jax.default_backend(), 1)
    fills = tasks == 1 or not body.convolves or body.ops >= _LONG
    return fills and tasks <= limit and tasks * body.ops <= _UNROLLED_OPS


def loops_sooner(tasks: int, body: Body) -> bool:
    """Whether a loop is as fast as unrolling, as one pass is as large as a chunk."""
    large = 16 * body.largest >= _CHUNK.get(jax.default_backend(), 1 << 32)
    return large and not body.convolves and tasks > _UNROLL_LARGE


def batched(tasks: int, body: Body) -> Passes:
    """Runs all passes at once, or in chunks if their values need too much memory.

    Convolutions on a CPU run one by one, because a batch needs more time and memory.
    For many passes, two per iteration of the loop use the cores better.
    """
    backend, default = jax.default_backend(), 1 << 32
    if backend == "cpu" and body.convolves:
        pairs = tasks > _ALONE and tasks % 2 == 0
        return Passes("map", 1, together=2 if pairs else 1)
    each = 16 * body.largest  # 4 bytes per entry, and about 4 such values at a time
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
    """Applies ``function`` to every row of a stacked tree and stacks the results.

    ``in_axes`` and ``out_axes`` are the axes of the tasks: 0, or a tree of axes.
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
