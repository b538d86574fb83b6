"""How T backward passes run where nobody says, decided from static shapes."""

from typing import Any, NamedTuple

import jax


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
