"""FairGrad: the direction with α-fair gains of the tasks."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.solvers import SolverStatus, solve_bargaining, unsolved
from mtljax.types import Gramian, Mask, Number, Scale, Weights


class FairGradState(NamedTuple):
    """State of :func:`fairgrad`."""

    solver: SolverStatus
    task_weights: Weights


def fairgrad_weights(
    gramian: Gramian, alpha: Number, mask: Mask | None = None
) -> tuple[Weights, SolverStatus]:
    """Computes ``w > 0`` with ``Gw = w^(-1/α)``."""
    return solve_bargaining(gramian, alpha, mask)


def mean_length(
    gramian: Gramian, weights: Weights, mask: Mask | None = None
) -> Weights:
    """Scales the weights such that the update has the norm of the mean gradient.

    If the update is zero up to rounding, as at a Pareto-stationary point, the weights
    are returned unchanged.
    """
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    eps = jnp.finfo(gramian.dtype).eps
    largest = jnp.max(jnp.diagonal(gramian), where=mask, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    gramian = gramian / largest
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    total = jnp.where(mask, weights * norms, 0).sum()  # sum of the norms of the terms
    unit = weights / jnp.where(total > 0, total, 1)
    mean = mask.astype(gramian.dtype) / jnp.maximum(mask.sum(), 1)

    def square(w):
        return jnp.maximum(w @ jnp.matmul(gramian, w, precision="highest"), 0)

    length = square(unit)
    flat = length < 8 * num * eps
    ratio = jnp.sqrt(square(mean) / jnp.where(flat, 1, length))
    return jnp.where(flat, weights, unit * ratio)


@factory
def fairgrad(
    num_tasks: int,
    *,
    alpha: Number = 2.0,
    normalize_degree: bool = False,
    scale: Scale = "native",
) -> Balancer:
    """Fair resource allocation among tasks (FairGrad).

    The update is ``d = Σ_i w_i g_i`` with the solution ``w > 0`` of
    ``Gw = w^(-1/α)``, where G is the Gramian. This direction maximises the α-fair
    utility of the gains ``<g_i, d>``, which are all positive. α = 1 is proportional
    fairness (Nash-MTL). The limit α → 0 is the sum of the gradients. The limit α → ∞ is
    the direction of MGDA, which maximises the smallest gain.

    The update is homogeneous of degree ``(1−α)/(1+α)`` in the gradients. For α = 2 its
    norm *increases* as the gradients decrease. For α = 1 its norm is always √T. The
    official code clips the norm to 1. To do the same, use
    ``optax.chain(fairgrad(T), optax.clip_by_global_norm(1.0), ...)``, or use
    ``normalize_degree``.

    The equation is solved by a damped Newton method instead of a least-squares search.
    It has no solution at a Pareto-stationary point. The weights are then those of MGDA,
    whose direction vanishes there, and ``state.solver.converged`` is False. The weight
    of a task with a zero gradient is zero.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      alpha: α > 0. All scripts of the authors use 2. LibMTL and TorchJD default to 1.
        Below 0.05, float32 may not be sufficient; check ``state.solver.converged``.
      normalize_degree: Whether to scale the update to the norm of the mean gradient, so
        that it is homogeneous of degree 1. Not in the paper.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        With ``normalize_degree`` the native scale is ``"mean"``.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the solver status.

    Raises:
      ValueError: If ``alpha`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.fairgrad(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [0.0313, 0.7908, 0.7908]

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, 2024.
    """
    check_number("fairgrad", "alpha", alpha, above=0.0)

    def init():
        return FairGradState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        weights, status = fairgrad_weights(gramian, alpha, mask)
        if normalize_degree:
            weights = mean_length(gramian, weights, mask)
        return weights, state._replace(solver=status)

    return from_weights(
        "fairgrad",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean" if normalize_degree else "free",
        scale=scale,
    )
