"""The min-norm point of the convex hull of the task gradients (MGDA)."""

import jax
import jax.numpy as jnp

from mtljax.solvers._nonnegative_qp import nonnegative_qp
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights


@jax.jit
def min_norm_point(
    gramian: Gramian, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Minimises ``wᵀGw`` over the probability simplex exactly.

    The minimiser is the normalised solution of the non-negative QP
    ``min ½ xᵀGx − 1ᵀx``. There is no step size and no slow Frank-Wolfe convergence. If
    a task has a zero gradient, its weight is 1, and several such tasks have equal
    weights. If the gradients are positively dependent, the norm at the solution is zero
    up to the rounding of the Gramian.

    Args:
      gramian: Gramian G, shape ``[T, T]``.
      mask: Tasks of the problem, shape ``[T]``. The weights of other tasks are zero. By
        default all tasks.

    Returns:
      The weights of shape ``[T]`` and the :class:`SolverStatus`. The weights lie on the
      simplex, or are zero if the mask is empty. The residual is
      ``max_i max(0, wᵀGw − (Gw)_i)``, each relative to its summed terms.

    References:
      Désidéri, Multiple-gradient descent algorithm, 2012; Wolfe, Finding the nearest
      point in a polytope, 1976.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import min_norm_point
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> min_norm_point(gramian)[0].tolist()
      [0.6000, 0.4000]
    """
    num = gramian.shape[0]
    dtype = gramian.dtype
    mask = jnp.ones(num, bool) if mask is None else mask
    size = jnp.max(jnp.diagonal(gramian), where=mask, initial=0)
    size = jax.lax.stop_gradient(jnp.where(size > 0, size, 1))
    gramian = gramian / size
    zero = mask & ~(jnp.diagonal(gramian) > 0)
    ones = jnp.where(mask, -jnp.ones(num, dtype), 1)
    solution = nonnegative_qp(gramian, ones, mask=mask)
    largest = jax.lax.stop_gradient(jnp.max(solution.x))
    x = solution.x / jnp.maximum(largest, jnp.finfo(dtype).tiny)
    weights = x / jnp.maximum(x.sum(), jnp.finfo(dtype).tiny)
    share = zero.astype(dtype) / jnp.maximum(zero.sum(), 1).astype(dtype)
    weights = jnp.where(zero.any(), share, weights)
    weights = jnp.where(mask, weights, 0)
    gramian, fixed = jax.lax.stop_gradient((gramian, weights))
    slope = jnp.matmul(gramian, fixed, precision="highest")
    terms = jnp.abs(gramian * fixed[None, :]).sum(1)
    terms = terms + fixed @ terms
    gap = jnp.maximum(fixed @ slope - slope, 0) / jnp.where(terms > 0, terms, 1)
    residual = jnp.max(gap, where=mask, initial=0)
    converged = residual <= jnp.sqrt(jnp.finfo(dtype).eps)
    return weights, SolverStatus(residual, solution.status.iterations, converged)
