"""An identity that stores a value before it is read.

XLA:CPU fuses an elementwise operation with each reshape that follows it. The cotangents
of all tasks behind an activation are read by the next product and by the contraction,
in two or three shapes, so XLA:CPU computes them two or three times. It removes
optimisation barriers before it fuses, but it does not fuse across a loop. ``once`` is
therefore a loop of one turn that writes one entry.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

LARGE = 1 << 17
"""Number of entries from which the loop takes less time than a second computation."""


@jax.custom_batching.custom_vmap
def _loop(x: Array) -> Array:
    at, one = (0,) * x.ndim, (1,) * x.ndim

    def continues(carry):
        # XLA must not know the number of turns. At most two are taken.
        turn, x = carry
        infinite = jax.lax.slice(x, at, one).reshape(()) == jnp.inf
        return turn < 1 + infinite.astype(turn.dtype)

    def body(carry):
        turn, x = carry
        entry = jax.lax.slice(x, at, one)
        entry = jnp.where(turn < 2, entry, jnp.zeros_like(entry))
        return turn + 1, jax.lax.dynamic_update_slice(x, entry, at)

    return jax.lax.while_loop(continues, body, (jnp.zeros((), jnp.int32), x))[1]


@_loop.def_vmap
def _unchanged(_, batched, x):
    # The number of turns would differ along the new axis.
    return x, batched[0]


@jax.custom_jvp
def once(x: Array) -> Array:
    """Returns ``x``. A large array of floats is stored before it is read."""
    large = x.size >= LARGE and jnp.issubdtype(x.dtype, jnp.floating)
    return _loop(x) if large else x


once.defjvp(lambda primals, tangents: (once(*primals), *tangents))
