"""Convex quadratic programs over the non-negative orthant, inside ``jit``.

    minimise  ½ xᵀQx + qᵀx   subject to  x ≥ 0,      Q positive semi-definite.

The method is block principal pivoting (Júdice and Pires, 1994; Kim and Park, SIAM J.
Sci. Comput. 2011). It guesses the free variables, solves the linear system for them,
and exchanges every variable whose sign is wrong. If the number of wrong signs does not
decrease, it exchanges single variables. The final rule for single exchanges is Murty's
rule, which makes the method finite. There is no step size and no duality gap.

The method runs in two stages. The first stage uses matrix-vector products only.
Projected gradient steps with Barzilai-Borwein step sizes guess the free variables, and
conjugate gradients solve for them. This stage solves most problems and is cheap for
many problems at a time. The second stage solves ill-conditioned and degenerate problems
by pivoting with Cholesky factors.

Two measures make the method robust in float32. The variables are scaled such that the
diagonal of Q is one, so that gradient norms may differ by orders of magnitude. The
pivoting runs on Q plus a ridge of a few rounding errors, so that every face has a
solution and the method terminates. Proximal-point steps then remove the effect of the
ridge.

The derivatives are those of the linear system for the free variables.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_INLINE = 8  # up to this number of variables, XLA runs a sum faster than a matmul
_DESCENT_STEPS = 10  # projected gradient steps that guess the free variables
_DESCENT_SHARE = 2  # at most T divided by this, plus two, of these steps
_ROUNDS = 4  # rounds of conjugate gradients
_CONJUGATE_STEPS = 16  # steps per round
_REFINEMENTS = 2
_PROXIMAL_STEPS = 10
_RIDGE = 2  # ridge of the pivoting, in units of T times the rounding error
_MURTY = 3  # iterations, in units of T, before Murty's rule selects single exchanges
_PATIENCE = 1  # full exchanges without progress before single exchanges


class QPSolution(NamedTuple):
    """Solution of ``nonnegative_qp``.

    Attributes:
      x: The minimiser, shape ``[T]``.
      free: Variables with a positive value, booleans of shape ``[T]``.
      status: The solver status.
    """

    x: Weights
    free: Mask
    status: SolverStatus


class _Pivot(NamedTuple):
    x: Weights
    free: Bool[Array, " tasks"]
    wrong: Bool[Array, " tasks"]
    factor: Float[Array, "tasks tasks"]
    best: Scalar
    patience: Scalar
    iteration: Scalar


class _Round(NamedTuple):
    x: Weights
    free: Bool[Array, " tasks"]
    wrong: Bool[Array, " tasks"]
    faces: Scalar
    step: Scalar
    done: Scalar


class _Proximal(NamedTuple):
    x: Weights
    free: Bool[Array, " tasks"]
    iterations: Scalar
    step: Scalar
    done: Scalar


def unit_lengths(gramian: Gramian, mask: Mask) -> tuple[Weights, Mask]:
    """Returns the gradient norms, and the tasks in the mask with a nonzero gradient.

    For all other tasks the norm is replaced by the smallest nonzero norm, or by 1 if
    there is none.
    """
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    active = mask & (lengths > 0)
    shortest = jnp.min(lengths, where=active, initial=jnp.inf)
    shortest = jnp.where(jnp.isfinite(shortest), shortest, 1)
    return jnp.where(active, lengths, shortest), active


@jax.jit
def nonnegative_qp(
    quadratic: Gramian,
    linear: Weights,
    *,
    mask: Mask | None = None,
    start: Mask | None = None,
) -> QPSolution:
    """Minimises ``½ xᵀQx + qᵀx`` over ``x ≥ 0``.

    Args:
      quadratic: Symmetric positive semi-definite matrix Q, shape ``[T, T]``.
      linear: Vector q, shape ``[T]``.
      mask: Variables of the problem, shape ``[T]``. All others are fixed at zero. By
        default all variables.
      start: Guess of the free (positive) variables, shape ``[T]``, for a warm start.

    Returns:
      The :class:`QPSolution`. ``status.residual`` is the largest violation of
      ``Qx + q ≥ 0``, ``x ≥ 0`` and complementarity, relative to the size of the summed
      terms. If Q is singular along a direction in which the objective decreases, there
      is no minimiser and x is finite and very large. The solution is differentiable
      with respect to Q and q unless a free variable is zero, where only one-sided
      derivatives exist. The status is constant under differentiation.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import nonnegative_qp
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
    lengths, _ = unit_lengths(quadratic, mask)
    # Two separate divisions, because a product of two norms may overflow in float32.
    quadratic = quadratic / lengths[:, None] / lengths[None, :]
    linear = jnp.where(mask, linear / lengths, 0)
    size = jnp.max(jnp.abs(linear), initial=0)
    size = jnp.where(size > 0, size, 1)
    linear = linear / size
    x, free, faces, done = _by_products(quadratic, linear, start, mask)
    ridge = _RIDGE * num * eps
    regular = quadratic + ridge * jnp.eye(num, dtype=dtype)

    def proximal(s: _Proximal):
        state = _pivot_to_signs(regular, linear - ridge * s.x, s.free, mask)

        def sharpen(x, _):  # two more steps on the same face reduce the error to ridge³
            rest = -linear - _times(quadratic, x)
            rest = jnp.where(state.free, rest, 0)
            return x + jax.scipy.linalg.cho_solve((state.factor, True), rest), None

        sharp = jax.lax.scan(sharpen, state.x, length=_REFINEMENTS)[0]
        done = ~_wrong_signs(quadratic, linear, state.free, mask, sharp).any()
        # If a sign changed, the face changed, so take the step without refinement.
        x = jnp.where(done, sharp, state.x)
        x = jnp.where(jnp.isfinite(x), jnp.maximum(x, 0), 0)
        iterations = s.iterations + state.iteration
        return _Proximal(x, state.free, iterations, s.step + 1, done)

    first = _Proximal(jnp.where(done, x, 0), free, faces, jnp.int32(0), done)
    state = jax.lax.while_loop(
        lambda s: ~s.done & (s.step < _PROXIMAL_STEPS), proximal, first
    )
    x = state.x
    free = x > 0
    residual = _residual(quadratic, linear, x, mask)
    converged = residual <= jnp.sqrt(eps)
    status = SolverStatus(residual, state.iterations, converged)

    def stationary(x):  # in the units of the scaled problem, with constant scales
        matrix = given[0] / lengths[:, None] / lengths[None, :]
        slope = jnp.matmul(matrix, x, precision="highest") + given[1] / lengths / size
        return jnp.where(free, slope, x)

    x = implicit(stationary, x)
    return QPSolution(x * (size / lengths), free, status)


