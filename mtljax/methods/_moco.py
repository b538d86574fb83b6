"""MoCo: the min-norm step on gradients tracked over the batches."""

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Scalar

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    check_choice,
    check_number,
    factory,
    from_grads,
    rescale,
)
from mtljax.methods._tracked import (
    check_tracked,
    follow,
    row_norms,
    zeros_like_stacked,
)
from mtljax.solvers import on_present, project_simplex
from mtljax.types import Gramian, Mask, Number, Scale, Weights

Compat: TypeAlias = Literal["paper", "libmtl"]


class MoCoState(NamedTuple):
    """State of :func:`moco`."""

    tracked: Any  # y, a tree [T, ...]
    shares: Weights  # λ
    steps: Int[Array, " tasks"]  # batches in which each task was present
    step: Scalar  # updates of λ
    task_weights: Weights


def moco_weights(
    shares: Weights,
    gramian: Gramian,
    gamma: Number,
    rho: Number = 0.0,
    *,
    mask: Mask | None = None,
    compat: Compat = "paper",
) -> Weights:
    """``Π(λ − γ (YYᵀ + ρI) λ)``; with ``"libmtl"`` a softmax in place of Π."""
    slope = jnp.matmul(gramian, shares, precision="highest") + rho * shares
    moved = shares - gamma * slope
    if compat == "libmtl":
        return jax.nn.softmax(moved, where=mask)
    return project_simplex(moved, mask)


@factory
def moco(
    num_tasks: int,
    *,
    beta: Number = 0.5,
    beta_sigma: Number = 0.5,
    gamma: Number = 0.1,
    gamma_sigma: Number = 0.5,
    rho: Number = 0.0,
    compat: Compat = "paper",
    scale: Scale = "native",
) -> Balancer:
    """Multi-objective gradient with correction (MoCo).

    Every task's gradient is tracked over the batches, ``y_i ← y_i − β_k (y_i − g_i)``,
    which removes the bias that the noise of one batch has on the weights; then
    ``λ ← Π(λ − γ_k (YYᵀ + ρI) λ)`` on the simplex and ``d = Σ_i λ_i y_i``. Here
    ``β_k = β/k^σ`` with k the number of batches in which the task was present, and
    ``γ_k = γ/k^σ'`` with k the number of steps. The paper's projection of ``y_i`` on a
    ball that holds all gradients is left out, as in the authors' code.

    y starts at zero: the first updates are short. γ has the unit of an inverse squared
    gradient: above ``1/‖YYᵀ‖`` the weights jump between vertices.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      beta: β in (0, 1]; 0.5 in the authors' code and LibMTL.
      beta_sigma: σ, 0.5 there.
      gamma: γ; 0.1 there.
      gamma_sigma: σ', 0.5 there.
      rho: ρ ≥ 0; 0 there.
      compat: ``"libmtl"`` brings every ``g_i`` to the length ``ℓ_i`` before it is
        tracked, and replaces the projection by a softmax of the iterate, which keeps λ
        nearly uniform. Neither is in the paper.
      scale: ``"native"`` and ``"mean"`` are weights on the simplex; ``"sum"``
        multiplies by the number of tasks.

    Returns:
      A balancer; needs the stacked gradients (and, for ``"libmtl"``, ``losses`` that
      are not negative): T
      backward passes. State: T copies of the gradient in float32 and 3 T numbers;
      initialise it with the parameters that are balanced (``mtljax.shared_params``).

    Raises:
      ValueError: If a hyper-parameter is out of its range, or the state was made for
        other parameters.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = moco(2, gamma=0.01)
      >>> state = balancer.init({"w": jnp.zeros(3)})
      >>> grads = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> update, state = balancer.update(grads, state)
      >>> update["w"].tolist()
      [0.4375, 0.5000, 0.5000]

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably
      Convergent Stochastic Approach <https://arxiv.org/abs/2210.12624>`_, 2023.
    """
    check_choice("moco", "compat", compat, Compat)
    check_choice("moco", "scale", scale, Scale)
    check_number("moco", "beta", beta, above=0.0, at_most=1.0)
    check_number("moco", "gamma", gamma, above=0.0)
    for argument, value in (
        ("beta_sigma", beta_sigma),
        ("gamma_sigma", gamma_sigma),
        ("rho", rho),
    ):
        check_number("moco", argument, value, at_least=0.0)

    def init(params):
        return MoCoState(
            zeros_like_stacked(params, num_tasks),
            jnp.full(num_tasks, 1 / num_tasks, jnp.float32),
            jnp.zeros(num_tasks, jnp.int32),
            jnp.int32(0),
            jnp.ones(num_tasks, jnp.float32),
        )

    def combine(state, grads, *, losses, mask):
        check_tracked("moco", state.tracked, grads)
        steps, step = state.steps + mask, state.step + 1
        factors = jnp.ones(num_tasks, jnp.float32)
        if compat == "libmtl":
            norms = row_norms(grads)
            factors = jnp.where(norms > 0, losses / jnp.where(norms > 0, norms, 1), 0)
        rates = beta / jnp.maximum(steps, 1).astype(jnp.float32) ** beta_sigma
        tracked = follow(state.tracked, grads, rates, mask, factors)
        present = stack.select(tracked, mask)
        gramian = stack.gramian(present)
        rate = gamma / step.astype(jnp.float32) ** gamma_sigma
        shares, kept = on_present(
            state.shares,
            mask,
            lambda s: moco_weights(s, gramian, rate, rho, mask=mask, compat=compat),
        )
        weights = rescale(shares, mask, scale, "mean")
        return stack.combine(present, weights), MoCoState(
            tracked, kept, steps, step, weights
        )

    return from_grads(
        "moco",
        num_tasks,
        init=init,
        combine=combine,
        reads_losses=compat == "libmtl",
        domain=(lambda losses: losses >= 0) if compat == "libmtl" else None,
    )
