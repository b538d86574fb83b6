"""Operations of backward passes in forms that XLA:CPU has fast code for.

- Convolutions whose axes are in the order images, pixels, channels. XLA:CPU sorts the
  axes of others at the top level of a program only; in loops it falls back to code that
  takes 5 (for cotangents of inputs) to 50 times (of kernels) as long.
- The gradient of a kernel, where many passes need it for the same images: the patches
  of these are laid out once, and a pass is a product of matrices, twice as fast.
- Max pooling. XLA:CPU searches every window again and then scatters entry by entry.
  Here the search leaves the number of the maximum in its window, once for all passes,
  and a pass compares these numbers: 10 to 20 times faster.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.gradients._engine._passes import CONVOLUTION
from mtljax.gradients._engine._program import Op, bind

# Entries of a pooling window up to which it is taken apart.
_WINDOW = 25
# Passes from which on it pays to lay the patches of images out side by side; the most
# entries that may be for a pass, and for all; and the most patches of an image.
_REUSED = 4
_PATCHES = 1 << 19
_ALL_PATCHES = 1 << 23
_PLACES = 128


class Rewrite(NamedTuple):
    """Another form of an operation, in two parts."""

    prepare: Callable[[Op, int, Array], Array]  # an operand, whatever the others are
    finish: Callable[[Op, Sequence[Array]], Array]  # the result of prepared operands


def rewrite(op: Op, known: Sequence[bool], runs: int) -> Rewrite | None:
    """The other form, where there is one.

    Args:
      op: The operation.
      known: Whether an operand is the same in all runs.
      runs: How often it runs, as far as one knows.
    """
    if jax.default_backend() != "cpu":
        return None
    if op.name == CONVOLUTION and op.params["batch_group_count"] == 1:
        if known[0] and not known[1] and runs >= _REUSED and _is_small(op, runs):
            return Rewrite(_lay_out, _multiply)
        return Rewrite(_sort_axes, _convolve)
    if op.name == "select_and_scatter_add" and _is_max_pooling(op):
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
    """A result in the order images, pixels, channels with its axes as asked for."""
    spec = op.params["dimension_numbers"].out_spec
    places = (spec[0], *spec[2:], spec[1])
    return out.transpose([places.index(axis) for axis in range(out.ndim)])


def _is_small(op: Op, runs: int) -> bool:
    """Whether the result has few pixels, as the gradient of a kernel has."""
    of_x, of_kernel, of_out = op.params["dimension_numbers"]
    places = math.prod(op.eqn.outvars[0].aval.shape[axis] for axis in of_out[2:])
    entries = op.shape(0)[of_x[0]] * math.prod(op.shape(1)) * places
    entries //= op.shape(1)[of_kernel[0]]
    few = places <= _PLACES and entries <= min(runs * _PATCHES, _ALL_PATCHES)
    return few and op.params["feature_group_count"] == 1


def _lay_out(op: Op, operand: int, value: Array) -> Array:
    """The images as ``[image, pixel of the result, window and channel]``."""
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


class _Windows(NamedTuple):
    """Where the windows of a pooling lie, axis by axis."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    number: tuple[int, ...]

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Of the entries of a window, in the order of the search."""
        return list(itertools.product(*map(range, self.sizes)))

    def entries(self, x: Array, offset: tuple[int, ...]) -> Array:
        """One entry of every window of a padded array."""
        along = list(zip(offset, self.number, self.strides, strict=True))
        stop = [start + (n - 1) * step + 1 for start, n, step in along]
        return jax.lax.slice(x, offset, stop, self.strides)


def _windows(op: Op) -> _Windows:
    p = op.params
    sizes, strides = p["window_dimensions"], p["window_strides"]
    padding = tuple(tuple(pair) for pair in p["padding"])
    return _Windows(tuple(sizes), tuple(strides), padding, op.shape(0))


def _is_max_pooling(op: Op) -> bool:
    small = math.prod(op.params["window_dimensions"]) <= _WINDOW
    inside = all(low >= 0 and high >= 0 for low, high in op.params["padding"])
    return small and inside and op.params["select_prim"].name == "ge"


def _find_maxima(op: Op, operand: int, value: Array) -> Array:
    """The number of each window's first maximum; the cotangent stays as it is."""
    if operand == 0:
        return value
    windows = _windows(op)
    first, *others = windows.offsets
    lowest = jnp.array(-jnp.inf, value.dtype)
    edges = [(low, high, 0) for low, high in windows.padding]
    value = jax.lax.pad(value, lowest, edges)
    best = windows.entries(value, first)
    found = jnp.zeros(best.shape, jnp.int8)
    for number, offset in enumerate(others, 1):
        entry = windows.entries(value, offset)
        keep = best >= entry
        best = jnp.where(keep, best, entry)
        found = jnp.where(keep, found, jnp.int8(number))
    return found


def _spread(op: Op, values: Sequence[Array]) -> Array:
    """Every window's cotangent, added to where its maximum is."""
    windows, (cotangent, found) = _windows(op), values
    shape = op.shape(1)
    if windows.sizes == windows.strides and not any(map(any, windows.padding)):
        return _spread_apart(windows, cotangent, found, shape)
    total = jnp.zeros(shape, cotangent.dtype)
    zero = jnp.zeros((), cotangent.dtype)
    for number, offset in enumerate(windows.offsets):
        along = zip(
            offset, windows.padding, shape, windows.number, windows.strides, strict=True
        )
        edges = [
            (start - low, size - (start - low) - (n - 1) * step - 1, step - 1)
            for start, (low, _), size, n, step in along
        ]
        own = jnp.where(found == number, cotangent, zero)
        total = total + jax.lax.pad(own, zero, edges)
    return total


def _spread_apart(
    windows: _Windows, cotangent: Array, found: Array, shape: tuple[int, ...]
) -> Array:
    """The same where no entry is in two windows: an axis for each axis of a window."""
    beside = [2 * axis + 1 for axis in range(len(shape))]
    numbers = jnp.arange(math.prod(windows.sizes), dtype=found.dtype)
    numbers = numbers.reshape([n for size in windows.sizes for n in (1, size)])
    spread = jnp.where(
        jnp.expand_dims(found, beside) == numbers, jnp.expand_dims(cotangent, beside), 0
    )
    pairs = zip(windows.number, windows.sizes, strict=True)
    spread = spread.reshape([n * size for n, size in pairs])
    rest = zip(shape, spread.shape, strict=True)
    return jnp.pad(spread, [(0, size - here) for size, here in rest])
