"""An identity that has XLA:CPU make a value once.

XLA fuses an elementwise operation with the reshapes that follow it, a copy for each of
them. A cotangent behind an activation is read by the product before it and by the
contraction, in two shapes: XLA:CPU writes those of all tasks two or three times. It
fuses nothing across a loop, so ``settle`` is a loop of one turn, of which XLA cannot
know the number of turns, and which writes one entry. Optimisation barriers are gone
before XLA fuses.
"""

import math
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from mtljax.gradients._engine._program import explicit_axes

# Entries from which on a loop is made; half as many again saved a tenth of a step.
_LARGE = 1 << 17

_settle_p = jax.extend.core.Primitive("settle")


def settle(x: Array) -> Array:
    """``x``; where it is large, in memory before anything reads it."""
    # Where shardings are part of types, one entry of x has none.
    return x if explicit_axes() else _settle_p.bind(x)


def _loop(x: Array) -> Array:
    at, one = [0] * x.ndim, [1] * x.ndim

    def goes_on(carry):
        # A first entry that is infinite costs one turn more.
        turn, x = carry
        first = jax.lax.slice(x, at, one).reshape(())
        return turn < 1 + (first == jnp.inf).astype(jnp.int32)

    def body(carry):
        turn, x = carry
        entry = jax.lax.slice(x, at, one) + 0 * turn.astype(x.dtype)
        return turn + 1, jax.lax.dynamic_update_slice(x, entry, at)

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), x))[1]


def _lower_on_cpu(context: Any, x: Any) -> Any:
    (aval,) = context.avals_in
    # The one entry may lie on another device.
    devices = getattr(context.module_context.axis_context, "num_devices", None)
    if devices != 1 or math.prod(aval.shape) < _LARGE:
        return [x]
    return mlir.lower_fun(_loop, multiple_results=False)(context, x)


_settle_p.def_impl(lambda x: x)
_settle_p.def_abstract_eval(lambda x: x)
ad.deflinear2(_settle_p, lambda cotangent, _: [cotangent])
batching.defvectorized(_settle_p)
mlir.register_lowering(_settle_p, lambda _, x: [x])
mlir.register_lowering(_settle_p, _lower_on_cpu, platform="cpu")
