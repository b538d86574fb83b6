"""Operations of backward passes in forms that XLA:CPU runs fast.

- Convolutions with axes in the order images, pixels, channels. XLA:CPU sorts other axes
  at the top level of a program only. In loops it uses code that is many times slower,
  especially for gradients of kernels.
- The gradient of a kernel that many passes need for the same images. The patches of the
  images are laid out once, and each pass is a product of matrices.
- Max pooling of adjacent windows. XLA:CPU scatters entry by entry. Here the forward
  search stores the index of the maximum in its window once for all passes, and each
  pass compares these indices. ``benchmarks.forms`` measures the times.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.gradients._primitives import (
    CONVOLUTION,
    GREATER_OR_EQUAL,
    MAX_POOL_GRADIENT,
)
from mtljax.gradients._program import Op, bind

# Maximum number of entries of a pooling window that is rewritten.
_WINDOW = 25
# Minimum number of passes for laying out the patches of images, the maximum number of
# entries of the patches per pass and in total, and the maximum number of patches per
# image.
_REUSED = 4
_PATCHES = 1 << 19
_ALL_PATCHES = 1 << 23
_PLACES = 128


class Rewrite(NamedTuple):
    """Another form of an operation, in two parts."""

    prepare: Callable[[Op, int, Array], Array]  # converts one operand
    finish: Callable[[Op, Sequence[Array]], Array]  # computes the result from these


def rewrite(op: Op, known: Sequence[bool], runs: int) -> Rewrite | None:
    """Returns another form of an operation, or None.

    Args:
      op: The operation.
      known: Whether each operand is the same in all runs.
      runs: Expected number of runs, used to decide which rewrites pay off.
    """
    if op.primitive in CONVOLUTION and op.params["batch_group_count"] == 1:
        if known[0] and not known[1] and runs >= _REUSED and _is_small(op, runs):
            return Rewrite(_lay_out, _multiply)
        return Rewrite(_sort_axes, _convolve)
    if op.primitive in MAX_POOL_GRADIENT and _is_max_pooling(op):
        return Rewrite(_find_maxima, _spread)
    return None


def _sort_axes(op: Op, operand: int, value: Array) -> Array:
    of_x, of_kernel, _ = op.params["dimension_numbers"]
    if operand == 0:
        return value.transpose(of_x[0], *of_x[2:], of_x[1])
    return value.transpose(*of_kernel[2:], of_kernel[1], of_kernel[0])


def _convolve(op: Op, values: Sequence[Array]) -> Array:
    channels = values[0].ndim - 1
    pixels = tuple(range(1, channels))
    usual = (0, channels, *pixels)
    window = tuple(range(channels - 1))
    numbers = jax.lax.ConvDimensionNumbers(
        usual, (channels, channels - 1, *window), usual
    )
    (out,) = bind(op, values, {**op.params, "dimension_numbers": numbers})
    return _placed_back(op, out)


def _placed_back(op: Op, out: Array) -> Array:
    """Returns a result ``[image, *pixels, channel]`` in the requested order of axes."""
    spec = op.params["dimension_numbers"].out_spec
    places = (spec[0], *spec[2:], spec[1])
    return out.transpose([places.index(axis) for axis in range(out.ndim)])


def _is_small(op: Op, runs: int) -> bool:
    """Whether the result has few pixels, as the gradient of a kernel."""
    of_x, of_kernel, of_out = op.params["dimension_numbers"]
    places = math.prod(op.eqn.outvars[0].aval.shape[axis] for axis in of_out[2:])
    entries = op.shape(0)[of_x[0]] * math.prod(op.shape(1)) * places
    entries //= op.shape(1)[of_kernel[0]]
    few = places <= _PLACES and entries <= min(runs * _PATCHES, _ALL_PATCHES)
    return few and op.params["feature_group_count"] == 1


def _lay_out(op: Op, operand: int, value: Array) -> Array:
    """Lays out the images as ``[image, pixel of the result, window and channel]``."""
    p = op.params
    value = _sort_axes(op, operand, value)
    if operand == 1:
        return value.reshape(-1, value.shape[-1])
    edges = zip(p["padding"], p["lhs_dilation"], strict=True)
    inner = [(low, high, dilation - 1) for (low, high), dilation in edges]
    zero = jnp.zeros((), value.dtype)
    value = jax.lax.pad(value, zero, [(0, 0, 0), *inner, (0, 0, 0)])
    window = [op.shape(1)[axis] for axis in p["dimension_numbers"].rhs_spec[2:]]
    steps = (1, *p["rhs_dilation"], 1)
    patches = []
    for place in itertools.product(*map(range, _pixels(op))):
        start = [n * step for n, step in zip(place, p["window_strides"], strict=True)]
        along = zip(start, window, p["rhs_dilation"], strict=True)
        stop = [first + (size - 1) * step + 1 for first, size, step in along]
        first, last = (0, *start, 0), (len(value), *stop, value.shape[-1])
        patch = jax.lax.slice(value, first, last, steps)
        patches.append(patch.reshape(len(value), -1))
    return jnp.stack(patches, 1)


def _pixels(op: Op) -> list[int]:
    spec = op.params["dimension_numbers"].out_spec
    return [op.eqn.outvars[0].aval.shape[axis] for axis in spec[2:]]


def _multiply(op: Op, values: Sequence[Array]) -> Array:
    patches, kernel = values
    out = jax.lax.dot_general(
        patches,
        kernel,
        (((2,), (0,)), ((), ())),
        precision=op.params["precision"],
        preferred_element_type=op.params["preferred_element_type"],
    )
    return _placed_back(op, out.reshape(len(out), *_pixels(op), -1))


def _is_max_pooling(op: Op) -> bool:
    """Whether ``op`` is the gradient of max pooling with disjoint, unpadded windows."""
    p = op.params
    apart = p["window_dimensions"] == p["window_strides"]
    inside = not any(map(any, p["padding"]))
    small = math.prod(p["window_dimensions"]) <= _WINDOW
    return apart and inside and small and p["select_prim"] in GREATER_OR_EQUAL


def _find_maxima(op: Op, operand: int, value: Array) -> Array:
    """Returns the index of the first maximum per window; the cotangent is unchanged."""
    if operand == 0:
        return value
    window = op.params["window_dimensions"]

    def entries(offset):
        along = zip(offset, op.shape(0), window, strict=True)
        stop = [start + (n - 1) * step + 1 for start, n, step in along]
        return jax.lax.slice(value, offset, stop, window)

    first, *others = itertools.product(*map(range, window))
    best = entries(first)
    found = jnp.zeros(best.shape, jnp.int8)
    for number, offset in enumerate(others, 1):
        entry = entries(offset)
        keep = best >= entry
        best = jnp.where(keep, best, entry)
        found = jnp.where(keep, found, jnp.int8(number))
    return found


def _spread(op: Op, values: Sequence[Array]) -> Array:
    """Places the cotangent of every window at its maximum."""
    cotangent, found = values
    window, shape = op.params["window_dimensions"], op.shape(1)
    beside = [2 * axis + 1 for axis in range(len(shape))]
    numbers = jnp.arange(math.prod(window), dtype=found.dtype)
    numbers = numbers.reshape([n for size in window for n in (1, size)])
    spread = jnp.where(
        jnp.expand_dims(found, beside) == numbers, jnp.expand_dims(cotangent, beside), 0
    )
    pairs = zip(op.shape(0), window, strict=True)
    spread = spread.reshape([n * size for n, size in pairs])
    rest = zip(shape, spread.shape, strict=True)
    return jnp.pad(spread, [(0, size - here) for size, here in rest])