def _times(matrix: Gramian, vector: Weights) -> Weights:
    if vector.shape[0] <= _INLINE:
        return (matrix * vector[None, :]).sum(1)
    return jnp.matmul(matrix, vector, precision="highest")


def _by_products(
    quadratic: Gramian, linear: Weights, start: Mask | None, mask: Mask
) -> tuple[Weights, Mask, Scalar, Scalar]:
    """Tries to solve the problem with matrix-vector products only.

    Returns x, its free variables, the number of faces, and whether x is the solution.
    If it is not, the free variables are a good start for the pivoting.
    """
    if start is None:
        x = _descend(quadratic, linear, mask)
        start = x > 0
    else:
        x = jnp.zeros_like(linear)
    eps = float(jnp.finfo(linear.dtype).eps)

    def body(s: _Round):
        free = s.free ^ s.wrong
        x = _conjugate_gradients(quadratic, linear, free, jnp.where(free, s.x, 0))
        wrong = _wrong_signs(quadratic, linear, free, mask, x)
        error = _residual(quadratic, linear, x, mask & free)
        # With large terms the relative error of any x is small. A face that may be
        # singular therefore needs a factorisation.
        accurate = (error <= 16 * eps) & (jnp.max(jnp.abs(x), initial=0) < eps**-0.5)
        faces = s.faces + s.wrong.any()
        done = accurate & ~wrong.any()
        return _Round(x, free, wrong, faces, s.step + 1, done)

    no, zero = jnp.zeros((), bool), jnp.int32(0)
    first = _Round(x, mask & start, jnp.zeros_like(mask), zero + 1, zero, no)
    s = jax.lax.while_loop(lambda s: ~s.done & (s.step < _ROUNDS), body, first)
    return jnp.maximum(s.x, 0), s.free ^ s.wrong, s.faces, s.done


