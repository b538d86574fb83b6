"""Runs a function of the cotangents of one task on those of all tasks.

The result is that of ``jax.vmap``, but the axis of the tasks keeps its place if an
operation permits it. ``vmap`` moves the axis to the front at the first elementwise
operation with a value that all tasks share. Every move copies the cotangents of all
tasks.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from mtljax.gradients._primitives import (
    DOT,
    ELEMENTWISE,
    RESHAPE,
    TRANSPOSE,
)
from mtljax.gradients._program import Op, apply, flatten, needed


class Value(NamedTuple):
    """A value and the axis of its tasks, which is None if they share the value."""

    array: Any
    axis: int | None


def batch(function: Callable[[Any], Any], rows: Any, in_axes: Any, out_axes: Any):
    """Computes ``jax.vmap(function, (in_axes,), out_axes)(rows)`` with trees of axes.

    The function is inlined, so it should be a function that is called once.
    """
    leaves, axes = jax.tree.leaves(rows), jax.tree.leaves(in_axes)
    num_tasks = leaves[0].shape[axes[0]]
    one = jax.tree.map(
        lambda x, axis: jax.ShapeDtypeStruct(
            x.shape[:axis] + x.shape[axis + 1 :], x.dtype
        ),
        rows,
        in_axes,
    )
    closed, shape = jax.make_jaxpr(function, return_shape=True)(one)
    program = flatten(closed)
    # A pullback also returns gradients that are not used, so skip their operations.
    ops = needed(program.ops, program.outputs)
    env = {ref: Value(x, None) for ref, x in program.constants.items()}
    env |= zip(program.inputs, map(Value, leaves, axes), strict=True)
    for op in ops:
        env |= zip(op.outs, _run(op, [env[ref] for ref in op.ins]), strict=True)
    found = [
        _moved(env[ref], axis, num_tasks)
        for ref, axis in zip(program.outputs, jax.tree.leaves(out_axes), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _run(op: Op, values: list[Value]) -> list[Value]:
    """Runs one operation on values with an axis of tasks."""
    axes = [value.axis for value in values]
    batched = [i for i, axis in enumerate(axes) if axis is not None]
    if not batched:
        return [Value(x, None) for x in apply(op, [value.array for value in values])]
    axis = axes[batched[0]]
    assert axis is not None
    if op.primitive in ELEMENTWISE and len(op.outs) == 1 and _same_shapes(op, values):
        shape = values[batched[0]].array.shape
        dtypes = [var.aval.dtype for var in op.eqn.invars]
        arrays = [
            _beside(value, axis, shape, dtype)
            for value, dtype in zip(values, dtypes, strict=True)
        ]
        return [Value(apply(op, arrays)[0], axis)]
    if op.primitive in DOT and len(batched) == 1:
        return [_dot(op, values, batched[0])]
    if op.primitive in TRANSPOSE:
        return [_transpose(op, values[0])]
    if op.primitive in RESHAPE and op.params.get("dimensions") is None:
        place = _kept_apart(op, axis)
        if place is not None:
            return [_reshape(op, values[0], place)]
    out = jax.vmap(lambda *xs: tuple(apply(op, xs)), axes)(*(v.array for v in values))
    return [Value(x, 0) for x in out]


def _same_shapes(op: Op, values: list[Value]) -> bool:
    """Whether every operand is a shared scalar or has the shape of the result."""
    shape = op.eqn.outvars[0].aval.shape
    return all(
        op.shape(i) == shape or (op.shape(i) == () and value.axis is None)
        for i, value in enumerate(values)
    )


def _beside(value: Value, axis: int, shape: tuple[int, ...], dtype: Any) -> ArrayLike:
    """Returns an operand of an elementwise operation with its tasks along an axis."""
    if value.axis is not None:
        return jnp.moveaxis(value.array, value.axis, axis)
    if jnp.ndim(value.array) == 0:
        if len(shape) > 1:
            return value.array
        # The operation is one of scalars. Its operands may have to be of equal shape.
        return jnp.full(shape, value.array, dtype)
    return jnp.broadcast_to(jnp.expand_dims(value.array, axis), shape)


def _dot(op: Op, values: list[Value], which: int) -> Value:
    """Runs a product with one operand that differs between tasks, as one more axis."""
    axis = values[which].axis
    assert axis is not None
    contract, batches = op.params["dimension_numbers"]

    def shifted(axes):
        return tuple(a + (a >= axis) for a in axes)

    numbers = [list(contract), list(batches)]
    for pair in numbers:
        pair[which] = shifted(pair[which])
    params = {**op.params, "dimension_numbers": tuple(map(tuple, numbers))}
    (out,) = apply(op, [value.array for value in values], params)
    taken = {*numbers[0][which], *numbers[1][which]}
    place = len(batches[0]) + sum(a not in taken for a in range(axis))
    if which == 1:
        place += len(op.shape(0)) - len(contract[0]) - len(batches[0])
    return Value(out, place)


def _transpose(op: Op, value: Value) -> Value:
    """Transposes the other axes; the tasks stay in front of the same axis."""
    axis = value.axis
    assert axis is not None
    order = list(op.params["permutation"])
    place = order.index(axis) if axis < len(order) else len(order)
    order = [a + (a >= axis) for a in order]
    order.insert(place, axis)
    return Value(value.array.transpose(order), place)


def _kept_apart(op: Op, axis: int) -> int | None:
    """Returns the axis of the tasks after a reshape; None if it would mix axes."""
    before = math.prod(op.shape(0)[:axis])
    sizes = op.params["new_sizes"]
    places = [i for i in range(len(sizes) + 1) if math.prod(sizes[:i]) == before]
    return max(places, default=None)


def _reshape(op: Op, value: Value, place: int) -> Value:
    sizes = list(op.params["new_sizes"])
    sizes.insert(place, value.array.shape[value.axis])
    return Value(value.array.reshape(sizes), place)


def _moved(value: Value, axis: int, num_tasks: int) -> Array:
    """Returns a result with its tasks along an axis."""
    if value.axis is not None:
        return jnp.moveaxis(value.array, value.axis, axis)
    wide = jnp.expand_dims(value.array, axis)
    return jnp.broadcast_to(
        wide, (*wide.shape[:axis], num_tasks, *wide.shape[axis + 1 :])
    )
