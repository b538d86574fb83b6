"""Projection of a direction on the cone in which no task gets worse."""

import jax
import jax.numpy as jnp

from mtljax.solvers._nonnegative_qp import nonnegative_qp
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights


@jax.jit
def project_cone(
    gramian: Gramian, weights: Weights, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Projects ``Jᵀw`` on ``{d : <g_i, d> ≥ 0 for all i}``, in weights.

    By duality the projection is ``Jᵀv`` with ``v = argmin_{v ≥ w} vᵀGv``; what is
    added to the weights is the solution of a non-negative QP. Exact, no ridge.

    Args:
      gramian: ``[T, T]``.
      weights: ``[T]``.
      mask: Tasks that take part; the weights of the others come back as they were.

    Returns:
      Weights ``[T]``, none smaller than given, and the status.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> project_cone(gramian, jnp.array([0.5, 0.5]))[0].tolist()
      [0.6111, 0.5000]
    """
    slope = jnp.matmul(gramian, weights, precision="highest")
    solution = nonnegative_qp(gramian, slope, mask=mask)
    return weights + solution.x, solution.status
