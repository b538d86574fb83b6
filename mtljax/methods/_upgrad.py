"""UPGrad: projects each gradient onto the dual cone and averages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.solvers import SolverStatus, nonnegative_qp, unsolved
from mtljax.types import Gramian, Mask, Scale, Weights


class UPGradState(NamedTuple):
    """State of :func:`upgrad`."""

    solver: SolverStatus
    task_weights: Weights


def upgrad_weights(
    gramian: Gramian, preference: Weights, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes ``Σ_i p_i argmin_{v ≥ e_i} vᵀGv`` with T parallel QPs."""
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    # project_cone for the unit vectors. The slope of unit vector i is row i of G.
    solve = jax.vmap(lambda row: nonnegative_qp(gramian, row, mask=mask))
    added, _, status = solve(gramian)
    preference = jnp.where(mask, preference, 0)
    weights = preference + jnp.matmul(preference, added, precision="highest")
    residual = jnp.max(status.residual, where=mask, initial=0)
    converged = (status.converged | ~mask).all()
    return weights, SolverStatus(residual, status.iterations.max(), converged)


@factory
def upgrad(
    num_tasks: int, *, preference: TaskVector | None = None, scale: Scale = "native"
) -> Balancer:
    """Unconflicting projection of gradients (UPGrad), the default of TorchJD.

    Each gradient ``p_i g_i`` is projected onto the dual cone
    ``{d : <g_j, d> ≥ 0 for all j}`` of directions in which no task gets worse. The
    update is the sum of the projections. Its weights are
    ``w = Σ_i argmin_{v ≥ p_i e_i} vᵀGv``. The update conflicts with no task and is
    linear in the norm of each gradient. For two tasks it has the direction of PCGrad.

    The problem is solved exactly. TorchJD adds 1e-4 times the trace to the Gramian,
    which changes the third digit and violates the linearity.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      preference: Preference p, shape ``[T]``, non-negative, equal by default. It is
        normalised to sum to 1 over the present tasks. ``update(..., preference=p)``
        overrides it.
      scale: ``"native"`` and ``"mean"`` are the mean of the gradients if there is no
        conflict. ``"sum"`` multiplies the update by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes
      and T small QPs. The state contains a solver status with the largest residual of
      these QPs.

    Raises:
      ValueError: If the number of preferences differs from T, or a preference is
        negative.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.upgrad(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.2924, 1.9006, 1.9006]

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.
    """
    constant = constant_preference("upgrad", num_tasks, preference)

    def init():
        return UPGradState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del losses
        dtype = gramian.dtype
        chosen = present_preference("upgrad", constant, preference, mask, dtype)
        weights, status = upgrad_weights(gramian, chosen, mask)
        return weights, state._replace(solver=status)

    return from_weights(
        "upgrad",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
        side_inputs=("preference",),
    )
