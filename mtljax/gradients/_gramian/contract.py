"""Inner products of weight gradients from factors of the gradients.

All functions take two sides (of one batch, or of two) and return ``[S, S']``. A side
consists of inputs ``X [b, P, I]``, in blocks along I, and cotangents ``δ [b, P, S, O]``
of S tasks. The gradients are ``g_s = Xᵀ δ_s`` for every b. The tasks are next to the
outputs, so δ is a matrix ``[P, S O]`` in memory. One large product of two matrices,
which every backend runs fast, then processes the cotangents of all tasks.

Inside a mapped region a device has its own positions, and the gradients are sums over
the devices. ``axes`` contains the names of the mapped axes. The Gramian of a sum is not
the sum of Gramians. Therefore either one side is gathered, or the gradients are summed
first. The sum of the results over the axes is the Gramian. One sum is enough for all
leaves.
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import placement, stack
from mtljax.placement import Axes

_EXACT = "highest"
# Maximum number of entries of an intermediate result; larger ones are split.
_LIVE = 1 << 22


class Side(NamedTuple):
    """Factors of the gradients of one leaf."""

    blocks: list[Array]
    delta: Array


def wide(x: Array) -> Array:
    """Converts to the dtype in which inner products are accumulated."""
    return x.astype(stack.wide_dtype(x.dtype))


def inner(left: Side, right: Side, axes: Axes = ()) -> Array:
    """Computes ``<g_s, g'_t> = Σ_b <δ_s, (X X'ᵀ) δ'_t>`` without forming a gradient.

    The cost is ``P P' (I + S' O)`` multiplications. Forming the gradients costs
    ``S P I O``. In a mapped region the right side is gathered.
    """

    def one(x, delta, y, delta2):
        between = jnp.matmul(x, y.T, precision=_EXACT)

        def some(delta, delta2):
            return _products(delta, _times(between, delta2))

        size = max(_LIVE // delta2[..., 0].size, 1)
        return _in_parts(some, size, delta, delta2, axis=2)

    x, y = (wide(jnp.concatenate(side.blocks, axis=-1)) for side in (left, right))
    others = (placement.gathered(a, axes, 1) for a in (y, right.delta))
    y, delta2 = map(wide, others)
    x, delta = placement.cast((x, wide(left.delta)), axes)
    return _over_batch(one, x, delta, y, delta2)


def formed(left: Side, right: Side, axes: Axes = ()) -> Array:
    """Computes ``Σ_j <X_jᵀ δ_s, X'_jᵀ δ'_t>``, a few rows j at a time.

    In a mapped region the rows are summed over the devices before they are multiplied.
    """

    def one(x, delta, y, delta2):
        def some(x, y):
            g = placement.total(_times(x, delta), axes)
            if left is right:
                return _products(g, g)
            return _products(g, placement.total(_times(y, delta2), axes))

        size = max(_LIVE // delta[0].size, 1)
        return _in_parts(some, size, x.T, y.T)

    whole = _total(
        _over_batch(one, wide(x), wide(left.delta), wide(y), wide(right.delta))
        for x, y in zip(left.blocks, right.blocks, strict=True)
    )
    return whole / placement.size(axes)


def looked_up(left: Side, right: Side, axes: Axes = ()) -> Array:
    """Computes the inner products of the gradients of an embedding table.

    They are ``Σ_v <Σ_{n: id_n = v} δ_s[n], Σ_{m: id'_m = v} δ'_t[m]>``. Only the rows
    of the table that were read have a nonzero gradient. The function renumbers these
    rows and builds T tables with one row per row that was read, instead of T full
    tables. In a mapped region both sides are gathered.
    """
    same = left is right
    left, right = (
        Side(
            [placement.gathered(side.blocks[0], axes, 0)],
            placement.gathered(side.delta, axes, 1),
        )
        for side in (left, right)
    )
    (x,), (y,) = left.blocks, right.blocks
    ids = x if same else jnp.concatenate([x, y])
    slots = jnp.unique(ids, return_inverse=True, size=ids.size)[1].reshape(-1)

    def rows(ids, slots, delta):
        delta = jnp.where((ids >= 0)[:, None, None], wide(delta[0]), 0)
        zeros = jnp.zeros((num_slots, *delta.shape[1:]), delta.dtype)
        return zeros.at[slots].add(delta)

    num_slots = slots.size
    a = rows(x, slots[: x.size], left.delta)
    b = a if same else rows(y, slots[x.size :], right.delta)
    return _products(a, b) / placement.size(axes)


def _over_batch(function, x: Array, delta: Array, y: Array, delta2: Array) -> Array:
    """Sums over b a function of ``X_b, δ_b`` and those of the other side."""
    if len(x) == 1:  # XLA:CPU is slower with a batch axis of size 1
        return function(x[0], delta[0], y[0], delta2[0])
    return jax.vmap(function)(x, delta, y, delta2).sum(0)


def _total(parts: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, parts)


def _in_parts(function, size: int, *arrays: Array, axis: int = 0) -> Array:
    """Sums a function over parts of arrays along an axis, of length about ``size``."""
    length = arrays[0].shape[axis]
    count = max(round(length / size), 1)
    size = -(-length // count)

    def part(start, size=size):
        # A slice of the whole array needs no copy. Reshaping it into parts would.
        return function(
            *(jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x in arrays)
        )

    if count == 1:
        return function(*arrays)
    whole = length // size * size
    total = jax.lax.map(part, jnp.arange(0, whole, size)).sum(0)
    return total if whole == length else total + part(whole, length - whole)


def _times(matrix: Array, delta: Array) -> Array:
    """Multiplies ``[Q, P]`` by ``[P, S, O]``."""
    flat = delta.reshape(len(delta), -1)
    made = jnp.matmul(matrix, flat, precision=_EXACT)
    return made.reshape(len(matrix), *delta.shape[1:])


def _products(a: Array, b: Array) -> Array:
    """Computes ``Σ_p <a_ps, b_pt>`` of ``[P, S, O]`` by a small product for every p."""
    return jnp.einsum("pso,pto->pst", a, b, precision=_EXACT).sum(0)
