"""Gradient-norm weighting: averaged weights for equal gradient norms."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.types import Number, Scale, Weights


class GradientNormWeightingState(NamedTuple):
    """State of :func:`gradient_norm_weighting`."""

    average: Weights
    step: Int[Array, ""]
    task_weights: Weights


@factory
def gradient_norm_weighting(
    num_tasks: int,
    *,
    decay: Number = 0.9,
    update_every: int = 1000,
    scale: Scale = "native",
) -> Balancer:
    """Gradient-norm weighting with a moving average of the weights, as in jaxpi.

    Every N steps the weights become ``w ← a w + (1 − a) ŵ`` with
    ``ŵ_i = (1/T) Σ_j ‖g_j‖ / ‖g_i‖``. They start at ``w = 1``. The update is
    ``Σ_i w_i g_i``. The method is used for the residual, boundary and data losses of
    physics-informed networks, whose gradient norms differ by orders of magnitude.
    Unlike GradNorm (:func:`mtljax.gradnorm`) it does not read the losses.

    A task with a zero gradient is excluded from the mean, and its weight does not
    change.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      decay: Decay a of the moving average, at least 0 (no average) and below 1.
      update_every: Number of steps N between two changes of the weights. They change at
        steps 0, N, 2N and so on.
      scale: ``"native"`` does not normalise the weights. They are 1 if all norms are
        equal. ``"sum"`` and ``"mean"`` normalise them.

    Returns:
      A :class:`mtljax.Balancer` that reads the diagonal of the Gramian. A step costs T
      backward passes. The state has T numbers and the number of steps.

    Raises:
      ValueError: If ``decay`` is outside [0, 1), or ``update_every`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.gradient_norm_weighting(2, decay=0.0)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
      >>> update, _ = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist()
      [2.000, 2.000]

    References:
      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023.
    """
    check_number("gradient_norm_weighting", "decay", decay, at_least=0.0, below=1.0)
    if update_every < 1:
        raise ValueError(
            "gradient_norm_weighting: update_every must be positive, "
            f"not {update_every}."
        )

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        return GradientNormWeightingState(ones, jnp.int32(0), ones)

    def weigh(state, *, losses, gramian, mask):
        del losses
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        active = mask & (norms > 0)
        mean = norms.sum(where=active) / jnp.maximum(active.sum(), 1)
        target = mean / jnp.where(active, norms, 1)
        due = active & (state.step % update_every == 0)
        mixed = decay * state.average + (1 - decay) * target
        average = jnp.where(due, mixed, state.average)
        return average, state._replace(average=average, step=state.step + 1)

    return from_weights(
        "gradient_norm_weighting",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="free",
        scale=scale,
    )
