"""Writes operations that are linear in a parameter as matrix products.

Every rule converts its operation ``y = f(x, W)`` to the form ``Y_b = X_b W_b``. Here
``X_b`` has shape ``[P, I]`` (P positions, fan-in I), ``W_b`` has shape ``[I, O]``, and
both share the batch index b. The gradient for a cotangent δ of y is then ``X_bᵀ δ_b``,
block by block. A rule reads static shapes. Two functions compute what it needs from the
values.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.gradients._gramian.stages import View
from mtljax.gradients._primitives import CONVOLUTION, DOT, GATHER, understood
from mtljax.gradients._program import Op, Program, Ref, is_float

Axes: TypeAlias = tuple[int, ...]


class Use(NamedTuple):
    """One recognised operation that reads a parameter."""

    op: Op
    leaf: int
    source: Ref  # the other operand, x
    layout: Any  # equal for uses that read the entries of the leaf in the same order
    batch: int  # length of b
    positions: int  # P
    fan_in: int  # I, of all blocks together
    fan_out: int  # O
    # Maps x to blocks [b, P, I_j] with sum_j I_j = I. For a lookup it returns the row
    # numbers [P], which are negative if nothing was read.
    inputs: Callable[[Array], list[Array]]
    axes: tuple[Axes, Axes, Axes]  # axes of y that are b, P and O
    lookup: bool = False

    def cotangents(self, delta: Array) -> Array:
        """Converts δ of all tasks to the shape [b, P, T, O].

        The argument has the axes of y, and the tasks at :func:`task_axis`.
        """
        tasks = task_axis(delta.ndim)
        batch, positions, outputs = (
            tuple(axis + (axis >= tasks) for axis in axes) for axes in self.axes
        )
        order = (*batch, *positions, tasks, *outputs)
        shape = (self.batch, self.positions, delta.shape[tasks], -1)
        return delta.transpose(order).reshape(shape)


def task_axis(ndim: int) -> int:
    """Returns the axis of the tasks in stacked cotangents.

    The axis is next to the last one. Then ``δ [*positions, T, O]`` of a dense layer is
    a matrix whose rows are positions.
    """
    return max(ndim - 2, 0)


def find_use(op: Op, operand: int, view: View, program: Program) -> Use | None:
    """Applies the rule for an operand that is a parameter; None without a rule."""
    for primitives, rule, keys in _RULES:
        if op.primitive in primitives and understood(op.params, keys):
            return rule(op, operand, view, program)
    return None


def _only_one_parameter(op: Op, operand: int, program: Program) -> bool:
    other = op.ins[1 - operand]
    return other != op.ins[operand] and all(
        is_float(program.avals[ref].dtype) for ref in op.ins
    )


def _dense(op: Op, operand: int, view: View, program: Program) -> Use | None:
    """Rule for ``dot_general``, y[b, n, o] = Σ_i x[b, n, i] W[b, i, o] in any order."""
    if not _only_one_parameter(op, operand, program):
        return None
    contract, batch = op.params["dimension_numbers"]
    shape, x_shape = op.shape(operand), op.shape(1 - operand)
    # Axes are in the order of the parameter, so that equal layouts mean equal entries.
    pairs = sorted(zip(contract[operand], contract[1 - operand], strict=True))
    batches = sorted(zip(batch[operand], batch[1 - operand], strict=True))
    w_in, x_in = (
        (tuple(axis) for axis in zip(*pairs, strict=True)) if pairs else ((), ())
    )
    w_b, x_b = (tuple(a) for a in zip(*batches, strict=True)) if batches else ((), ())
    x_n = tuple(a for a in range(len(x_shape)) if a not in x_in + x_b)
    w_o = tuple(a for a in range(len(shape)) if a not in w_in + w_b)

    def size(axes, of):
        return math.prod(of[a] for a in axes)

    b, n = size(w_b, shape), size(x_n, x_shape)
    i, o = size(w_in, shape), size(w_o, shape)
    # Axes of the result: batch as listed, then those of the left and the right operand.
    listed = [batch[operand].index(a) for a in w_b]
    free = (x_n, w_o) if operand == 1 else (w_o, x_n)
    first = len(w_b)
    left = list(range(first, first + len(free[0])))
    right = list(range(first + len(free[0]), first + len(free[0]) + len(free[1])))
    positions, outputs = (left, right) if operand == 1 else (right, left)

    def inputs(x):
        return [x.transpose(x_b + x_n + x_in).reshape(b, n, i)]

    return Use(
        op=op,
        leaf=view.leaf,
        source=op.ins[1 - operand],
        layout=("dense", view.chain, shape, w_b, w_in),
        batch=b,
        positions=n,
        fan_in=i,
        fan_out=o,
        inputs=inputs,
        axes=(tuple(listed), tuple(positions), tuple(outputs)),
    )


def _conv(op: Op, operand: int, view: View, program: Program) -> Use | None:
    """Rule for convolutions, which are sums of products, one per entry k of the window.

    ``y[n, o] = Σ_k Σ_c x_k[n, c] W[k, c, o]``. The index n is over images and output
    pixels, and x_k is the image shifted by k. The x_k are the blocks.
    """
    p = op.params
    if operand != 1 or not _only_one_parameter(op, operand, program):
        return None
    if p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    x_spec, w_spec, y_spec = p["dimension_numbers"]
    w_shape = op.shape(1)
    window = [w_shape[a] for a in w_spec[2:]]
    channels, features = w_shape[w_spec[1]], w_shape[w_spec[0]]
    y_shape = op.eqn.outvars[0].aval.shape
    spatial = [y_shape[a] for a in y_spec[2:]]
    n = y_shape[y_spec[0]] * math.prod(spatial)

    def inputs(x):
        # Axes [image, *pixels, channel]; holes of a dilated input are also padding.
        x = x.transpose((x_spec[0], *x_spec[2:], x_spec[1]))
        holes = [d - 1 for d in p["lhs_dilation"]]
        edges = [(lo, hi, h) for (lo, hi), h in zip(p["padding"], holes, strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])

        def shifted(offset):
            start = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
            stop = [
                s + (length - 1) * stride + 1
                for s, length, stride in zip(
                    start, spatial, p["window_strides"], strict=True
                )
            ]
            block = jax.lax.slice(
                x,
                (0, *start, 0),
                (x.shape[0], *stop, channels),
                (1, *p["window_strides"], 1),
            )
            return block.reshape(1, n, channels)

        return [shifted(o) for o in itertools.product(*map(range, window))]

    return Use(
        op=op,
        leaf=view.leaf,
        source=op.ins[0],
        layout=("conv", view.chain, w_shape, tuple(w_spec)),
        batch=1,
        positions=n,
        fan_in=math.prod(window) * channels,
        fan_out=features,
        inputs=inputs,
        axes=((), (y_spec[0], *y_spec[2:]), (y_spec[1],)),
    )


def _lookup(op: Op, operand: int, view: View, program: Program) -> Use | None:
    """Rule for ``gather`` of rows, y[n] = W[id[n]], where x is one-hot in the ids."""
    del program
    p = op.params
    numbers, table = p["dimension_numbers"], op.shape(0)
    width = math.prod(table[1:])
    rows_only = (
        operand == 0
        and numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(p["slice_sizes"]) == (1, *table[1:])
    )
    if not rows_only:
        return None
    y_shape = op.eqn.outvars[0].aval.shape
    n = math.prod(op.shape(1)[:-1])
    offset = numbers.offset_dims
    positions = tuple(a for a in range(len(y_shape)) if a not in offset)
    clips = jax.lax.GatherScatterMode.from_any(p["mode"]) is _CLIP

    def inputs(ids):
        ids = ids.reshape(-1)
        if clips:
            return [jnp.clip(ids, 0, table[0] - 1)]
        return [jnp.where((ids < 0) | (ids >= table[0]), -1, ids)]

    return Use(
        op=op,
        leaf=view.leaf,
        source=op.ins[1],
        layout=("lookup", view.chain, table),
        batch=1,
        positions=n,
        fan_in=table[0],
        fan_out=width,
        inputs=inputs,
        axes=((), positions, tuple(offset)),
        lookup=True,
    )


_CLIP = jax.lax.GatherScatterMode.CLIP
_KEPT = ("precision", "preferred_element_type", "dimension_numbers")
_CONVOLVED = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
_CONVOLVED += ("feature_group_count", "batch_group_count")
_GATHERED = ("dimension_numbers", "slice_sizes", "mode", "fill_value")
_GATHERED += ("indices_are_sorted", "unique_indices")
# Each entry is a rule and the parameters of the operation that the rule has read.
_RULES = (
    (DOT, _dense, (*_KEPT, "out_sharding")),
    (
        CONVOLUTION,
        _conv,
        (*_KEPT, *_CONVOLVED),
    ),
    (
        GATHER,
        _lookup,
        _GATHERED,
    ),
)
