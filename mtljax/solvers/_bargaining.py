"""Damped Newton solver of the bargaining equation ``Gw = w^(-1/α)``."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._min_norm import min_norm_point
from mtljax.solvers._nonnegative_qp import unit_lengths
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Number, Weights

_MAX_STEPS = 60
_QUADRATIC = 0.1  # below this relative change, the full Newton step is taken
# Fractions of the Newton step that the line search evaluates.
_TRIALS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0.03)


class _Scaled(NamedTuple):
    """The equation ``C u = b u^(-p)`` for unit gradients, with ``u = w n``.

    ``n`` are the gradient norms. For a small p, an entry of u may be below the range of
    the dtype. It is then fixed at a lower bound, where ``b u^(-p)`` is at most the
    slope ``C u``.
    """

    cosines: Gramian
    target: Weights  # b = n^(p-1), up to its geometric mean
    power: Number  # p = 1/α
    active: Mask

    def times(self, u: Weights) -> Weights:
        return jnp.matmul(self.cosines, u, precision="highest")

    def force(self, u: Weights) -> Weights:
        return self.target * u ** (-self.power)

    def held(self, u: Weights, slope: Weights) -> Mask:
        """Returns the entries at the lower bound that would decrease further."""
        return (u <= _floor(u)) & (slope >= self.force(u))

    def path(self, relative: Weights) -> Weights:
        """Returns ``log(u(t)/u)`` for the relative step ``t``. u remains positive.

        An increase is linear in u. A decrease is exact for an entry of u that is so
        small that only its force ``b u^(-p)`` depends on it.
        """
        down = -jnp.log1p(-self.power * jnp.minimum(relative, 0)) / self.power
        return jnp.where(relative > 0, jnp.log1p(jnp.maximum(relative, 0)), down)

    def gain(self, u: Weights, logs: Weights) -> Weights:
        """Terms of the increase of ``Σ b u^(1-p)/(1-p)`` from u to ``u exp(logs)``."""
        rest = jnp.asarray(1 - self.power, u.dtype)
        straight = jnp.abs(rest) < jnp.finfo(u.dtype).eps
        rest = jnp.where(straight, 1, rest)
        bent = jnp.where(straight, logs, jnp.expm1(rest * logs) / rest)
        return self.force(u) * u * bent

    def gain_left(self, u: Weights, slope: Weights) -> Bool[Array, ""]:
        """Returns whether the convex combination of unit gradients is nonzero.

        Rounding changes its squared norm by at most a few eps.
        """
        total = jnp.where(self.active, u, 0).sum()
        square = jnp.where(self.active, u * slope, 0).sum()
        square = square / jnp.where(total > 0, total, 1) ** 2
        return square > 16 * jnp.finfo(u.dtype).eps


def _floor(u: Weights) -> float:
    """Lower bound of u, at which force and curvature are in the range of the dtype."""
    return float(jnp.finfo(u.dtype).tiny) ** 0.8


class _Newton(NamedTuple):
    u: Weights
    change: Scalar
    moving: Scalar
    iteration: Scalar


def solve_bargaining(
    gramian: Gramian, alpha: Number = 1.0, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes the unique ``w > 0`` with ``Gw = w^(-1/α)`` (elementwise power).

    The solution minimises ``½ wᵀGw − Σ f(w_i)``, which is strictly convex on ``w > 0``.
    Here ``f = log`` for ``α = 1`` (Nash bargaining) and ``f(w) = w^(1−1/α)/(1−1/α)``
    otherwise. Newton's method with a line search runs on gradients scaled to unit norm.
    It converges in 4 to 15 steps in float32, even if the gradient norms differ by
    orders of magnitude. A weight below the range of the dtype, possible for large α, is
    zero.

    The equation has no solution if the gradients are positively dependent, that is, at
    a Pareto-stationary point. The solver detects this if the combination of unit
    gradients is zero up to the rounding of the Gramian. It then returns the weights of
    the min-norm point, whose direction vanishes there. These weights are constant under
    differentiation. If the residual is above ``√eps`` at any other point, the solver
    returns the last iterate. ``status.converged`` is False in both cases. The weight of
    a task with a zero gradient is zero.

    Args:
      gramian: Gramian G, shape ``[T, T]``.
      alpha: α > 0, where 1 is Nash bargaining. May be traced. Each new concrete value
        compiles a new program.
      mask: Tasks of the problem, shape ``[T]``. By default all tasks.

    Returns:
      The weights of shape ``[T]`` and the :class:`SolverStatus`. The residual is
      ``max_i |(Gw)_i − w_i^(-1/α)|``, each relative to its summed terms.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022; Ban and Ji, `Fair Resource Allocation
      in Multi-Task Learning <https://arxiv.org/abs/2402.15638>`_, 2024. The Newton
      method is not from these papers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.solvers import solve_bargaining
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> solve_bargaining(gramian)[0].tolist()
      [0.5914, 0.4070]
    """
    if isinstance(alpha, int | float):
        return _solve_constant(gramian, float(alpha), mask)
    return _solve_traced(gramian, alpha, mask)


