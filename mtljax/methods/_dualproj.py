"""DualProj: the mean gradient, projected on the cone where no task gets worse."""

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
    """``argmin_{v ≥ p} vᵀGv``."""
    return project_cone(gramian, preference, mask)


@factory
def dualproj(
    num_tasks: int, *, preference: TaskVector | None = None, scale: Scale = "native"
) -> Balancer:
    """Projection of the mean gradient on the dual cone (GEM, DualProj).

    The vector nearest to ``Σ_i p_i g_i`` among those that make no task worse,
    ``{d : <g_j, d> ≥ 0 for all j}``. In weights ``w = argmin_{v ≥ p} vᵀGv``: tasks
    gain weight where the mean would hurt them, and none loses any. The mean itself
    where it hurts nobody.

    GEM projects the gradient of the current task against those of the memory; that is
    ``preference`` one-hot. Solved exactly, without TorchJD's ridge.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      preference: p ``[T]``, not negative, normalised to sum to 1 over the present
        tasks; equal by default. ``update(..., preference=p)`` overrides it.
      scale: ``"native"`` and ``"mean"``: the mean of the gradients where nothing
        conflicts; ``"sum"`` multiplies by the number of present tasks.

    Returns:
      A balancer; needs the Gramian: T backward passes and one small QP. State: the
      solver's certificate.

    Raises:
      ValueError: If the preference has another length than T or a negative entry.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.dualproj(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.5556, 1.1111, 1.1111]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017; the name is TorchJD's (Quinton and
      Rey, arXiv 2406.16232).
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
