"""Spectral functions of a Gramian that ignore absent tasks."""

import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.types import Gramian, Weights


def pinv_solve(matrix: Gramian, vector: Weights) -> tuple[Weights, Scalar]:
    """Computes ``M⁺v`` for a symmetric positive semi-definite matrix ``M``.

    Eigenvalues below ``T · eps`` times the largest are treated as zero. Zero rows and
    columns, which belong to absent tasks, do not change the solution.

    Args:
      matrix: The matrix M, shape ``[T, T]``.
      vector: The vector v, shape ``[T]``.

    Returns:
      The solution of shape ``[T]``, and the relative norm of the part of ``v`` outside
      the range of ``M``. This norm is 0 if ``M M⁺ v = v``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import pinv_solve
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