def _solve(
    gramian: Gramian, alpha: Number, mask: Mask | None
) -> tuple[Weights, SolverStatus]:
    given, gramian = gramian, jax.lax.stop_gradient(gramian)
    num, dtype = gramian.shape[0], gramian.dtype
    power = 1.0 / alpha
    if isinstance(power, jax.Array):
        power = power.astype(dtype)
    mask = jnp.ones(num, bool) if mask is None else mask
    norms, active = unit_lengths(gramian, mask)
    norms = jnp.where(active, norms, 1)
    pairs = active[:, None] & active[None, :]
    # Each inactive entry becomes an independent task with the solution u = 1.
    cosines = jnp.where(
        pairs & ~jnp.eye(num, dtype=bool),
        gramian / norms[:, None] / norms[None, :],
        jnp.eye(num, dtype=dtype),
    )
    logs = (power - 1) * jnp.log(norms)
    count = jnp.maximum(active.sum(), 1).astype(dtype)
    mean_log = jnp.where(active, logs, 0).sum() / count
    target = jnp.where(active, jnp.exp(logs - mean_log), 1)
    problem = _Scaled(cosines, target, power, active)
    state = _newton(jax.lax.stop_gradient(problem))
    slope = problem.times(state.u)
    residual, finite = _certificate(problem, state.u, slope)
    possible = problem.gain_left(state.u, slope) & finite
    solved = possible & (residual <= jnp.sqrt(jnp.finfo(dtype).eps))
    pairs |= jnp.eye(num, dtype=bool) & active[:, None]
    held = problem.held(state.u, slope)
    start = jnp.where(possible, state.u, 1)
    size = jnp.abs(cosines * start[None, :]).sum(1) + problem.force(start)
    size = jax.lax.stop_gradient(jnp.where(held, 1, size))

    def bargain(logs):  # the norms are constants, but the diagonal is not
        matrix = jnp.where(pairs, given / norms[:, None] / norms[None, :], cosines)
        u = start * jnp.exp(logs)
        left = jnp.matmul(matrix, u, precision="highest") - problem.force(u)
        return jnp.where(held, logs, left / size)

    # A loop of at most one iteration. Under vmap its cost arises only if a problem
    # needs the fallback.
    fallback = jax.lax.while_loop(
        lambda s: s[0],
        lambda _: (jnp.zeros((), bool), min_norm_point(gramian, mask)[0]),
        (~possible & active.any(), jnp.zeros(num, dtype)),
    )[1]
    u = start * jnp.exp(implicit(bargain, jnp.zeros(num, dtype)))
    u = jnp.where(held, 0, u)
    weights = jnp.where(active, u * jnp.exp(mean_log / (1 + power)) / norms, 0)
    weights = jnp.where(active.any(), jnp.where(possible, weights, fallback), 0)
    return weights, SolverStatus(residual, state.iteration, solved)


