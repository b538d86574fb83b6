"""Task affinity: effect of a step on one task on the loss of another task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtljax.gradients.linearized import VectorLosses
from mtljax.trajectory import _trees as trees
from mtljax.types import Gramian


def task_affinity(
    task_losses: Callable[[Any, Any], Any], params: Any, batch: Any, *, lr: float
) -> Gramian:
    r"""Computes the inter-task affinity ``Z[i, j]`` of one batch.

    .. math:: Z_{ij} = 1 - L_j(θ - η ∇L_i) / L_j(θ)

    The entry is the relative decrease of the loss of task j after a step on task i. The
    matrix is not symmetric. To first order it is :math:`η ⟨g_i, g_j⟩ / L_j`. TAG
    averages it over training.

    Args:
      task_losses: A function ``task_losses(params, batch)`` that returns the losses,
        shape ``[T]``, or a dict by task. It closes over the heads.
      params: The shared parameters.
      batch: One batch.
      lr: η, the learning rate of the step of plain gradient descent.

    Returns:
      An array of shape ``[T, T]``. It is not finite if a loss is 0. The cost is 1
      forward, T backward and T further forward passes, one task at a time. The memory
      is 3 copies of the parameters.

    Raises:
      ValueError: If ``lr`` is negative, or if the losses are not a vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import task_affinity
      >>> losses = lambda w, batch: jnp.stack([w**2, 4 - w])
      >>> task_affinity(losses, jnp.array(1.0), None, lr=0.5).tolist()
      [[1.0, -0.333], [-1.25, 0.167]]

    References:
      Fifty et al., `arXiv 2109.04617 <https://arxiv.org/abs/2109.04617>`_, 2021.
    """
    name = "task_affinity"
    if not lr >= 0:
        raise ValueError(f"{name}: lr={lr!r} must be at least 0.")
    trees.check_params(name, params)
    named_losses = VectorLosses(task_losses, (batch,), {})
    losses, pull = jax.vjp(named_losses, params)
    if losses.ndim != 1:
        raise ValueError(
            f"{name}: task_losses returned shape {losses.shape}; it must be [T]."
        )

    def look(row):
        (gradient,) = pull(row)
        return named_losses(trees.shifted(params, gradient, -lr))

    after = jax.lax.map(look, jnp.eye(losses.shape[0], dtype=losses.dtype))
    return 1 - after / losses[None]
