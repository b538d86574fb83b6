"""Weights on the simplex that outlive the absence of some of their tasks."""

from collections.abc import Callable

import jax.numpy as jnp

from mtljax.types import Mask, Weights


def on_present(
    weights: Weights, mask: Mask, step: Callable[[Weights], Weights]
) -> tuple[Weights, Weights]:
    """Applies a map of the simplex to the shares of the present tasks alone.

    The conditional distribution of the present tasks goes through ``step`` and
    comes back with the mass they had together; the entries of absent tasks stay.
    With every task present this is just ``step(weights)``, and a task that is
    always absent does not show.

    Args:
      weights: Non-negative ``[T]``; only their ratios matter.
      mask: Tasks present.
      step: From the simplex over the present tasks (zero elsewhere) to itself.

    Returns:
      What ``step`` gave, and the weights ``[T]`` to keep.

    Examples:
      >>> import jax.numpy as jnp
      >>> mask = jnp.array([True, False, True])
      >>> on_present(jnp.array([0.2, 0.6, 0.2]), mask, lambda w: w**2 * 2)
      (Array([0.5, 0. , 0.5], dtype=float32), Array([0.2, 0.6, 0.2], dtype=float32))
    """
    inside = jnp.where(mask, weights, 0)
    mass = inside.sum()
    count = jnp.maximum(mask.sum(), 1).astype(weights.dtype)
    # Present tasks without any mass start afresh, from equal shares.
    uniform = mask.astype(weights.dtype) / count
    shares = jnp.where(mass > 0, inside / jnp.where(mass > 0, mass, 1), uniform)
    mass = jnp.where(mass > 0, mass, count / weights.shape[0])
    new = jnp.where(mask, step(shares), 0)
    return new, jnp.where(mask, new * mass, weights)
