"""How T backward passes run where nobody says, decided from static shapes."""

from typing import Any, NamedTuple

import jax


class Passes(NamedTuple):
    """How T backward passes run."""

    strategy: Any
    chunk_size: int


# Passes up to which they are unrolled. XLA:CPU runs batched products and grouped
# convolutions slowly: separate passes win until their number makes the program long.
_UNROLL = {"cpu": 16}
# Bytes that the values of all passes may take at once.
_LIVE = {"cpu": 1 << 28}
# And those of a chunk, where not all fit: a loop on a CPU is fastest near its caches.
_CHUNK = {"cpu": 1 << 25}
# Where a pass alone is as large as a chunk, a loop is as fast from here on, leaner,
# and compiles sooner.
_UNROLL_LARGE = 8


def few(tasks: int, largest: int = 0) -> bool:
    """Whether that many passes are unrolled; ``largest`` as in :func:`batched`."""
    backend = jax.default_backend()
    large = 16 * largest >= _CHUNK.get(backend, 1 << 32)
    if large and tasks > _UNROLL_LARGE:
        return False
    return tasks <= _UNROLL.get(backend, 1)


def batched(tasks: int, largest: int) -> Passes:
    """All passes at once, or some at a time where their values do not fit together.

    ``largest`` is the number of entries of the largest value of a pass.
    """
    backend, default = jax.default_backend(), 1 << 32
    each = 16 * largest  # four bytes an entry, and a few such values at a time
    if each * tasks <= _LIVE.get(backend, default):
        return Passes("vmap", tasks)
    some = _CHUNK.get(backend, default) // each
    return Passes("chunked", some) if some > 1 else Passes("map", 1)
