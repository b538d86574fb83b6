"""FairGrad: α-fair shares of the improvement."""

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
    """``w > 0`` with ``Gw = w^(-1/α)``."""
    return solve_bargaining(gramian, alpha, mask)


def mean_length(
    gramian: Gramian, weights: Weights, mask: Mask | None = None
) -> Weights:
    """Weights of the same direction, as long as the mean gradient.

    A direction that has no length but rounding, as at a Pareto-stationary point, stays
    as it is.
    """
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    eps = jnp.finfo(gramian.dtype).eps
    largest = jnp.max(jnp.diagonal(gramian), where=mask, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    gramian = gramian / largest
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    total = jnp.where(mask, weights * norms, 0).sum()  # of the lengths of the terms
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

    ``w > 0`` with ``Gw = w^(-1/α)``, ``d = Σ_i w_i g_i``: the direction that maximises
    the α-fair utility of the tasks' gains ``<g_i, d>``, all positive. α = 1 is
    proportional fairness (Nash-MTL), α → 0 the sum of the gradients, α → ∞ the largest
    minimal gain, the direction of MGDA.

    The update is homogeneous of degree ``(1−α)/(1+α)`` in the gradients: for α = 2 it
    *grows* as they shrink, for α = 1 its length is √T always. The official code clips
    its norm to 1; write ``optax.chain(fairgrad(T), optax.clip_by_global_norm(1.0),
    ...)``, or ask for ``normalize_degree``.

    The equation is solved by damped Newton instead of a least-squares search. At a
    Pareto-stationary point there is no solution: the declared fallback are MGDA's
    weights, whose direction vanishes there, and ``state.solver.converged`` is False. A
    task with zero gradient gets weight zero.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      alpha: α > 0. 2 in all scripts of the authors; LibMTL and TorchJD default to 1.
        Below 0.05 float32 may not suffice; ``state.solver.converged`` tells.
      normalize_degree: Keeps the direction and gives it the length of the mean
        gradient, so that the update is of degree 1. Ours, not the paper's; off.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        With ``normalize_degree`` the native scale is the mean's.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: the solver's certificate.

    Raises:
      ValueError: If α is not positive.

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
