"""MoCo: min-norm weights from moving averages of the gradients."""

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

    tracked: Any  # y, moving averages of the gradients, [T, ...]
    shares: Weights  # λ
    steps: Int[Array, " tasks"]  # batches in which each task was present
    step: Scalar  # number of updates of λ
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
    """Computes ``Π(λ − γ (YYᵀ + ρI) λ)``. With ``"libmtl"``, Π is a softmax."""
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

    The method tracks the gradient of each task with a moving average,
    ``y_i ← y_i − β_k (y_i − g_i)``. This removes the bias of the weights that the noise
    of one batch causes. The weights are updated by ``λ ← Π(λ − γ_k (YYᵀ + ρI) λ)``,
    where Π is the projection onto the simplex. The update is ``d = Σ_i λ_i y_i``. Here
    ``β_k = β/k^σ``, where k is the number of batches in which the task was present, and
    ``γ_k = γ/k^σ'``, where k is the number of steps. The paper also projects ``y_i``
    onto a ball that contains all gradients. This projection is omitted, as in the
    authors' code.

    The averages start at zero, so the first updates are small. γ has the unit of an
    inverse squared gradient. Above ``1/‖YYᵀ‖`` the weights oscillate between vertices
    of the simplex.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      beta: Rate β of the moving average, in (0, 1]. The authors' code and LibMTL use
        0.5.
      beta_sigma: Exponent σ ≥ 0 of the rate. They use 0.5.
      gamma: Step size γ > 0 of the weights. They use 0.1.
      gamma_sigma: Exponent σ' ≥ 0 of the step size. They use 0.5.
      rho: Regularisation ρ ≥ 0. They use 0.
      compat: ``"libmtl"`` scales every ``g_i`` to the norm ``ℓ_i`` before the average.
        It also replaces the projection by a softmax, which keeps λ nearly uniform.
        Neither is in the paper.
      scale: ``"native"`` and ``"mean"`` are weights on the simplex. ``"sum"``
        multiplies them by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the stacked gradients and, with
      ``compat="libmtl"``, ``losses``, which must not be negative. A step costs T
      backward passes. The state contains T copies of the gradient in float32 and 2 T
      numbers. Initialise it with the parameters that are balanced, see
      :func:`mtljax.shared_params`.

    Raises:
      ValueError: If a hyper-parameter is out of its range, or the state was initialised
        with other parameters.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.moco(2, gamma=0.01)
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
        # The projection hides an overflow. The step must fail, because otherwise no
        # later step would have a finite Gramian.
        shares = jnp.where(jnp.isfinite(gramian).all(), shares, jnp.nan)
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
