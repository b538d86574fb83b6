"""Rewrites a backward pass with simplifications that XLA:CPU lacks.

``jax.vjp`` transposes a program operation by operation. This has three consequences,
which the rewritten pass avoids:

- The cotangent of a mean over positions is equal at all positions, but every product
  before the mean processes the full array. Here a value has size 1 along the axes on
  which it is constant, until an operation needs the full array. The product is computed
  once, and a gradient ``Σ_p x_p δᵀ`` becomes ``(Σ_p x_p) δᵀ``.
- The gradient of a matrix contracts all axes of positions at once. XLA:CPU first
  transposes the cotangents for this. If the axes are joined to one, XLA:CPU reads the
  cotangents in their order.
- ``jax.vjp`` recomputes values that do not depend on the cotangent, such as flipped
  kernels, in every pass. Here they are computed once for all passes.

Convolutions and max pooling also have other forms (``cpu``). The result equals that of
``jax.vjp`` up to rounding.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import stack
from mtljax.gradients._primitives import (
    BROADCAST,
    CONVOLUTION,
    DOT,
    ELEMENTWISE,
    REDUCE_SUM,
    REMAT,
    SQUEEZE,
    TRANSPOSE,
    understood,
)
from mtljax.gradients._program import (
    Flat,
    Op,
    Ref,
    apply,
    bind,
    flatten,
    needed,
    run,
    scope,
)
from mtljax.gradients._rewrite.cpu import Rewrite, rewrite
from mtljax.gradients.passes import Body

Shape = tuple[int, ...]


class Constant(NamedTuple):
    """A value with size 1 along axes on which it is known to be constant."""

    array: Array
    shape: Shape  # the full shape

    @property
    def constant(self) -> list[int]:
        """The axes on which the value is constant."""
        pairs = enumerate(zip(self.array.shape, self.shape, strict=True))
        return [axis for axis, (here, full) in pairs if here != full]


class Rewritten(NamedTuple):
    """Function from cotangents to gradients, traced once and callable repeatedly."""

    program: Flat
    results: Any  # a tree of the values of the program that are results
    known: dict[Any, Any]  # values that are the same in every run
    rewrites: dict[tuple[Ref, ...], Rewrite]  # other forms, by their results

    @property
    def body(self) -> Body:
        """Description of one run."""
        ops, avals = self.program.ops, self.program.avals
        sizes = [math.prod(avals[ref].shape) for op in ops for ref in op.outs]
        convolves = any(op.primitive in CONVOLUTION for op in ops)
        return Body(max(sizes, default=1), convolves, len(ops))

    def __call__(
        self, cotangent: Any, part: Callable[[Any], Any] = lambda results: results
    ) -> Any:
        """Returns the gradients, or a part of their tree without the unneeded work."""
        program, results = self.program, part(self.results)
        env: dict[Any, Any] = {**self.known}
        env |= dict(zip(program.inputs, jax.tree.leaves(cotangent), strict=True))
        for op in needed(program.ops, jax.tree.leaves(results)):
            self._run(op, env)
        return jax.tree.map(lambda ref: _full(env, ref, program), results)

    def _run(self, op: Op, env: dict[Any, Any]) -> None:
        """Runs one operation; results have size 1 along constant axes if possible."""
        program, other = self.program, self.rewrites.get(op.outs)
        if other:
            with scope(op):
                values = [
                    env[op.outs, place]
                    if (op.outs, place) in env
                    else other.prepare(op, place, jnp.asarray(_full(env, ref, program)))
                    for place, ref in enumerate(op.ins)
                ]
                env[op.outs[0]] = other.finish(op, values)
            return
        rule = _rule(op)
        void = any(program.avals[ref].dtype == jax.dtypes.float0 for ref in op.ins)
        if rule and not void and not _placed(op):
            values = [
                Constant(jnp.asarray(env[ref]), program.avals[ref].shape)
                for ref in op.ins
            ]
            with scope(op):
                out = rule(op, values)
            if out is not None:
                env[op.outs[0]] = out
                return
        full = [_full(env, ref, program) for ref in op.ins]
        env.update(zip(op.outs, apply(op, full), strict=True))


def rewritten(pull: Callable[[Any], Any], cotangent: Any, runs: int = 1) -> Rewritten:
    """Rewrites ``pull``, the function that ``jax.vjp`` returns.

    Args:
      pull: A linear function of a tree with the structure of ``cotangent``.
      cotangent: Arrays, or objects with their shapes and dtypes.
      runs: An estimate of the number of passes.
    """
    closed, shapes = jax.make_jaxpr(pull, return_shape=True)(cotangent)
    # If recomputation were inlined, it would be shared with the forward pass.
    program = flatten(closed, keep=REMAT)
    results = jax.tree.unflatten(jax.tree.structure(shapes), program.outputs)
    known: dict[Any, Any] = {**program.constants}
    ops, rewrites = [], {}
    for op in needed(program.ops, program.outputs):
        if _is_known(op, known, program):
            run(op, known)
            continue
        ops.append(op)
        here = [ref in known for ref in op.ins]
        other = None if _placed(op) else rewrite(op, here, runs)
        if other is None:
            continue
        rewrites[op.outs] = other
        for place, ref in enumerate(op.ins):
            if here[place]:
                with scope(op):
                    value = jnp.asarray(known[ref])
                    known[op.outs, place] = other.prepare(op, place, value)
    program = program._replace(ops=ops)
    return Rewritten(program, results, known, rewrites)


def _is_known(op: Op, known: dict[Any, Any], program: Flat) -> bool:
    """Whether to run an operation once for all passes, without storing more entries.

    XLA keeps most of these operations inside a loop over the passes. For example, the
    kernels of convolutions would be flipped in each pass.
    """

    def entries(refs):
        return sum(math.prod(program.avals[ref].shape) for ref in refs)

    once = not op.eqn.effects and all(ref in known for ref in op.ins)
    return once and entries(op.outs) <= entries(op.ins)


def _placed(op: Op) -> bool:
    """Whether the operation specifies the sharding of its result."""
    sharding = op.params.get("sharding", op.params.get("out_sharding"))
    mesh = getattr(sharding, "mesh", None)
    return sharding is not None and not getattr(mesh, "empty", False)


def _full(env: dict[Any, Any], ref: Ref, program: Flat) -> Any:
    value, shape = env[ref], program.avals[ref].shape
    return value if jnp.shape(value) == shape else jnp.broadcast_to(value, shape)


def _elementwise(op: Op, values: list[Constant]) -> Array | None:
    """Computes a result that is constant on the axes on which all operands are."""
    if len(op.outs) > 1:
        return None
    arrays = [value.array for value in values]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays if x.ndim))
    return bind(op, [jnp.broadcast_to(x, shape) if x.ndim else x for x in arrays])[0]


def _broadcast(op: Op, values: list[Constant]) -> Array | None:
    """Inserts axes of size 1 without repeating the value."""
    if len(values) > 1:  # an axis size is known at run time only
        return None
    array, axes = values[0].array, op.params["broadcast_dimensions"]
    sizes = [1] * len(op.params["shape"])
    for axis, size in zip(axes, array.shape, strict=True):
        sizes[axis] = size
    return array.reshape(sizes)


def _transpose(op: Op, values: list[Constant]) -> Array:
    return values[0].array.transpose(op.params["permutation"])


def _squeeze(op: Op, values: list[Constant]) -> Array:
    return values[0].array.squeeze(op.params["dimensions"])


def _reduce_sum(op: Op, values: list[Constant]) -> Array:
    """Replaces a sum of equal entries by a multiple."""
    (value,), axes = values, op.params["axes"]
    times = math.prod(value.shape[axis] for axis in value.constant if axis in axes)
    return _times(bind(op, [value.array])[0], times)


def _times(array: Array, number: int) -> Array:
    return array if number == 1 else array * jnp.asarray(number, array.dtype)


def _dot_general(op: Op, values: list[Constant]) -> Array:
    """Takes constant operands out of the sum, and joins contracted adjacent axes."""
    arrays, params = [value.array for value in values], op.params
    contract, batches = params["dimension_numbers"]
    dtype, times = op.eqn.outvars[0].aval.dtype, 1
    if any(
        axis in value.constant
        for axes, value in zip(contract, values, strict=True)
        for axis in axes
    ) and jnp.issubdtype(dtype, jnp.inexact):
        # The sum over positions may be out of range in half precision.
        wide = stack.wide_dtype(dtype)
        arrays = [x.astype(wide) for x in arrays]
        params = {**params, "preferred_element_type": wide}
    for pair in zip(*contract, strict=True):
        sides = zip(pair, values, strict=True)
        constant = [axis in value.constant for axis, value in sides]
        if all(constant):
            times *= values[0].shape[pair[0]]
        elif any(constant):
            other = constant.index(False)
            arrays[other] = arrays[other].sum(pair[other], keepdims=True)
    for pair in zip(*batches, strict=True):
        size = max(x.shape[axis] for x, axis in zip(arrays, pair, strict=True))
        for side, axis in enumerate(pair):
            sizes = list(arrays[side].shape)
            sizes[axis] = size
            arrays[side] = jnp.broadcast_to(arrays[side], sizes)
    if len(contract[0]) > 1 and not batches[0]:
        arrays, axes = _joined(arrays, contract)
        params = {**params, "dimension_numbers": (axes, batches)}
    return _times(bind(op, arrays, params)[0], times).astype(dtype)


def _joined(
    arrays: list[Array], contract: tuple[Shape, Shape]
) -> tuple[list[Array], tuple[Shape, Shape]]:
    """Joins the contracted axes of both operands, if they are adjacent in both."""
    pairs = sorted(zip(*contract, strict=True))
    sides = [list(axes) for axes in zip(*pairs, strict=True)]
    if any(axes != list(range(axes[0], axes[0] + len(axes))) for axes in sides):
        return arrays, contract
    made = [
        x.reshape(*x.shape[: axes[0]], -1, *x.shape[axes[-1] + 1 :])
        for x, axes in zip(arrays, sides, strict=True)
    ]
    first, second = ((axes[0],) for axes in sides)
    return made, (first, second)


# Each entry is a rule and the parameters of the operation that the rule has read.
_RULES: tuple[tuple[frozenset[Any], Callable[..., Array | None], tuple[str, ...]], ...]
_RULES = (
    (BROADCAST, _broadcast, ("shape", "broadcast_dimensions")),
    (TRANSPOSE, _transpose, ("permutation",)),
    (SQUEEZE, _squeeze, ("dimensions",)),
    (REDUCE_SUM, _reduce_sum, ("axes",)),
    (DOT, _dot_general, ("dimension_numbers", "precision", "preferred_element_type")),
)


def _rule(op: Op) -> Callable[..., Array | None] | None:
    if op.primitive in ELEMENTWISE:
        return _elementwise
    for primitives, rule, keys in _RULES:
        if op.primitive in primitives:
            return rule if understood(op.params, keys) else None
    return None
