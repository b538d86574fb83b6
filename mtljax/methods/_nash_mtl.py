"""Nash-MTL: the Nash bargaining solution of the tasks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.solvers import SolverStatus, solve_bargaining, unsolved
from mtljax.types import Scale, Weights


class NashMTLState(NamedTuple):
    """State of :func:`nash_mtl`."""

    bargain: Weights  # α of the last solve, on the native scale
    step: Scalar
    solver: SolverStatus
    task_weights: Weights


@factory
def nash_mtl(
    num_tasks: int, *, update_every: int = 1, scale: Scale = "native"
) -> Balancer:
    """Nash bargaining solution (Nash-MTL).

    The update is ``d = Σ_i α_i g_i`` with the solution ``α > 0`` of ``Gα = 1/α``, where
    G is the Gramian. It is proportionally fair: the gains are
    ``<g_i, d> = 1/α_i > 0``. Scaling a loss does not change d.

    The exact solution satisfies ``‖d‖ = √T`` for *every* set of gradients. The norm of
    the update therefore contains no information, and the weights increase as the
    gradients decrease. nash-mtl and LibMTL clip the update to norm 1, which always has
    an effect. To do the same, use
    ``optax.chain(nash_mtl(T), optax.clip_by_global_norm(1.0), ...)``. Their solver
    stops early and returns the previous iterate. Here a damped Newton method solves the
    equation up to rounding.

    The equation has no solution at a Pareto-stationary point. The weights are then
    those of MGDA, whose direction vanishes there, and ``state.solver.converged`` is
    False. The weight of a task with a zero gradient is zero.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      update_every: Number of steps between two solves. The weights α are reused in
        between. The paper uses 1, and 50 or 100 for reinforcement learning. A task that
        was absent at the last solve keeps its α of the solve before. See also
        :func:`mtljax.reuse`, which skips the backward passes.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        With these, the norm of the update depends on the gradients.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state has T + 4 numbers.

    Raises:
      ValueError: If ``update_every`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.nash_mtl(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.07, 0.99, 0.99]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022.
    """
    if update_every < 1:
        raise ValueError(
            f"nash_mtl: update_every must be positive, not {update_every}."
        )

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        return NashMTLState(ones, jnp.int32(0), unsolved(), ones)

    def weigh(state, *, losses, gramian, mask):
        del losses

        kept = (state.bargain.astype(gramian.dtype), state.solver)

        def solve():
            bargain, status = solve_bargaining(gramian, 1.0, mask)
            bargain = jnp.where(mask, bargain, kept[0])
            status = jax.tree.map(lambda n, o: n.astype(o.dtype), status, state.solver)
            return bargain, status

        if update_every == 1:
            bargain, status = solve()
        else:
            due = state.step % update_every == 0
            bargain, status = jax.lax.cond(due, solve, lambda: kept)
        return bargain, NashMTLState(bargain, state.step + 1, status, bargain)

    return from_weights(
        "nash_mtl",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="free",
        scale=scale,
    )
