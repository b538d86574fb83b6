"""Nash-MTL: the tasks bargain for a direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.solvers import SolverStatus, solve_bargaining, unsolved
from mtljax.types import Scale, Weights


class NashMTLState(NamedTuple):
    """State of :func:`nash_mtl`."""

    bargain: Weights  # α of the last solve, before any change of scale
    step: Scalar
    solver: SolverStatus
    task_weights: Weights


@factory
def nash_mtl(
    num_tasks: int, *, update_every: int = 1, scale: Scale = "native"
) -> Balancer:
    """The Nash bargaining solution (Nash-MTL).

    ``α > 0`` with ``Gα = 1/α``, ``d = Σ_i α_i g_i``: proportional fairness among the
    tasks' gains ``<g_i, d> = 1/α_i > 0``. Scaling a task's loss does not change d.

    The exact α satisfies ``‖d‖ = √T`` for *every* set of gradients: the length of the
    update carries no information and the weights grow as gradients shrink. nash-mtl and
    LibMTL therefore clip the update to norm 1, which always acts; write that as
    ``optax.chain(nash_mtl(T), optax.clip_by_global_norm(1.0), ...)``. Their solver
    stops early and returns the previous iterate; here the equation is solved to
    rounding by damped Newton.

    At a Pareto-stationary point there is no solution. The declared fallback are MGDA's
    weights, whose direction vanishes there; ``state.solver.converged`` is then False.
    A task with zero gradient gets weight zero.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      update_every: Solves at every n-th step and keeps α between (the paper uses 1,
        and 50 or 100 for reinforcement learning). A task that was absent at the last
        solve keeps the α of the one before.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale,
        which gives the update a length that follows the gradients.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: T + 5 numbers.

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
