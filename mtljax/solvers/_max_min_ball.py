"""The step in a ball that maximises the smallest gain of a task (CAGrad)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._nonnegative_qp import nonnegative_qp, unit_lengths
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_MAX_STEPS = 40


class _Scaled(NamedTuple):
    """The problem for unit gradients, which is independent of the gradient norms.

    The unknown is ``y = x n / max n`` for gradient norms ``n``.
    """

    cosines: Gramian
    place: Weights  # the centre
    slope: Weights  # gains at the centre
    shares: Weights  # <u_i, d> ≥ v shares_i, with v in units of the smallest norm
    radius: Scalar
    mask: Mask
    active: Mask
    lengths: Weights  # gradient norms
    size: Scalar  # the largest norm


class _Search(NamedTuple):
    bound: Scalar
    y: Weights
    free: Bool[Array, " tasks"]
    reach: Scalar
    moving: Scalar
    iteration: Scalar


@jax.jit
def max_min_in_ball(
    gramian: Gramian,
    center: Weights,
    radius: Scalar,
    mask: Mask | None = None,
) -> tuple[Weights, SolverStatus]:
    """Solves ``max_d min_i <g_i, d>`` subject to ``‖d − Jᵀc‖ ≤ r``.

    For a value ``v`` of the minimum, the nearest ``d`` to ``Jᵀc`` is
    ``Jᵀ(c + x(v))``, where ``x(v)`` solves a non-negative QP. Its distance is convex
    and increasing in ``v``. Newton's method solves "distance = r" from ``v = ∞``, where
    ``x`` is the direction of the min-norm point. It therefore decreases monotonically
    to the solution without a line search. Each step is one small exact solve with a
    warm start. The problem is the dual of the simplex problem
    ``min_w <g_w, g_c> + r ‖g_w‖``, without its kink at ``g_w = 0``.

    Args:
      gramian: Gramian of the task gradients J, shape ``[T, T]``.
      center: Weights c of the centre of the ball, shape ``[T]``.
      radius: Radius r of the ball, in units of the gradients.
      mask: Tasks of the problem, shape ``[T]``. By default all tasks.

    Returns:
      Non-negative weights ``x`` of shape ``[T]`` such that ``d = Jᵀ(c + x)``, and the
      :class:`SolverStatus`. In some cases no direction improves every task, that is,
      the min-norm point of the unit gradients is zero up to the rounding of the
      Gramian. If the ball then intersects the dual cone, ``d`` is the projection of the
      centre onto that cone. The residual is ``max_i (v − <g_i, d>)``, each relative to
      its summed terms.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import max_min_in_ball
      >>> gramian, center = jnp.diag(jnp.array([1.0, 4.0])), jnp.array([0.5, 0.5])
      >>> x, status = max_min_in_ball(gramian, center, jnp.float32(0.0))
      >>> x.tolist(), bool(status.converged)
      ([0.0, 0.0], True)

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021, for the problem.
    """
    mask = jnp.ones(gramian.shape[0], bool) if mask is None else mask
    given = (gramian, center, radius)
    gramian, center, radius = jax.lax.stop_gradient(given)
    lengths, active = unit_lengths(gramian, mask)
    size = jnp.max(lengths)
    cosines = gramian / lengths[:, None] / lengths[None, :]
    place = jnp.where(mask, center * (lengths / size), 0)
    slope = jnp.matmul(cosines, place, precision="highest")
    shares = jnp.min(lengths) / lengths
    scaled = _Scaled(
        cosines, place, slope, shares, radius / size, mask, active, lengths, size
    )
    state = _newton(scaled)
    # The bound decreases to the solution, so the norm is at least r. Scale it to r.
    reach = jnp.where(state.reach > 0, state.reach, 1)
    y = state.y * jnp.minimum(scaled.radius / reach, 1)
    bound = jnp.where(active.any(), state.bound, 0)
    gains = jnp.matmul(cosines, place + y, precision="highest")
    terms = jnp.abs(cosines * (place + y)[None, :]).sum(1)
    short = jnp.maximum(bound * shares - gains, 0) / jnp.where(terms > 0, terms, 1)
    residual = jnp.max(short, where=active, initial=0)
    converged = residual <= jnp.sqrt(jnp.finfo(gramian.dtype).eps)
    y = _differentiable(y, bound, state, scaled, given)
    return y * (size / lengths), SolverStatus(residual, state.iteration, converged)


def _square(cosines: Gramian, y: Weights) -> Scalar:
    return jnp.maximum(y @ jnp.matmul(cosines, y, precision="highest"), 0)


def _newton(problem: _Scaled) -> _Search:
    """Computes the value of the minimum from above, and the corresponding x."""
    cosines, _, slope, shares, radius, mask, active, _, _ = problem
    num, dtype = slope.shape[0], slope.dtype
    eps = jnp.finfo(dtype).eps

    def body(s: _Search):
        started = s.iteration > 0
        # At v = ∞ only the direction of x matters. It is that of the min-norm point.
        linear = jnp.where(started, slope - s.bound * shares, -shares)
        solution = nonnegative_qp(cosines, linear, mask=active, start=s.free)
        y = solution.x
        total = y.sum()
        unit = y / jnp.where(total > 0, total, 1)
        length = _square(cosines, unit)
        gain = unit @ slope + radius * jnp.sqrt(length)
        step = jnp.where(total > 0, unit @ shares, 1)
        bound = jnp.minimum(gain / step, s.bound)
        # No direction improves all tasks, or a task has a zero gradient.
        stuck = ~started & ((length <= 4 * eps) | (mask & ~active).any())
        bound = jnp.where(stuck, jnp.minimum(bound, 0), bound)
        noise = jnp.abs(unit) @ jnp.abs(slope) + radius * jnp.sqrt(length)
        moving = s.bound - bound > 4 * eps * noise / step
        reach = jnp.sqrt(_square(cosines, y))
        return _Search(
            bound, y, solution.free, reach, ~started | moving, s.iteration + 1
        )

    first = _Search(
        jnp.asarray(jnp.inf, dtype),
        jnp.zeros(num, dtype),
        active,
        jnp.zeros((), dtype),
        active.any(),
        jnp.int32(0),
    )
    return jax.lax.while_loop(
        lambda s: s.moving & (s.iteration < _MAX_STEPS), body, first
    )


def _differentiable(
    y: Weights,
    bound: Scalar,
    state: _Search,
    problem: _Scaled,
    given: tuple[Gramian, Weights, Scalar],
) -> Weights:
    """Returns y with derivatives with respect to the inputs of the problem.

    The norms, the set of worst tasks and whether the ball constraint is active are
    constants under differentiation.
    """
    radius, mask, shares = problem.radius, problem.mask, problem.shares
    lengths, size = problem.lengths, problem.size
    worst = state.free & (radius > 0)
    binds = state.reach > radius * (1 - jnp.sqrt(jnp.finfo(y.dtype).eps))
    scale = jnp.where(radius > 0, radius, 1)

    def optimal(z):  # y and the bound, both in units of the radius
        y, v = z[:-1], z[-1]
        matrix = given[0] / lengths[:, None] / lengths[None, :]
        start = given[1] * (lengths / size / scale)
        pull = jnp.matmul(matrix, jnp.where(mask, start, 0) + y, precision="highest")
        excess = y @ jnp.matmul(matrix, y, precision="highest")
        excess = excess - (given[2] / size / scale) ** 2
        rows = jnp.where(worst, pull - v * shares, y)
        return jnp.append(rows, jnp.where(binds & worst.any(), excess, v))

    moved = implicit(optimal, jnp.append(y, bound) / scale)[:-1] * scale
    return y + (moved - jax.lax.stop_gradient(moved))
