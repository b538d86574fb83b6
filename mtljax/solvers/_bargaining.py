"""The bargaining equation ``Gw = w^(-1/α)`` by damped Newton (Nash-MTL, FairGrad)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._min_norm import min_norm_point
from mtljax.solvers._nonnegative_qp import unit_lengths
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_MAX_STEPS = 60
_QUADRATIC = 0.06  # decrement below which the full Newton step is taken
# Shares of the longest step among which the line search chooses.
_TRIALS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08)


class _Scaled(NamedTuple):
    """``C u = b u^(-p)`` for unit gradients, with ``u = w n`` for lengths ``n``."""

    cosines: Gramian
    target: Weights  # b = n^(p-1), up to its geometric mean
    power: float  # p = 1/α
    active: Mask

    def times(self, u: Weights) -> Weights:
        return jnp.matmul(self.cosines, u, precision="highest")

    def force(self, u: Weights) -> Weights:
        return self.target * u ** (-self.power)

    def barrier(self, u: Weights) -> Weights:
        if self.power == 1:
            return self.target * jnp.log(u)
        return self.target * u ** (1 - self.power) / (1 - self.power)

    def gain_left(self, u: Weights, slope: Weights) -> Bool[Array, ""]:
        """Whether the convex combination of unit gradients has a length.

        Rounding moves its square by a few eps at most.
        """
        total = jnp.where(self.active, u, 0).sum()
        square = jnp.where(self.active, u * slope, 0).sum()
        square = square / jnp.where(total > 0, total, 1) ** 2
        return square > 16 * jnp.finfo(u.dtype).eps


class _Newton(NamedTuple):
    u: Weights
    change: Scalar
    moving: Scalar
    iteration: Scalar


def solve_bargaining(
    gramian: Gramian, alpha: float = 1.0, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """The unique ``w > 0`` with ``Gw = w^(-1/α)``, elementwise power.

    It is the minimiser of ``½ wᵀGw − Σ f(w_i)``, strictly convex on ``w > 0`` with
    ``f = log`` for ``α = 1`` (Nash) and ``f(w) = w^(1−1/α)/(1−1/α)`` otherwise.
    Newton with a line search, on the rows scaled to unit length, converges in 4 to 15
    steps in float32, also for gradients of very different length.

    There is no solution when the gradients are positively dependent (the point is
    Pareto-stationary). When the combination of unit gradients that is found is not
    longer than the rounding of the Gramian allows to tell from zero, or the residual is
    above ``√eps``, the declared fallback are the weights of the min-norm point, whose
    direction vanishes there (constants for derivatives); ``status.converged`` is then
    False. Tasks with a zero gradient take no part and get weight zero.

    Args:
      gramian: ``[T, T]``.
      alpha: α > 0; 1 is Nash bargaining.
      mask: Tasks that take part.

    Returns:
      Weights ``[T]`` and the status; its residual is
      ``max_i |(Gw)_i − w_i^(-1/α)|``, each relative to the terms that are added up.

    References:
      Navon et al., arXiv 2202.01017; Ban and Ji, arXiv 2402.15638. The Newton form
      is ours.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
      >>> solve_bargaining(gramian)[0].tolist()
      [0.5914, 0.4070]
    """
    given, gramian = gramian, jax.lax.stop_gradient(gramian)
    num, dtype = gramian.shape[0], gramian.dtype
    power = 1.0 / alpha
    mask = jnp.ones(num, bool) if mask is None else mask
    norms, active = unit_lengths(gramian, mask)
    norms = jnp.where(active, norms, 1)
    pairs = active[:, None] & active[None, :]
    # Inactive entries become an independent task of their own, solved by u = 1.
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
    state = _newton(problem)
    residual, solved = _certificate(problem, state.u)
    pairs |= jnp.eye(num, dtype=bool) & active[:, None]

    def bargain(u):  # the lengths are constants, the diagonal is not
        matrix = jnp.where(pairs, given / norms[:, None] / norms[None, :], cosines)
        return jnp.matmul(matrix, u, precision="highest") - problem.force(u)

    # A loop of one turn at most: its cost is paid where some problem needs it.
    fallback = jax.lax.while_loop(
        lambda s: s[0],
        lambda _: (jnp.zeros((), bool), min_norm_point(gramian, mask)[0]),
        (~solved & active.any(), jnp.zeros(num, dtype)),
    )[1]
    u = implicit(bargain, jnp.where(solved, state.u, 1))
    weights = jnp.where(active, u * jnp.exp(mean_log / (1 + power)) / norms, 0)
    weights = jnp.where(active.any(), jnp.where(solved, weights, fallback), 0)
    return weights, SolverStatus(residual, state.iteration, solved)


def _newton(problem: _Scaled) -> _Newton:
    """Damped Newton from the best point on a ray."""
    num, dtype = problem.target.shape[0], problem.target.dtype
    eps = jnp.finfo(dtype).eps
    power, times, force = problem.power, problem.times, problem.force

    def body(s: _Newton):
        slope = times(s.u)
        gradient = slope - force(s.u)
        curvature = power * force(s.u) / s.u
        scaling = jax.lax.rsqrt(1 + curvature)
        hessian = problem.cosines + jnp.diag(curvature)
        hessian = scaling[:, None] * hessian * scaling[None, :]
        factor = jnp.linalg.cholesky(hessian + num * eps * jnp.eye(num, dtype=dtype))
        step = jax.scipy.linalg.cho_solve((factor, True), -scaling * gradient)
        decrement = jnp.maximum(-(scaling * gradient) @ step, 0)
        step = scaling * step
        length = _step_length(problem, s.u, slope, step, decrement)
        # Near the answer a step squares the relative change, until it is rounding.
        change = jnp.max(jnp.abs(length * step) / s.u)
        stuck = (s.change < 0.1) & (change > 0.5 * s.change)
        moving = (change > jnp.sqrt(eps)) & ~stuck & problem.gain_left(s.u, slope)
        return _Newton(s.u + length * step, change, moving, s.iteration + 1)

    # The best point on the ray of the answer for orthogonal gradients.
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
    problem: _Scaled, u: Weights, slope: Weights, step: Weights, decrement: Scalar
) -> Scalar:
    """The full step near the answer, the best of some shares of it before."""
    eps = jnp.finfo(u.dtype).eps
    reach = 0.9 / jnp.maximum(jnp.max(jnp.where(step < 0, -step / u, 0)), eps)
    # The objective along the step costs O(T): its quadratic part is two numbers.
    # The first candidate is the step that is safe for self-concordant functions.
    safe = jnp.minimum(1 / (1 + jnp.sqrt(decrement)), reach)
    trials = jnp.append(safe, jnp.minimum(1, reach) * jnp.array(_TRIALS, u.dtype))
    bent = trials * (step @ slope) + trials**2 / 2 * (step @ problem.times(step))
    now = problem.barrier(u)
    gain = jax.vmap(lambda t: (problem.barrier(u + t * step) - now).sum())(trials)
    best = trials[jnp.argmin(bent - gain)]
    return jnp.where(decrement < _QUADRATIC, jnp.minimum(1, reach), best)


def _certificate(problem: _Scaled, u: Weights) -> tuple[Scalar, Bool[Array, ""]]:
    """The residual, and whether the equation is solved and has a solution."""
    slope, force = problem.times(u), problem.force(u)
    terms = jnp.abs(problem.cosines * u[None, :]).sum(1) + force
    wrong = jnp.abs(slope - force) / terms
    residual = jnp.max(wrong, where=problem.active, initial=0)
    solved = jnp.isfinite(residual)
    solved &= residual <= jnp.sqrt(jnp.finfo(u.dtype).eps)
    solved &= problem.gain_left(u, slope)
    return jnp.where(jnp.isfinite(residual), residual, jnp.inf), solved
