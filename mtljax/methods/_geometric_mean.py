"""Geometric loss strategy (GLS): the geometric mean of the losses."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.types import Losses, Mask, Scale, Weights


class GeometricMeanState(NamedTuple):
    """State of :func:`geometric_mean`."""

    task_weights: Weights


def geometric_mean_weights(losses: Losses, mask: Mask | None = None) -> Weights:
    """Computes ``L / (n ℓ_i)``, the gradient of ``L = (Π ℓ_i)^{1/n}``.

    n is the number of present tasks.
    """
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    count = jnp.maximum(mask.sum(), 1)
    # The product of many losses may underflow or overflow. The mean of the logs does
    # not.
    logs = jnp.log(losses)
    mean = jnp.where(mask, logs, 0).sum() / count
    return jnp.where(mask, jnp.exp(mean - logs), 0) / count


@factory
def geometric_mean(num_tasks: int, *, scale: Scale = "native") -> Balancer:
    """Geometric loss strategy (GLS): descends the geometric mean of the losses.

    The objective is ``L = (Π_i ℓ_i)^{1/T}``, so the weights are ``w_i = L / (T ℓ_i)``.
    The update has the direction of :func:`mtljax.scale_invariant` and a norm that
    decreases with the losses. The logged weights are these derivatives. LibMTL logs
    different weights for the same update.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      scale: ``"native"``, or weights normalised to the ``"sum"`` or ``"mean"`` scale.
        With a normalised scale the method is identical to
        :func:`mtljax.scale_invariant` on that scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be positive. A step
      costs one backward pass. The state contains the last task weights only.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.geometric_mean(3)
      >>> grads = {"w": jnp.eye(3)}
      >>> losses = jnp.array([0.5, 2.0, 1.0])
      >>> balancer.update(grads, balancer.init(grads), losses=losses)[0]["w"].tolist()
      [0.667, 0.167, 0.333]

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric
      Loss Strategy for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_, 2019.
    """

    def init():
        return GeometricMeanState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del gramian
        return geometric_mean_weights(losses, mask), state

    return from_weights(
        "geometric_mean",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        positive_losses=True,
    )
