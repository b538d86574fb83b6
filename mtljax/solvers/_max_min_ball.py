"""The step in a ball around the mean that improves the worst task most (CAGrad)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Scalar

from mtljax.solvers._implicit import implicit
from mtljax.solvers._min_norm import min_norm_point
from mtljax.solvers._nonnegative_qp import nonnegative_qp
from mtljax.solvers._status import SolverStatus
from mtljax.types import Gramian, Mask, Weights

_MAX_STEPS = 40


class _Search(NamedTuple):
    bound: Scalar
    x: Weights
    free: Bool[Array, " tasks"]
    radius: Scalar
    change: Scalar
    iteration: Scalar


def max_min_in_ball(
    gramian: Gramian,
    center: Weights,
    radius: Scalar,
    mask: Mask | None = None,
) -> tuple[Weights, SolverStatus]:
    """Solves ``max_d min_i <g_i, d>`` over ``‖d − Jᵀc‖ ≤ r``, in weights.

    For a value ``v`` of the minimum the nearest ``d`` to ``Jᵀc`` is ``Jᵀ(c + x(v))``
    with ``x(v)`` the solution of a non-negative QP, and its distance is convex and
    increasing in ``v``. Newton's method on "distance = r", started at an upper bound,
    therefore descends to the answer without a line search; each step is one small
    exact solve, warm started. This is the dual of the simplex problem
    ``min_w <g_w, g_c> + r ‖g_w‖`` without its kink at ``g_w = 0``.

    Args:
      gramian: ``[T, T]``.
      center: Weights ``c`` ``[T]`` of the centre of the ball.
      radius: r, in units of the gradients.
      mask: Tasks that take part.

    Returns:
      ``x`` ``[T]``, non-negative, such that ``d = Jᵀ(c + x)``, and the status. When
      no direction improves every task and the ball reaches the cone where none gets
      worse, ``d`` is the projection of the centre on that cone.

    References:
      Liu et al., arXiv 2110.14048, for the problem.
    """
    num = gramian.shape[0]
    dtype = gramian.dtype
    eps = jnp.finfo(dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    given = (gramian, center, radius)
    gramian, center, radius = jax.lax.stop_gradient(given)
    size = jnp.max(jnp.where(mask, jnp.diagonal(gramian), 0), initial=0)
    size = jnp.where(size > 0, size, 1)
    gramian = gramian / size
    radius = radius / jnp.sqrt(size)
    slope = jnp.matmul(gramian, center, precision="highest")

    def norm(x):
        return jnp.sqrt(jnp.maximum(x @ jnp.matmul(gramian, x, precision="highest"), 0))

    def dual(weights):  # an upper bound of the optimum for any weights on the simplex
        return weights @ slope + radius * norm(weights)

    def body(s: _Search):
        solution = nonnegative_qp(gramian, slope - s.bound, mask=mask, start=s.free)
        x = solution.x
        total = x.sum()
        bound = jnp.where(total > 0, dual(x / jnp.where(total > 0, total, 1)), s.bound)
        bound = jnp.minimum(bound, s.bound)
        return _Search(
            bound, x, solution.free, norm(x), s.bound - bound, s.iteration + 1
        )

    def unfinished(s: _Search):
        # Relative to the bound alone: it may be the gain of a very short gradient.
        tolerance = 4 * eps * (jnp.abs(s.bound) + eps * radius)
        return (s.change > tolerance) & (s.iteration < _MAX_STEPS)

    start, _ = min_norm_point(gramian, mask)
    zero = jnp.zeros((), dtype)
    first = _Search(
        dual(start), jnp.zeros(num, dtype), start > 0, zero, zero, jnp.int32(0)
    )
    state = jax.lax.while_loop(unfinished, body, body(first))
    # The bound comes from above, so the norm does too: the last step is exact.
    shrink = jnp.where(
        state.radius > radius, radius / jnp.maximum(state.radius, eps**2), 1
    )
    x = jnp.where(radius > 0, state.x * shrink, 0)
    gains = jnp.matmul(gramian, center + x, precision="highest")
    lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)) * norm(center + x)
    short = jnp.maximum(state.bound - gains, 0) / jnp.where(lengths > 0, lengths, 1)
    residual = jnp.max(jnp.where(mask & (lengths > 0), short, 0), initial=0)
    converged = residual <= jnp.sqrt(eps)

    # Derivatives: which tasks are worst, and whether the ball binds, are constants.
    worst = state.free & (radius > 0)
    bound = state.radius > radius * (1 - jnp.sqrt(eps))
    reach = jnp.where(radius > 0, radius, 1)
    unit = jax.lax.rsqrt(jnp.maximum(jnp.diagonal(gramian), eps**2))

    def optimal(z):  # z: x in units of reach / length of each gradient, and v / reach
        y, v = unit * z[:-1], z[-1]
        matrix = given[0] / size
        pull = jnp.matmul(matrix, given[1] / reach + y, precision="highest")
        square = y @ jnp.matmul(matrix, y, precision="highest")
        excess = square - (given[2] / jnp.sqrt(size) / reach) ** 2
        rows = jnp.where(worst, unit * (pull - v), z[:-1])
        return jnp.append(rows, jnp.where(bound & worst.any(), excess, v))

    solution = jnp.append(x / unit / reach, state.bound / reach)
    moved = implicit(optimal, solution)[:-1] * unit * reach
    x = x + (moved - jax.lax.stop_gradient(moved))
    return x, SolverStatus(residual, state.iteration, converged)
