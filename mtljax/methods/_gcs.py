"""Gradient cosine similarity: an auxiliary task helps only where it agrees."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._main_task import check_main
from mtljax.types import Gramian, Scale, Weights


class GCSState(NamedTuple):
    """State of :func:`gcs`."""

    task_weights: Weights


def gcs_weights(gramian: Gramian, main: int, *, weighted: bool) -> Weights:
    """One for the main task; for the others their cosine with it, or its sign, >= 0."""
    products = gramian[main]
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    lengths = norms * norms[main]
    cosines = products / jnp.where(lengths > 0, lengths, 1)
    gate = jnp.clip(cosines, 0, 1) if weighted else (products > 0).astype(norms.dtype)
    return gate.at[main].set(1)


@factory
def gcs(
    num_tasks: int, *, main: int = 0, weighted: bool = False, scale: Scale = "native"
) -> Balancer:
    """Gates auxiliary tasks by the cosine of their gradient with the main task's (GCS).

    ``d = g_m + Σ_{k≠m} γ_k g_k`` with ``γ_k = 1[cos(g_m, g_k) > 0]``, or
    ``max(0, cos(g_m, g_k))`` with ``weighted=True``. For the *main* task alone: it is
    never slowed down to first order, the auxiliary tasks may be. A batch without the
    main task gives no update of the shared parameters: nothing can be said to help it.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      main: Index m of the main task.
      weighted: Multiply by the cosine instead of gating; both are the paper's.
      scale: The native scale is that of the ``"sum"``.

    Returns:
      A balancer; needs the Gramian: T backward passes. No state.

    Raises:
      ValueError: If ``main`` is not the index of a task.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.gcs(3)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 1.0]])}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> update["w"].tolist(), state.task_weights.tolist()
      ([2.0, 1.0], [1.0, 1.0, 0.0])

    References:
      Du et al., `Adapting Auxiliary Losses Using Gradient Similarity
      <https://arxiv.org/abs/1812.02224>`_, 2018.
    """
    check_main("gcs", num_tasks, main)

    def init():
        return GCSState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses
        weights = gcs_weights(gramian, main, weighted=weighted)
        return jnp.where(mask[main], weights, 0), state

    return from_weights(
        "gcs",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
    )
