"""DualProj: projects the mean gradient onto the dual cone."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._preference import (
    TaskVector,
    constant_preference,
    present_preference,
)
from mtljax.solvers import SolverStatus, project_cone, unsolved
from mtljax.types import Gramian, Mask, Scale, Weights


class DualProjState(NamedTuple):
    """State of :func:`dualproj`."""

    solver: SolverStatus
    task_weights: Weights


def dualproj_weights(
    gramian: Gramian, preference: Weights, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes ``argmin_{v ≥ p} vᵀGv``."""
    return project_cone(gramian, preference, mask)


@factory
def dualproj(
    num_tasks: int, *, preference: TaskVector | None = None, scale: Scale = "native"
) -> Balancer:
    """Projection of the mean gradient on the dual cone (GEM, DualProj).

    The update is the vector nearest to ``Σ_i p_i g_i`` in the dual cone
    ``{d : <g_j, d> ≥ 0 for all j}`` of directions in which no task gets worse. The
    weights are ``w = argmin_{v ≥ p} vᵀGv``. The projection increases weights and does
    not decrease any. If the mean gradient conflicts with no task, it is returned
    unchanged.

    GEM projects the gradient of the current task with respect to the gradients of the
    memory. This corresponds to a one-hot ``preference``. The problem is solved exactly,
    without the ridge of TorchJD.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      preference: Preference p, shape ``[T]``, non-negative, equal by default. It is
        normalised to sum to 1 over the present tasks. ``update(..., preference=p)``
        overrides it.
      scale: ``"native"`` and ``"mean"`` are the mean of the gradients if there is no
        conflict. ``"sum"`` multiplies the update by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes
      and one small QP. The state contains the solver status.

    Raises:
      ValueError: If the number of preferences differs from T, or a preference is
        negative.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.dualproj(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.5556, 1.1111, 1.1111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017. The name DualProj is that of TorchJD:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.
    """
    constant = constant_preference("dualproj", num_tasks, preference)

    def init():
        return DualProjState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del losses
        dtype = gramian.dtype
        chosen = present_preference("dualproj", constant, preference, mask, dtype)
        weights, status = dualproj_weights(gramian, chosen, mask)
        return weights, state._replace(solver=status)

    return from_weights(
        "dualproj",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
        side_inputs=("preference",),
    )
