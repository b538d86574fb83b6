"""Convergence status that all solvers return."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Scalar


class SolverStatus(NamedTuple):
    """Convergence status of a small convex solve, stored in the state of a method.

    Attributes:
      residual: Scale-free violation of the optimality conditions, 0 if exact.
      iterations: Number of iterations of the outer loop.
      converged: False if the residual is above the tolerance of the solver or if the
        problem has no solution. The method then uses its documented fallback.
    """

    residual: Scalar
    iterations: Scalar
    converged: Scalar


def unsolved() -> SolverStatus:
    """Returns the status before the first solve."""
    return SolverStatus(jnp.float32(0), jnp.int32(0), jnp.ones((), bool))
