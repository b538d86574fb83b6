"""A backward pass, rewritten where XLA leaves it as it is.

``jax.vjp`` transposes a program operation by operation. Three things follow:

- The cotangent of a mean over positions is the same at all of them, and is yet passed
  on in full, through every product before the mean. Here a value has size 1 along the
  axes on which it is constant, until an operation needs all of it: the product is made
  once, and a gradient ``Σ_p x_p δᵀ`` is ``(Σ_p x_p) δᵀ``.
- The gradient of a matrix contracts all axes of positions at once, for which XLA:CPU
  first transposes the cotangents. Joined to one axis, they are read as they lie.
- What does not depend on the cotangent, such as a kernel turned round, is computed in
  every pass. Here it is computed once for all.

On a CPU, convolutions and max pooling also take other forms (``_cpu``), and a cotangent
that is a result and goes on through a product is made once (``_settle``).

The result is that of ``jax.vjp`` up to rounding.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax.gradients._engine._cpu import Rewrite, rewrite
from mtljax.gradients._engine._passes import CONVOLUTION, Body
from mtljax.gradients._engine._program import (
    Flat,
    Op,
    Ref,
    apply,
    bind,
    flatten,
    is_float,
    needed,
    run,
    scope,
)
from mtljax.gradients._engine._settle import settle
from mtljax.gradients._engine._stages import ELEMENTWISE

Shape = tuple[int, ...]

_RESHAPES = {"reshape", "transpose", "squeeze", "expand_dims"}


class Thin(NamedTuple):
    """A value with size 1 along axes on which it is known to be constant."""

    array: Array
    shape: Shape  # with all its entries

    @property
    def constant(self) -> list[int]:
        """The axes."""
        pairs = enumerate(zip(self.array.shape, self.shape, strict=True))
        return [axis for axis, (here, full) in pairs if here != full]


class Sweep(NamedTuple):
    """What maps cotangents to gradients, traced once and run any number of times."""

    program: Flat
    results: Any  # a tree of the values of the program that are results
    known: dict[Any, Any]  # values that are the same in every run
    rewrites: dict[tuple[Ref, ...], Rewrite]  # other forms, by what they give
    settled: set[Ref]  # values that are to be in memory, once

    @property
    def body(self) -> Body:
        """What a run consists of."""
        ops, avals = self.program.ops, self.program.avals
        sizes = [math.prod(avals[ref].shape) for op in ops for ref in op.outs]
        convolves = any(op.name == CONVOLUTION for op in ops)
        return Body(max(sizes, default=1), convolves, len(ops))

    def __call__(
        self, cotangent: Any, part: Callable[[Any], Any] = lambda results: results
    ) -> Any:
        """The gradients, or a part of their tree; what it does not need is not run."""
        program, results = self.program, part(self.results)
        env: dict[Any, Any] = {**self.known}
        env |= dict(zip(program.inputs, jax.tree.leaves(cotangent), strict=True))
        self._settle(program.inputs, env)
        for op in needed(program.ops, jax.tree.leaves(results)):
            self._run(op, env)
            self._settle(op.outs, env)
        return jax.tree.map(lambda ref: _full(env, ref, program), results)

    def _settle(self, refs: Iterable[Ref], env: dict[Any, Any]) -> None:
        env |= {ref: settle(env[ref]) for ref in self.settled.intersection(refs)}

    def _run(self, op: Op, env: dict[Any, Any]) -> None:
        """Adds the results of one operation, constant axes with size 1 if possible."""
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
        rule = _RULES.get(op.name, _elementwise if op.name in ELEMENTWISE else None)
        void = any(program.avals[ref].dtype == jax.dtypes.float0 for ref in op.ins)
        if rule and not void and not _placed(op):
            values = [
                Thin(jnp.asarray(env[ref]), program.avals[ref].shape) for ref in op.ins
            ]
            with scope(op):
                out = rule(op, values)
            if out is not None:
                env[op.outs[0]] = out
                return
        full = [_full(env, ref, program) for ref in op.ins]
        env.update(zip(op.outs, apply(op, full), strict=True))


def sweep(pull: Callable[[Any], Any], cotangent: Any, runs: int = 1) -> Sweep:
    """``pull``, the function that ``jax.vjp`` returns, as a :class:`Sweep`.

    Args:
      pull: A linear function of a tree like ``cotangent``.
      cotangent: Arrays, or anything with their shapes and dtypes.
      runs: How often it will run, as far as one knows.
    """
    closed, shapes = jax.make_jaxpr(pull, return_shape=True)(cotangent)
    # Recomputation that is inlined would be shared with the forward pass.
    program = flatten(closed, keep=("checkpoint", "remat2"))
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
    return Sweep(program, results, known, rewrites, _to_settle(program))


def _to_settle(program: Flat) -> set[Ref]:
    """Results that a product reads too, maybe in another shape.

    Those made entry by entry, or given; a product writes its own only once.
    """
    multiplied: set[Ref] = set()
    results = set(program.outputs)
    made = set(program.inputs)
    for op in reversed(program.ops):
        if op.name == "dot_general":
            multiplied.update(op.ins)
        elif op.name in _RESHAPES:
            multiplied.update(op.ins if multiplied.intersection(op.outs) else ())
            results.update(op.ins if results.intersection(op.outs) else ())
        elif op.name in ELEMENTWISE:
            made.update(op.outs)
    found = made & multiplied & results
    return {ref for ref in found if is_float(program.avals[ref].dtype)}


def _is_known(op: Op, known: dict[Any, Any], program: Flat) -> bool:
    """Whether one run for all is enough, and leaves no more than there was before.

    XLA keeps most of these inside of a loop over the passes: kernels of convolutions
    would be turned round in each of them.
    """

    def entries(refs):
        return sum(math.prod(program.avals[ref].shape) for ref in refs)

    once = not op.eqn.effects and all(ref in known for ref in op.ins)
    return once and entries(op.outs) <= entries(op.ins)


def _placed(op: Op) -> bool:
    """Whether it says on which devices its result lies."""
    sharding = op.params.get("sharding", op.params.get("out_sharding"))
    mesh = getattr(sharding, "mesh", None)
    return sharding is not None and not getattr(mesh, "empty", False)


def _full(env: dict[Any, Any], ref: Ref, program: Flat) -> Any:
    value, shape = env[ref], program.avals[ref].shape
    return value if jnp.shape(value) == shape else jnp.broadcast_to(value, shape)


def _elementwise(op: Op, values: list[Thin]) -> Array | None:
    """Constant where all operands are."""
    if len(op.outs) > 1:
        return None
    arrays = [value.array for value in values]
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays if x.ndim))
    return bind(op, [jnp.broadcast_to(x, shape) if x.ndim else x for x in arrays])[0]


def _broadcast(op: Op, values: list[Thin]) -> Array | None:
    """Nothing is repeated yet."""
    if len(values) > 1:  # a size that is known at run time only
        return None
    array, axes = values[0].array, op.params["broadcast_dimensions"]
    sizes = [1] * len(op.params["shape"])
    for axis, size in zip(axes, array.shape, strict=True):
        sizes[axis] = size
    return array.reshape(sizes)


def _transpose(op: Op, values: list[Thin]) -> Array:
    return values[0].array.transpose(op.params["permutation"])


def _squeeze(op: Op, values: list[Thin]) -> Array:
    return values[0].array.squeeze(op.params["dimensions"])


def _reduce_sum(op: Op, values: list[Thin]) -> Array:
    """A sum of equal entries is a multiple."""
    (value,), axes = values, op.params["axes"]
    times = math.prod(value.shape[axis] for axis in value.constant if axis in axes)
    return _times(bind(op, [value.array])[0], times)


def _times(array: Array, number: int) -> Array:
    return array if number == 1 else array * jnp.asarray(number, array.dtype)


def _dot_general(op: Op, values: list[Thin]) -> Array:
    """Constant operands leave the sum, and contracted neighbours are one axis."""
    arrays, params = [value.array for value in values], op.params
    contract, batches = params["dimension_numbers"]
    dtype, times = op.eqn.outvars[0].aval.dtype, 1
    if any(
        axis in value.constant
        for axes, value in zip(contract, values, strict=True)
        for axis in axes
    ) and jnp.issubdtype(dtype, jnp.inexact):
        # The sum over positions alone may be out of range in half precision.
        wide = jnp.promote_types(dtype, jnp.float32)
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
    """Operands whose contracted axes are one, if they lie side by side in both."""
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


_RULES: dict[str, Callable[..., Array | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reduce_sum": _reduce_sum,
    "dot_general": _dot_general,
}