def _descend(quadratic: Gramian, linear: Weights, mask: Mask) -> Weights:
    """Takes a few projected gradient steps with Barzilai-Borwein step sizes."""
    num = linear.shape[0]

    def step(carry, _):
        old, old_slope, x = carry
        slope = _times(quadratic, x) + linear
        moved = x - old
        across = (moved * (slope - old_slope)).sum()
        length = (moved * moved).sum() / jnp.where(across > 0, across, 1)
        length = jnp.where(across > 0, jnp.clip(length, 0.5 / num, 30), 1)
        new = jnp.where(mask, jnp.maximum(x - length * slope, 0), 0)
        return (x, slope, new), None

    zero = jnp.zeros_like(linear)
    first = (zero, linear, jnp.where(mask, jnp.maximum(-linear, 0), 0))
    length = min(_DESCENT_STEPS, num // _DESCENT_SHARE + 2)
    return jax.lax.scan(step, first, length=length)[0][2]


def _conjugate_gradients(
    quadratic: Gramian, linear: Weights, free: Mask, x: Weights
) -> Weights:
    """Solves ``(Qx + q)_free = 0`` approximately, starting at x.

    The fixed variables of x are zero.
    """
    eps = jnp.finfo(x.dtype).eps
    slope = _times(quadratic, x) + linear
    rest = jnp.where(free, -slope, 0)
    enough = (eps * jnp.max(jnp.abs(linear)) / 16) ** 2

    def step(carry):
        x, rest, along, square, k = carry
        image = _times(quadratic, along)
        image = jnp.where(free, image, 0)
        bend = along @ image
        length = jnp.where(bend > 0, square / jnp.where(bend > 0, bend, 1), 0)
        x, rest = x + length * along, rest - length * image
        new = rest @ rest
        along = rest + new / square * along
        return x, rest, along, new, k + 1

    first = (x, rest, rest, rest @ rest, jnp.int32(0))
    return jax.lax.while_loop(
        lambda c: (c[3] > enough) & (c[4] < _CONJUGATE_STEPS), step, first
    )[0]


def _residual(quadratic: Gramian, linear: Weights, x: Weights, mask: Mask) -> Scalar:
    """Returns the largest violation of complementarity, relative to the terms."""
    slope = _times(quadratic, x) + linear
    terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
    terms = jnp.where(terms > 0, terms, 1)
    wrong = jnp.where(x > 0, jnp.abs(slope), jnp.maximum(-slope, 0))
    return jnp.max(jnp.where(mask, wrong / terms, 0), initial=0)


def _wrong_signs(
    quadratic: Gramian, linear: Weights, free: Mask, mask: Mask, x: Weights
) -> Mask:
    """Returns negative free variables and fixed variables with a negative slope."""
    eps = jnp.finfo(quadratic.dtype).eps
    slope = _times(quadratic, x) + linear
    terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
    negative = free & (x < -4 * eps * jnp.max(jnp.abs(x), initial=0))
    return mask & (negative | (~free & (slope < -4 * eps * terms)))


def _pivot_to_signs(
    quadratic: Gramian, linear: Weights, free: Mask, mask: Mask
) -> _Pivot:
    """Exchanges variables until all signs are right. Requires Q positive definite."""
    num = linear.shape[0]
    identity = jnp.eye(num, dtype=quadratic.dtype)

    def body(s: _Pivot):
        count = s.wrong.sum(dtype=jnp.int32)
        better = count < s.best
        patience = jnp.where(better, _PATIENCE, s.patience - 1)
        last = num - 1 - jnp.argmax(s.wrong[::-1])
        slope = _times(quadratic, s.x) + linear
        worst = jnp.argmax(jnp.where(s.wrong, -jnp.where(s.free, s.x, slope), -1))
        last = jnp.where(s.iteration < _MURTY * num, worst, last)
        single = s.wrong & (jnp.arange(num) == last)
        free = s.free ^ jnp.where(better | (s.patience > 0), s.wrong, single)
        best = jnp.where(s.iteration > 0, jnp.minimum(count, s.best), s.best)

        face = free[:, None] & free[None, :]
        factor = jnp.linalg.cholesky(jnp.where(face, quadratic, identity))
        target = jnp.where(free, -linear, 0)

        def refine(x, _):
            rest = target - _times(quadratic, x)
            rest = jnp.where(free, rest, 0)
            return x + jax.scipy.linalg.cho_solve((factor, True), rest), None

        x = jax.lax.scan(refine, jnp.zeros_like(linear), length=_REFINEMENTS)[0]
        wrong = _wrong_signs(quadratic, linear, free, mask, x)
        return _Pivot(x, free, wrong, factor, best, patience, s.iteration + 1)

    first = _Pivot(
        jnp.zeros_like(linear),
        free,
        jnp.zeros(num, bool),
        identity,
        jnp.int32(num + 1),
        jnp.int32(_PATIENCE),
        jnp.int32(0),
    )
    return jax.lax.while_loop(
        lambda s: (s.iteration == 0) | (s.wrong.any() & (s.iteration < 10 * num + 20)),
        body,
        first,
    )
