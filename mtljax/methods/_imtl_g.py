"""IMTL-G: a direction whose projections on all task gradients are equal."""

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
    """``w_i ∝ (C⁺1)_i / ‖g_i‖`` with C the cosine matrix, normalised to ``Σ w = 1``."""
    num = gramian.shape[0]
    eps = jnp.finfo(gramian.dtype).eps
    mask = jnp.ones(num, bool) if mask is None else mask
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    active = mask & (norms > jnp.finfo(gramian.dtype).tiny)
    norms = jnp.where(active, norms, 1)
    cosines = gramian / norms[:, None] / norms[None, :]
    ones = active.astype(gramian.dtype)
    solution, outside = pinv_solve(cosines, ones)
    # Rows of the smallest gradient as unit of length keep the weights in range.
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

    ``d = Σ_i w_i g_i`` with ``Σ_i w_i = 1`` and ``<d, u_i>`` the same for all unit
    gradients ``u_i``. In Gram form ``w ∝ G⁻¹n`` with ``n_i = ‖g_i‖``; weights may be
    negative.

    The normalisation by the sum can flip the sign: for ``1ᵀG⁻¹n < 0`` all projections
    are equal and *negative*, so the published rule steps uphill for every task (never
    for T = 2). ``sign_guard=True`` normalises by ``Σ|w|`` instead, which keeps the
    direction in which every task falls. Where the sum vanishes, or the gradients are
    linearly dependent in a way that admits no equal projections,
    ``state.solver.converged`` is False; the fallback for a vanishing sum are equal
    weights.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      sign_guard: Orients d so that its projections are positive. Off: the paper's rule.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1; ``"sum"`` multiplies
        by the number of tasks.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: the solver's certificate
      (residual: share of the equations that cannot be met).

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
