"""Primitives of JAX as objects.

A primitive that this version of JAX does not have is omitted. A primitive that JAX does
not export is taken from a traced example. An operation that is not recognised is
differentiated as usual. An unknown name therefore affects speed and not correctness.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mtljax import placement


def exported(*names: str) -> frozenset[Any]:
    """Returns the primitives with these names in ``jax.extend.core.primitives``."""
    found = (getattr(jax.extend.core.primitives, f"{n}_p", None) for n in names)
    return frozenset(p for p in found if p is not None)


def _learnt(function: Callable[..., Any], *args: Any) -> frozenset[Any]:
    """Returns the primitive of the last equation of a traced function."""
    return frozenset({jax.make_jaxpr(function)(*args).jaxpr.eqns[-1].primitive})


_X = jax.ShapeDtypeStruct((2,), jnp.float32)


def _learn_pvary() -> frozenset[Any]:
    mesh, spec = AbstractMesh((1,), ("axis",)), PartitionSpec()
    traced = jax.make_jaxpr(
        jax.shard_map(
            lambda x: placement.cast(x, ("axis",)),
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec("axis"),
        )
    )(_X)
    body = traced.jaxpr.eqns[0].params["jaxpr"]
    return frozenset({eqn.primitive for eqn in getattr(body, "jaxpr", body).eqns})


def _learn_reshard() -> frozenset[Any]:
    mesh = AbstractMesh((1,), ("axis",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec("axis"))
    return _learnt(lambda x: jax.sharding.reshard(x, sharding), _X)


REMAT = _learnt(jax.checkpoint(lambda x: x + 1), _X)
# Calls that are equivalent to their body. Calls with custom derivatives are excluded,
# because their derivative is not that of the body. Loops and branches stay whole.
CALLS = exported("jit", "closed_call", "call") | _learnt(jax.jit(lambda x: x + 1), _X)
CALLS |= REMAT

DOT = exported("dot_general")
CONVOLUTION = exported("conv_general_dilated")
GATHER = exported("gather")
CONVERT = exported("convert_element_type")
BROADCAST = exported("broadcast_in_dim")
TRANSPOSE = exported("transpose")
RESHAPE = exported("reshape")
SQUEEZE = exported("squeeze")
REDUCE_SUM = exported("reduce_sum")
ADD = exported("add")
CUSTOM_JVP = exported("custom_jvp_call")
CUSTOM_VJP = exported("custom_vjp_call")
CONCATENATE = exported("concatenate")
STACK = _learnt(lambda x: jnp.stack([x, x]), _X) - CONCATENATE
MAX_POOL_GRADIENT = exported("select_and_scatter_add")
GREATER_OR_EQUAL = exported("ge")

# Every entry of the operand occurs once in the result, so inner products of gradients
# do not change.
REORDERS = RESHAPE | TRANSPOSE | SQUEEZE | exported("rev", "neg", "copy", "name")
REORDERS |= exported("sharding_constraint") | _learnt(jax.lax.optimization_barrier, _X)
REORDERS |= _learn_pvary() | _learn_reshard()

ELEMENTWISE = exported(
    *("add", "add_jaxvals", "sub", "mul", "div", "neg", "abs", "sign", "square"),
    *("integer_pow", "pow", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log1p"),
    *("tanh", "logistic", "max", "min", "clamp", "select_n", "copy", "is_finite"),
    *("convert_element_type", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"),
)


def understood(params: dict[str, Any], keys: Collection[str]) -> bool:
    """Whether all parameters that are set are among those that a rule has read."""
    return all(key in keys or value in (None, False) for key, value in params.items())


def bodies(params: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs among the parameters of an equation, also in tuples."""

    def found(value):
        if isinstance(value, tuple | list):
            return [body for part in value for body in found(part)]
        value = getattr(value, "jaxpr", value)
        return [value] if hasattr(value, "eqns") else []

    return [body for value in params.values() for body in found(value)]


def body_of_call(eqn: Any) -> Any:
    """Returns the jaxpr that a call runs, or None if the equation is not a call."""
    if eqn.primitive not in CALLS:
        return None
    jaxprs = [
        value
        for value in eqn.params.values()
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
    ]
    if len(jaxprs) != 1:
        return None
    inner = getattr(jaxprs[0], "jaxpr", jaxprs[0])
    return jaxprs[0] if len(inner.invars) == len(eqn.invars) else None
