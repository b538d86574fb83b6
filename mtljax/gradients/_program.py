"""A traced function as a flat list of operations with inlined calls."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from mtljax.gradients._primitives import REMAT, body_of_call
from mtljax.types import Losses

Ref = int  # the number of a value of the program
Env = dict[Ref, Any]


class Op(NamedTuple):
    """One equation, whose values are identified by numbers."""

    eqn: Any
    ins: tuple[Ref, ...]
    outs: tuple[Ref, ...]

    @property
    def primitive(self) -> Any:
        """The primitive."""
        return self.eqn.primitive

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the primitive."""
        return self.eqn.params

    def shape(self, operand: int) -> tuple[int, ...]:
        """Shape of an operand."""
        return self.eqn.invars[operand].aval.shape


class Program(NamedTuple):
    """``function(leaves) -> (losses, aux)`` as operations in order."""

    ops: list[Op]
    leaves: list[Ref]
    losses: Ref
    aux: list[Ref]
    constants: Env  # closed-over arrays and literals
    avals: dict[Ref, Any]  # types of the values
    restore_aux: Callable[[list[Any]], Any]
    rematerialises: bool  # whether it contained a jax.checkpoint, which is inlined


class Flat(NamedTuple):
    """A jaxpr as operations in order."""

    ops: list[Op]
    inputs: list[Ref]
    outputs: list[Ref]
    constants: Env
    avals: dict[Ref, Any]  # types of the values
    rematerialises: bool


def is_float(dtype: Any) -> bool:
    """Whether the dtype is real floating-point."""
    return jnp.issubdtype(dtype, jnp.floating)


def has_cotangent(dtype: Any) -> bool:
    """Whether values of the dtype can be differentiated."""
    return jnp.issubdtype(dtype, jnp.inexact)


def trace(
    function: Callable[[list[Any]], tuple[Losses, Any]], leaves: Sequence[Any]
) -> Program:
    """Traces a function of a list of arrays; the auxiliary output may be anything."""
    holder: list[Callable[[list[Any]], Any]] = []

    def flat(leaves):
        losses, aux = function(leaves)
        parts, treedef = jax.tree.flatten(aux)
        traced = [isinstance(part, jax.Array) for part in parts]

        def restore(arrays):
            arrays = iter(arrays)
            merged = [
                next(arrays) if is_array else part
                for is_array, part in zip(traced, parts, strict=True)
            ]
            return jax.tree.unflatten(treedef, merged)

        holder.append(restore)
        return losses, [
            p for p, is_array in zip(parts, traced, strict=True) if is_array
        ]

    made = flatten(jax.make_jaxpr(flat)(list(leaves)))
    losses, *aux = made.outputs
    return Program(
        made.ops,
        made.inputs,
        losses,
        aux,
        made.constants,
        made.avals,
        holder[-1],
        made.rematerialises,
    )


def flatten(closed: Any, keep: Collection[Any] = ()) -> Flat:
    """Returns the operations of a closed jaxpr; calls except ``keep`` are inlined."""
    builder = _Builder(keep)
    inputs = [builder.new(var.aval) for var in closed.jaxpr.invars]
    outputs = builder.inline(closed.jaxpr, closed.consts, inputs)
    return Flat(
        builder.ops,
        inputs,
        outputs,
        builder.constants,
        builder.avals,
        builder.rematerialises,
    )


class _Builder:
    """Numbers the values while calls are replaced by their bodies."""

    def __init__(self, keep: Collection[Any]):
        self.keep = keep
        self.ops: list[Op] = []
        self.constants: Env = {}
        self.avals: dict[Ref, Any] = {}
        self.rematerialises = False

    def new(self, aval: Any) -> Ref:
        ref = len(self.avals)
        self.avals[ref] = aval
        return ref

    def constant(self, aval: Any, value: Any) -> Ref:
        ref = self.new(aval)
        self.constants[ref] = value
        return ref

    def inline(
        self, jaxpr: Any, consts: Iterable[Any], inputs: Iterable[Ref]
    ) -> list[Ref]:
        # Variables are resolved per call, because a jaxpr may be called several times.
        names: dict[Any, Ref] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            names[var] = self.constant(var.aval, value)

        def read(atom):
            if isinstance(atom, Literal):
                return self.constant(atom.aval, atom.val)
            return names[atom]

        for eqn in jaxpr.eqns:
            ins = [read(atom) for atom in eqn.invars]
            body = None if eqn.primitive in self.keep else body_of_call(eqn)
            if body is None:
                outs = [self.new(var.aval) for var in eqn.outvars]
                self.ops.append(Op(eqn, tuple(ins), tuple(outs)))
            else:
                self.rematerialises |= eqn.primitive in REMAT
                body, held = getattr(body, "jaxpr", body), getattr(body, "consts", ())
                outs = self.inline(body, held, ins)
            names.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def needed(ops: Sequence[Op], results: Iterable[Ref]) -> list[Op]:
    """Returns the operations with effects or that results depend on, in order."""
    wanted, found = set(results), []
    for op in reversed(ops):
        if wanted.intersection(op.outs) or op.eqn.effects:
            wanted.update(op.ins)
            found.append(op)
    return found[::-1]


def run(op: Op, env: Env) -> None:
    """Adds the results of one operation to the environment."""
    results = apply(op, [env[ref] for ref in op.ins])
    env.update(zip(op.outs, results, strict=True))


def scope(op: Op) -> Any:
    """Returns the context of an operation: its mesh and its name scope for profiles."""
    name = str(op.eqn.source_info.name_stack)
    if not name:
        return op.eqn.ctx.manager
    entered = contextlib.ExitStack()
    entered.enter_context(op.eqn.ctx.manager)
    entered.enter_context(jax.named_scope(name))
    return entered


def apply(
    op: Op, values: Sequence[Any], params: dict[str, Any] | None = None
) -> Sequence[Any]:
    """Returns the results of one operation, with its own or other parameters."""
    with scope(op):
        return bind(op, values, params)


def bind(
    op: Op, values: Sequence[Any], params: dict[str, Any] | None = None
) -> Sequence[Any]:
    """Returns the results of one operation in the scope of the caller."""
    primitive = op.eqn.primitive
    bound: Any = primitive.get_bind_params(op.params if params is None else params)
    # jax 0.7 returns the functions of a custom rule separately from the parameters.
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*functions, *values, **bound)
    return out if primitive.multiple_results else [out]
