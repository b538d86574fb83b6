"""Convex quadratic programs over the non-negative orthant, inside ``jit``.

    minimise  ½ xᵀQx + qᵀx   subject to  x ≥ 0,      Q positive semi-definite.

The method is block principal pivoting (Júdice and Pires, 1994; Kim and Park, SIAM
J. Sci. Comput. 2011): guess which variables are free, solve the linear system,
exchange every variable whose sign is wrong, and exchange single ones when that stops
helping (Murty's in the end, which makes it finite). No step size, no duality gap.

It is done twice. First with products only: projected gradient steps of Barzilai and
Borwein's length guess the free variables, conjugate gradients solve for them. That is
all for most problems, and cheap for many at a time. What is left, ill-conditioned or
degenerate, is pivoted with Cholesky factors.

Two things make that safe in float32. Variables are scaled so that the diagonal of Q
is one, hence gradients of very different length do not hurt. And the pivoting runs on
Q plus a ridge of a few rounding errors, so that every face is solvable and it ends;
proximal-point steps then take the ridge out of the solution again.

Derivatives are those of the linear system on the free variables.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_INLINE = 8  # up to so many variables XLA runs a sum faster than a product
_DESCENT_STEPS = 10  # projected gradient steps that guess the free variables
_DESCENT_SHARE = 2  # and not more than T divided by this, plus two
_ROUNDS = 4  # of conjugate gradients
_CONJUGATE_STEPS = 16  # in each of them
_REFINEMENTS = 2
_PROXIMAL_STEPS = 10
_RIDGE = 2  # of the pivoting, in units of T times the rounding error
_MURTY = 3  # iterations, in units of T, before Murty picks the single exchange
_PATIENCE = 1  # full exchanges without progress before single ones


class QPSolution(NamedTuple):
    """A minimiser ``x`` ``[T]``, its free variables and its certificate."""

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
    """Lengths of the gradients, and which are in the mask and not zero.

    Rows without a length of their own get the shortest there is.
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
    lengths, _ = unit_lengths(quadratic, mask)
    # One after the other: products of lengths may leave the range of float32.
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

        def sharpen(x, _):  # two more steps on the same face: the ridge cubed
            rest = -linear - _times(quadratic, x)
            rest = jnp.where(state.free, rest, 0)
            return x + jax.scipy.linalg.cho_solve((state.factor, True), rest), None

        sharp = jax.lax.scan(sharpen, state.x, length=_REFINEMENTS)[0]
        done = ~_wrong_signs(quadratic, linear, state.free, mask, sharp).any()
        # Signs that changed mean another face; the plain step leads there safely.
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

    def stationary(x):  # in the units of the scaled problem, which are constants
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
    """Tries without a factor: x, its free variables, faces seen, and whether it is it.

    Where it is not, x is of no use but the free variables are a good start.
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
        # Among huge terms any x looks right: a face that may be singular needs factors.
        accurate = (error <= 16 * eps) & (jnp.max(jnp.abs(x), initial=0) < eps**-0.5)
        faces = s.faces + s.wrong.any()
        done = accurate & ~wrong.any()
        return _Round(x, free, wrong, faces, s.step + 1, done)

    no, zero = jnp.zeros((), bool), jnp.int32(0)
    first = _Round(x, mask & start, jnp.zeros_like(mask), zero + 1, zero, no)
    s = jax.lax.while_loop(lambda s: ~s.done & (s.step < _ROUNDS), body, first)
    return jnp.maximum(s.x, 0), s.free ^ s.wrong, s.faces, s.done


def _descend(quadratic: Gramian, linear: Weights, mask: Mask) -> Weights:
    """A few projected gradient steps of Barzilai and Borwein's length."""
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
    """Towards ``(Qx + q)_free = 0``, from x, which is zero elsewhere."""
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
    """Largest complementarity violation relative to the terms in each slope."""
    slope = _times(quadratic, x) + linear
    terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
    terms = jnp.where(terms > 0, terms, 1)
    wrong = jnp.where(x > 0, jnp.abs(slope), jnp.maximum(-slope, 0))
    return jnp.max(jnp.where(mask, wrong / terms, 0), initial=0)


def _wrong_signs(
    quadratic: Gramian, linear: Weights, free: Mask, mask: Mask, x: Weights
) -> Mask:
    """Free variables that are negative, fixed ones whose slope is."""
    eps = jnp.finfo(quadratic.dtype).eps
    slope = _times(quadratic, x) + linear
    terms = jnp.abs(quadratic * x[None, :]).sum(1) + jnp.abs(linear)
    negative = free & (x < -4 * eps * jnp.max(jnp.abs(x), initial=0))
    return mask & (negative | (~free & (slope < -4 * eps * terms)))


def _pivot_to_signs(
    quadratic: Gramian, linear: Weights, free: Mask, mask: Mask
) -> _Pivot:
    """Exchanges variables until all signs are right; Q must be positive definite."""
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
