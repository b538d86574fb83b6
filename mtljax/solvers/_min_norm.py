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
    """Minimises ``wᵀGw`` over the probability simplex, exactly.

    The minimiser is the normalised solution of the non-negative program
    ``min ½ xᵀGx − 1ᵀx``, so no Frank-Wolfe tail and no step size. With a zero
    gradient among the tasks the answer is that task alone (the norm is then zero; of
    several each gets an equal share); if the tasks' gradients are positively dependent,
    the weights are a near-certificate: the norm is zero up to the rounding of the
    Gramian.

    Args:
      gramian: ``[T, T]``.
      mask: Tasks that take part; the others get weight zero.

    Returns:
      Weights ``[T]`` on the simplex (all zero when the mask is empty) and the
      status; its residual is ``max_i max(0, wᵀGw − (Gw)_i)``, each relative to the
      terms that are added up in it.

    References:
      Désidéri, 2012; Wolfe, Finding the nearest point in a polytope, 1976.

    Examples:
      >>> import jax.numpy as jnp
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
