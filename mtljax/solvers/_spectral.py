"""Spectral functions of a Gramian, with absent tasks left out."""

import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.types import Gramian, Weights


def pinv_solve(matrix: Gramian, vector: Weights) -> tuple[Weights, Scalar]:
    """``M⁺v`` for a symmetric positive semi-definite ``M`` ``[T, T]``.

    Eigenvalues below ``T · eps`` times the largest count as zero. Rows and columns
    of zeros (absent tasks) drop out by themselves.

    Returns:
      The solution ``[T]`` and the share of ``v`` outside the range of ``M``
      (0 when ``M M⁺ v = v``).

    Examples:
      >>> import jax.numpy as jnp
      >>> x, outside = pinv_solve(jnp.ones((2, 2)), jnp.ones(2))
      >>> x.tolist()
      [0.5, 0.5]
    """
    values, vectors = jnp.linalg.eigh(matrix)
    tolerance = matrix.shape[0] * jnp.finfo(matrix.dtype).eps * jnp.max(jnp.abs(values))
    kept = values > tolerance
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    coefficients = jnp.matmul(vectors.T, vector, precision="highest")
    solution = jnp.matmul(vectors, inverse * coefficients, precision="highest")
    lost = jnp.linalg.norm(jnp.where(kept, 0, coefficients))
    length = jnp.linalg.norm(vector)
    return solution, lost / jnp.where(length > 0, length, 1)
