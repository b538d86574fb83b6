"""Simplex weights that are kept while some tasks are absent."""

from collections.abc import Callable

import jax.numpy as jnp

from mtljax.types import Mask, Weights


def on_present(
    weights: Weights, mask: Mask, step: Callable[[Weights], Weights]
) -> tuple[Weights, Weights]:
    """Applies a map of the simplex to the weights of the present tasks only.

    The function normalises the weights of the present tasks, applies ``step``, and
    multiplies the result by the sum that these weights had before. The entries of
    absent tasks do not change. If all tasks are present, the result is
    ``step(weights)``. A task that is always absent has no effect.

    Args:
      weights: Non-negative weights, shape ``[T]``. Only their ratios matter.
      mask: Present tasks, shape ``[T]``.
      step: Function from the simplex over the present tasks to itself. The entries of
        absent tasks are zero.

    Returns:
      The output of ``step`` and the weights to store, each of shape ``[T]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import on_present
      >>> mask = jnp.array([True, False, True])
      >>> on_present(jnp.array([0.2, 0.6, 0.2]), mask, lambda w: w**2 * 2)
      (Array([0.5, 0. , 0.5], dtype=float32), Array([0.2, 0.6, 0.2], dtype=float32))
    """
    inside = jnp.where(mask, weights, 0)
    mass = inside.sum()
    count = jnp.maximum(mask.sum(), 1).astype(weights.dtype)
    # If the weights of all present tasks are zero, start from equal weights.
    uniform = mask.astype(weights.dtype) / count
    shares = jnp.where(mass > 0, inside / jnp.where(mass > 0, mass, 1), uniform)
    mass = jnp.where(mass > 0, mass, count / weights.shape[0])
    new = jnp.where(mask, step(shares), 0)
    return new, jnp.where(mask, new * mass, weights)