_solve_constant = functools.partial(jax.jit, static_argnums=1)(_solve)
_solve_traced = jax.jit(_solve)


def _newton(problem: _Scaled) -> _Newton:
    """Runs damped Newton steps from the best point on a ray."""
    num, dtype = problem.target.shape[0], problem.target.dtype
    eps = jnp.finfo(dtype).eps
    power, times, force = problem.power, problem.times, problem.force

    def body(s: _Newton):
        slope = times(s.u)
        held = problem.held(s.u, slope)
        gradient = jnp.where(held, 0, slope - force(s.u))
        curvature = power * force(s.u) / s.u
        scaling = jax.lax.rsqrt(1 + curvature)
        hessian = problem.cosines + jnp.diag(curvature)
        hessian = scaling[:, None] * hessian * scaling[None, :]
        factor = jnp.linalg.cholesky(hessian + num * eps * jnp.eye(num, dtype=dtype))
        step = jax.scipy.linalg.cho_solve((factor, True), -scaling * gradient)
        relative = jnp.where(held, 0, scaling * step / s.u)
        length = _step_length(problem, s.u, slope, relative)
        logs = problem.path(length * relative)
        # Near the solution each step squares the relative change, down to rounding.
        change = jnp.max(jnp.abs(logs))
        stuck = (s.change < 0.1) & (change > 0.5 * s.change)
        moving = (change > jnp.sqrt(eps)) & ~stuck & problem.gain_left(s.u, slope)
        u = jnp.maximum(s.u * jnp.exp(logs), _floor(s.u))
        return _Newton(u, change, moving, s.iteration + 1)

    # The best point on the ray of the solution for orthogonal gradients.
    u = problem.target ** (1 / (1 + power))
    ratio = (u * force(u)).sum() / jnp.maximum(u @ times(u), eps * u.sum() ** 2)
    start = _Newton(
        u * ratio ** (1 / (1 + power)),
        jnp.asarray(jnp.inf, dtype),
        jnp.ones((), bool),
        jnp.int32(0),
    )
    return jax.lax.while_loop(
        lambda s: s.moving & (s.iteration < _MAX_STEPS), body, start
    )


def _step_length(
    problem: _Scaled, u: Weights, slope: Weights, relative: Weights
) -> Scalar:
    """Selects the full step near the solution, and else the best trial fraction."""
    eps = jnp.finfo(u.dtype).eps
    trials = jnp.array(_TRIALS, u.dtype)

    def terms(t):
        logs = problem.path(t * relative)
        moved = u * jnp.expm1(logs)
        bent = moved * slope + moved * problem.times(moved) / 2
        gain = problem.gain(u, logs)
        return (bent - gain).sum(), (jnp.abs(bent) + jnp.abs(gain)).sum()

    values, sizes = jax.vmap(terms)(trials)
    # Of fractions whose values differ by rounding only, select the largest.
    best = jnp.argmin(values)
    good = values <= values[best] + 4 * eps * sizes[best]
    chosen = trials[jnp.argmax(good)]
    return jnp.where(jnp.max(jnp.abs(relative)) < _QUADRATIC, 1, chosen)


def _certificate(
    problem: _Scaled, u: Weights, slope: Weights
) -> tuple[Scalar, Bool[Array, ""]]:
    """Returns the residual, and whether it is finite."""
    force = problem.force(u)
    terms = jnp.abs(problem.cosines * u[None, :]).sum(1) + force
    wrong = jnp.where(problem.held(u, slope), 0, jnp.abs(slope - force)) / terms
    residual = jnp.max(wrong, where=problem.active, initial=0)
    finite = jnp.isfinite(residual)
    return jnp.where(finite, residual, jnp.inf), finite
