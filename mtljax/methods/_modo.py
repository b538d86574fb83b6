"""MoDo: one projected gradient step of the weights with double sampling."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._cross import cross_or_own
from mtljax.solvers import on_present, project_simplex
from mtljax.types import Gramian, Mask, Number, Scale, Weights


class MoDoState(NamedTuple):
    """State of :func:`modo`."""

    shares: Weights  # λ
    task_weights: Weights


def modo_weights(
    shares: Weights,
    gramian: Gramian,
    gamma: Number,
    rho: Number,
    mask: Mask | None = None,
) -> Weights:
    """Computes ``Π(λ − γ (Gλ + ρλ))`` on the simplex of the present tasks."""
    slope = jnp.matmul(gramian, shares, precision="highest") + rho * shares
    return project_simplex(shares - gamma * slope, mask)


@factory
def modo(
    num_tasks: int, *, gamma: Number = 1e-3, rho: Number = 0.1, scale: Scale = "native"
) -> Balancer:
    """Multi-objective gradient with double sampling (MoDo).

    The update is ``d = Σ_i λ_i g_i`` with ``λ ← Π(λ − γ (J₁J₂ᵀ λ + ρλ))``, where Π is
    the projection onto the simplex. This is one step per batch towards the min-norm
    weights, which are those of MGDA for ``ρ = 0``. The gradients ``J₁`` and ``J₂`` come
    from two independent batches, so that the step is unbiased. Pass
    ``update(..., cross_gramian=mtljax.stack.cross_gramian(grads1, grads2))``. In the
    paper, ``g_i`` comes from a third batch. Without ``cross_gramian`` the method uses
    the Gramian of the batch, whose diagonal is biased by the gradient noise.

    **γ has the unit of an inverse squared gradient.** If γ is above ``1/‖G‖``, where
    ``‖G‖`` is the largest eigenvalue, λ oscillates between the vertices of the simplex.
    If γ is far below, λ remains nearly uniform. Monitor ``state.task_weights``, or
    scale the gradients to a known norm first.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      gamma: Step size γ of λ. LibMTL's copy of the authors' code uses 1e-3, and TorchJD
        0.1. The paper does not use a single value.
      rho: Regularisation ρ ≥ 0, which moves λ towards uniform weights. LibMTL and
        TorchJD use 0.1.
      scale: ``"native"`` and ``"mean"`` are weights on the simplex. ``"sum"``
        multiplies them by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes,
      and 2 T more for the ``cross_gramian`` of two other batches. The state has T
      numbers.

    Raises:
      ValueError: If ``gamma`` is not positive, ``rho`` is negative, or the shape of
        ``cross_gramian`` is not ``[T, T]``.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.modo(2, gamma=0.01, rho=0.0)
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> cross = mtljax.stack.cross_gramian(grads, grads)
      >>> _, state = balancer.update(grads, balancer.init(grads), cross_gramian=cross)
      >>> state.task_weights.tolist()
      [0.55, 0.45]

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization,
      Generalization and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_, 2023.
    """
    check_number("modo", "gamma", gamma, above=0.0)
    check_number("modo", "rho", rho, at_least=0.0)

    def init():
        return MoDoState(
            jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            jnp.ones(num_tasks, jnp.float32),
        )

    def weigh(state, *, losses, gramian, mask, cross_gramian):
        del losses
        matrix, finite = cross_or_own("modo", gramian, cross_gramian, mask)
        weights, shares = on_present(
            state.shares, mask, lambda s: modo_weights(s, matrix, gamma, rho, mask)
        )
        shares = jnp.where(finite, shares, state.shares)
        return jnp.where(finite, weights, jnp.nan), state._replace(shares=shares)

    return from_weights(
        "modo",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
        side_inputs=("cross_gramian",),
    )
