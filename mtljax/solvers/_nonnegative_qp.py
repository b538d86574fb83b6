"""Convex quadratic programs over the non-negative orthant, inside ``jit``.

    minimise  ½ xᵀQx + qᵀx   subject to  x ≥ 0,      Q positive semi-definite.

The method is block principal pivoting (Júdice and Pires, 1994; Kim and Park, SIAM
J. Sci. Comput. 2011): guess which variables are free, solve the linear system,
exchange every variable whose sign is wrong, and fall back to Murty's single
exchange when that stops helping, which makes it finite. A handful of T×T Cholesky
solves, no step size, no duality gap.

Two things make it safe in float32. Variables are scaled so that the diagonal of Q
is one, hence gradients of very different length do not hurt. And the pivoting runs on
Q plus a ridge of a few rounding errors, so that every face is solvable and it ends;
proximal-point steps, warm started, then take the ridge out of the solution again.

Derivatives are those of the linear system on the free variables.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_REFINEMENTS = 2
_PROXIMAL_STEPS = 3
_PATIENCE = 3  # full exchanges without progress before Murty's rule


class QPSolution(NamedTuple):
    """A minimiser ``x`` ``[T]``, its free variables and its certificate."""

    x: Weights
    free: Mask
    status: SolverStatus


class _Pivot(NamedTuple):
    x: Weights
    free: Bool[Array, " tasks"]
    wrong: Bool[Array, " tasks"]
    best: Scalar
    patience: Scalar
    iteration: Scalar


def nonnegative_qp(
    quadratic: Gramian,
    linear: Weights,
    *,
    mask: Mask | None = None,
    start: Mask | None = None,
) -> QPSolution:
    """Minimises ``½ xᵀQx + qᵀx`` over ``x ≥ 0``.

    Args:
      quadratic: Q, symmetric positive semi-definite ``[T, T]``.
      linear: q, ``[T]``.
      mask: Variables that exist; the others are fixed at zero.
      start: Guess of the free (positive) variables, for warm starts.

    Returns:
      The solution. ``status.residual`` is the largest violation of
      ``Qx + q ≥ 0``, ``x ≥ 0`` and complementarity, relative to the size of the
      terms that are added up. When Q is singular along a direction in which the
      objective falls there is no minimiser: x is then finite and very large. x can be
      differentiated in Q and q, as long as no free variable sits at zero (there it has
      only one-sided derivatives); the certificate counts as constant.

    Examples:
      >>> import jax.numpy as jnp
      >>> q = jnp.array([[2.0, -1.0], [-1.0, 2.0]])
      >>> nonnegative_qp(q, jnp.array([-1.0, 3.0])).x.tolist()
      [0.5, 0.0]
    """
    num = linear.shape[0]
    dtype = quadratic.dtype
    eps = jnp.finfo(dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    given = (quadratic, linear)
    quadratic, linear = jax.lax.stop_gradient(given)
    diagonal = jnp.where(mask, jnp.diagonal(quadratic), 0)
    largest = jnp.max(diagonal, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    # A zero row has no scale of its own; a tiny one keeps everything finite.
    scale = jax.lax.rsqrt(jnp.maximum(diagonal / largest, eps**2))
    quadratic = scale[:, None] * (quadratic / largest) * scale[None, :]
    linear = jnp.where(mask, linear * scale, 0)
    size = jnp.max(jnp.abs(linear), initial=0)
    size = jnp.where(size > 0, size, 1)
    linear = linear / size
    ridge = 2 * num * eps
    regular = quadratic + ridge * jnp.eye(num, dtype=dtype)

    def proximal(carry, _):
        free, x, iterations = carry
        state = _pivot_to_signs(regular, linear - ridge * x, free, mask)
        x = jnp.maximum(state.x, 0)
        return (state.free, x, iterations + state.iteration), None

    free = mask & ((linear < 0) if start is None else start)
    first = (free, jnp.zeros_like(linear), jnp.int32(0))
    (free, x, iterations), _ = jax.lax.scan(proximal, first, length=_PROXIMAL_STEPS)
    residual = _residual(quadratic, linear, x, mask)
    converged = residual <= jnp.sqrt(eps)
    status = SolverStatus(residual, iterations, converged)

    def stationary(x):  # in the units of the scaled problem, which are constants
        matrix = scale[:, None] * (given[0] / largest) * scale[None, :]
        slope = jnp.matmul(matrix, x, precision="highest") + given[1] * scale / size
        return jnp.where(free, slope, x)

    x = implicit(stationary, x)
    return QPSolution(x * scale * (size / largest), free, status)


def _residual(quadratic: Gramian, linear: Weights, x: Weights, mask: Mask) -> Scalar:
    """Largest complementarity violation relative to the terms in each slope."""
    slope = jnp.matmul(quadratic, x, precision="highest") + linear
    terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
    terms = jnp.where(terms > 0, terms, 1)
    wrong = jnp.where(x > 0, jnp.abs(slope), jnp.maximum(-slope, 0))
    return jnp.max(jnp.where(mask, wrong / terms, 0), initial=0)


def _pivot_to_signs(
    quadratic: Gramian, linear: Weights, free: Mask, mask: Mask
) -> _Pivot:
    """Exchanges variables until all signs are right; Q must be positive definite."""
    num = linear.shape[0]
    eps = jnp.finfo(quadratic.dtype).eps
    identity = jnp.eye(num, dtype=quadratic.dtype)

    def solve(free):
        face = free[:, None] & free[None, :]
        factor = jnp.linalg.cholesky(jnp.where(face, quadratic, identity))
        target = jnp.where(free, -linear, 0)

        def refine(x, _):
            rest = target - jnp.matmul(quadratic, x, precision="highest")
            rest = jnp.where(free, rest, 0)
            return x + jax.scipy.linalg.cho_solve((factor, True), rest), None

        return jax.lax.scan(refine, jnp.zeros_like(linear), length=_REFINEMENTS)[0]

    def judge(free, x):
        slope = jnp.matmul(quadratic, x, precision="highest") + linear
        terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
        negative = free & (x < -4 * eps * jnp.max(jnp.abs(x), initial=0))
        return mask & (negative | (~free & (slope < -4 * eps * terms)))

    def body(s: _Pivot):
        count = s.wrong.sum(dtype=jnp.int32)
        better = count < s.best
        patience = jnp.where(better, _PATIENCE, s.patience - 1)
        last = num - 1 - jnp.argmax(s.wrong[::-1])
        single = jnp.arange(num) == last
        free = s.free ^ jnp.where(better | (s.patience > 0), s.wrong, single)
        x = solve(free)
        best = jnp.minimum(count, s.best)
        return _Pivot(x, free, judge(free, x), best, patience, s.iteration + 1)

    x = solve(free)
    best, patience = jnp.int32(num + 1), jnp.int32(_PATIENCE)
    return jax.lax.while_loop(
        lambda s: s.wrong.any() & (s.iteration < 10 * num + 20),
        body,
        _Pivot(x, free, judge(free, x), best, patience, jnp.int32(1)),
    )
