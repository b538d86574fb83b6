"""Projection onto the dual cone, in which no task gets worse."""

import jax
import jax.numpy as jnp

from mtljax.solvers._nonnegative_qp import nonnegative_qp
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights


@jax.jit
def project_cone(
    gramian: Gramian, weights: Weights, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Projects ``Jᵀw`` onto ``{d : <g_i, d> ≥ 0 for all i}``, the dual cone.

    By duality the projection is ``Jᵀv`` with ``v = argmin_{v ≥ w} vᵀGv``. The
    difference ``v − w`` is the solution of a non-negative QP. The solution is exact and
    uses no ridge.

    Args:
      gramian: Gramian G of the task gradients J, shape ``[T, T]``.
      weights: Weights w, shape ``[T]``.
      mask: Tasks that define the cone, shape ``[T]``. The weights of other tasks are
        returned unchanged. By default all tasks.

    Returns:
      The weights v of shape ``[T]``, with ``v ≥ w``, and the :class:`SolverStatus`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import project_cone
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> project_cone(gramian, jnp.array([0.5, 0.5]))[0].tolist()
      [0.6111, 0.5000]
    """
    slope = jnp.matmul(gramian, weights, precision="highest")
    solution = nonnegative_qp(gramian, slope, mask=mask)
    return weights + solution.x, solution.status
