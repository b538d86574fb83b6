"""What every solver says about its answer."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Scalar


class SolverStatus(NamedTuple):
    """Certificate of a small convex solve; lives in the method's state.

    Attributes:
      residual: Scale-free violation of the optimality conditions, 0 when exact.
      iterations: Iterations of the outer loop.
      converged: False when the residual is above the solver's tolerance or the
        problem has no solution; the method then used its declared fallback.
    """

    residual: Scalar
    iterations: Scalar
    converged: Scalar


def unsolved() -> SolverStatus:
    """The status before the first solve."""
    return SolverStatus(jnp.float32(0), jnp.int32(0), jnp.ones((), bool))
