"""Euclidean projection on the probability simplex."""

import jax.numpy as jnp

from mtljax.types import Mask, Weights


def project_simplex(vector: Weights, mask: Mask | None = None) -> Weights:
    """Projects a vector onto the probability simplex.

    The projection is exact. It sorts the entries and costs O(T log T) operations.

    Args:
      vector: The vector, shape ``[T]``.
      mask: Entries that may be nonzero, shape ``[T]``. By default all entries.

    Returns:
      The nearest point of the simplex, shape ``[T]``. It is zero if the mask is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import project_simplex
      >>> project_simplex(jnp.array([0.5, 1.5, -1.0])).tolist()
      [0.0, 1.0, 0.0]
    """
    mask = jnp.ones(vector.shape, bool) if mask is None else mask
    # Subtracting the maximum keeps sums of large entries exact.
    vector = vector - jnp.max(vector, where=mask, initial=-jnp.inf)
    descending = jnp.sort(jnp.where(mask, vector, -jnp.inf))[::-1]
    count = jnp.arange(1, vector.shape[0] + 1, dtype=vector.dtype)
    finite = jnp.isfinite(descending)
    excess = jnp.cumsum(jnp.where(finite, descending, 0)) - 1
    support = finite & (descending * count > excess)
    size = jnp.maximum(support.sum(), 1)
    threshold = excess[size - 1] / size
    return jnp.where(mask, jnp.maximum(vector - threshold, 0), 0)
