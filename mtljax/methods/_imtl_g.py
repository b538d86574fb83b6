"""IMTL-G: a direction with equal projections onto all task gradients."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.solvers import SolverStatus, pinv_solve, unsolved
from mtljax.types import Gramian, Mask, Scale, Weights


class IMTLGState(NamedTuple):
    """State of :func:`imtl_g`."""

    solver: SolverStatus
    task_weights: Weights


def imtl_g_weights(
    gramian: Gramian, mask: Mask | None = None, *, sign_guard: bool = False
) -> tuple[Weights, SolverStatus]:
    """Computes ``w_i ∝ (C⁺1)_i / ‖g_i‖`` with ``Σ w = 1`` and the cosine matrix C."""
    num = gramian.shape[0]
    eps = jnp.finfo(gramian.dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    active = mask & (norms > jnp.finfo(gramian.dtype).tiny)
    norms = jnp.where(active, norms, 1)
    cosines = gramian / norms[:, None] / norms[None, :]
    ones = active.astype(gramian.dtype)
    solution, outside = pinv_solve(cosines, ones)
    # The smallest gradient norm as the unit keeps the weights in range.
    unit = jnp.min(norms, where=active, initial=jnp.inf)
    raw = jnp.where(active, solution * (unit / norms), 0)
    total, size = raw.sum(), jnp.abs(raw).sum()
    degenerate = (jnp.abs(total) <= 8 * num * eps * size) | ~active.any()
    if sign_guard:
        weights = raw / jnp.where(degenerate, 1, size)
    else:
        weights = raw / jnp.where(degenerate, 1, total)
    mean = mask / jnp.maximum(mask.sum(), 1).astype(gramian.dtype)
    weights = jnp.where(degenerate, mean, weights)
    status = SolverStatus(outside, jnp.int32(1), ~degenerate & (outside < 1e-2))
    return weights, status


@factory
def imtl_g(
    num_tasks: int, *, sign_guard: bool = False, scale: Scale = "native"
) -> Balancer:
    """Impartial multi-task learning, gradient part (IMTL-G).

    The update is ``d = Σ_i w_i g_i`` with ``Σ_i w_i = 1``, such that the projection
    ``<d, u_i>`` is the same for all unit gradients ``u_i``. With the Gramian G and the
    norms ``n_i = ‖g_i‖`` the weights are ``w ∝ G⁻¹n``. Weights may be negative.

    The normalisation by the sum can change the sign. If ``1ᵀG⁻¹n < 0``, all projections
    are equal and *negative*, and the published rule increases every loss to first
    order. This is impossible for T = 2. ``sign_guard=True`` normalises by ``Σ|w|``
    instead, so that every loss decreases.

    If the sum is zero, the weights are equal. ``state.solver.converged`` is then False.
    It is also False if the gradients are linearly dependent and no direction has equal
    projections.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      sign_guard: Whether to orient d such that its projections are positive. Not in the
        paper.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1. ``"sum"`` multiplies
        them by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the solver status. Its residual is the relative norm of the
      unsatisfied part of the equations.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.imtl_g(2)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> state.task_weights.tolist()
      [0.5923, 0.4077]

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.
    """

    def init():
        return IMTLGState(unsolved(), jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        weights, status = imtl_g_weights(gramian, mask, sign_guard=sign_guard)
        return weights, state._replace(solver=status)

    return from_weights(
        "imtl_g",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
    )
