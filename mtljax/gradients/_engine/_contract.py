"""Inner products of weight gradients, from the inputs and cotangents of a product.

All functions take two sides (of one batch, or of two) and return ``[S, S']``. A side is
the inputs ``X [b, P, I]``, in blocks along I, and cotangents ``δ [S, b, P, O]``; the
gradients are ``g_s = Xᵀ δ_s`` for every b.
"""

import functools
import operator
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

_EXACT = "highest"
# Entries that an intermediate result may have, so that it is not written to memory.
_LIVE = 1 << 19
# Columns in a part, for products that are worth a call.
_FEWEST = 16


class Side(NamedTuple):
    """What the gradients of one leaf are made of."""

    blocks: list[Array]
    delta: Array


def wide(x: Array) -> Array:
    """The dtype in which inner products are accumulated."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def inner(left: Side, right: Side) -> Array:
    """``<g_s, g'_t> = Σ_b <δ_s, (X X'ᵀ) δ'_t>``: no gradient is formed.

    Costs ``P P' (I + S' O)`` multiplications, instead of the ``S P I O`` of forming.
    """

    def one(x, delta, y, delta2):
        between = jnp.matmul(x, y.T, precision=_EXACT)

        def some(delta, delta2):
            moved = jnp.matmul(between, _rows_first(delta2), precision=_EXACT)
            return _products(delta, _tasks_first(moved, len(delta2)))

        # Some columns o at a time, so that every cotangent is read once.
        size = max(_LIVE // delta[..., 0].size, _FEWEST)
        return _in_parts(some, size, delta, delta2, axis=2)

    x, y = (wide(jnp.concatenate(side.blocks, axis=-1)) for side in (left, right))
    return _over_batch(one, x, wide(left.delta), y, wide(right.delta))


def formed(left: Side, right: Side) -> Array:
    """``Σ_j <X_jᵀ δ_s, X'_jᵀ δ'_t>``: the gradients, some of their rows j at a time."""

    def one(x, delta, y, delta2):
        a, b = _rows_first(delta), _rows_first(delta2)

        def some(x, y):
            g = h = _tasks_first(jnp.matmul(x, a, precision=_EXACT), len(delta))
            if left is not right:
                h = _tasks_first(jnp.matmul(y, b, precision=_EXACT), len(delta2))
            return _products(g, h)

        size = max(_LIVE // delta[:, 0].size, 1)
        return _in_parts(some, size, x.T, y.T)

    return _total(
        _over_batch(one, wide(x), wide(left.delta), wide(y), wide(right.delta))
        for x, y in zip(left.blocks, right.blocks, strict=True)
    )


def looked_up(left: Side, right: Side) -> Array:
    """``Σ_v <Σ_{n: id_n = v} δ_s[n], Σ_{m: id'_m = v} δ'_t[m]>``, for a table.

    Of the rows of a table only those that were read have a gradient. They are numbered
    anew, so that T tables of as many rows as were read take the place of T whole ones.
    """
    (x,), (y,) = left.blocks, right.blocks
    ids = x if x is y else jnp.concatenate([x, y])
    slots = jnp.unique(ids, return_inverse=True, size=ids.size)[1].reshape(-1)

    def rows(ids, slots, delta):
        delta = jnp.where((ids >= 0)[None, :, None], wide(delta[:, 0]), 0)
        zeros = jnp.zeros((delta.shape[0], num_slots, delta.shape[2]), delta.dtype)
        return zeros.at[:, slots].add(delta)

    num_slots = slots.size
    a = rows(x, slots[: x.size], left.delta)
    return _products(a, a if x is y else rows(y, slots[x.size :], right.delta))


def _over_batch(function, x: Array, delta: Array, y: Array, delta2: Array) -> Array:
    """Sum over b of a function of ``X_b, δ_b`` and those of the other side."""
    if len(x) == 1:  # no batch axis for the compiler to stumble over
        return function(x[0], delta[:, 0], y[0], delta2[:, 0])
    return jax.vmap(function, (0, 1, 0, 1))(x, delta, y, delta2).sum(0)


def _total(parts: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, parts)


def _in_parts(function, size: int, *arrays: Array, axis: int = 0) -> Array:
    """Sum of a function of parts of arrays along an axis, of about ``size``."""
    length = arrays[0].shape[axis]
    count = max(round(length / size), 1)
    size = -(-length // count)

    def part(start, size=size):
        # A slice of the whole array; one reshaped into parts would be another copy.
        return function(
            *(jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x in arrays)
        )

    if count == 1:
        return function(*arrays)
    whole = length // size * size
    total = jax.lax.map(part, jnp.arange(0, whole, size)).sum(0)
    return total if whole == length else total + part(whole, length - whole)


# One large product of two matrices is what every backend runs best, so the tasks join
# the columns; the inner axis stays where it is, which makes the copies cheap.
def _rows_first(delta: Array) -> Array:
    """``[S, P, O]`` as a matrix ``[P, S O]``."""
    return delta.transpose(1, 0, 2).reshape(delta.shape[1], -1)


def _tasks_first(matrix: Array, num_tasks: int) -> Array:
    """The inverse: ``[I, S O]`` as ``[S, I, O]``."""
    return matrix.reshape(len(matrix), num_tasks, -1).transpose(1, 0, 2)


def _products(a: Array, b: Array) -> Array:
    """``<a_s, b_t>``."""
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    return jnp.matmul(a, b.T, precision=_EXACT)
