"""GCS: adds auxiliary gradients with a positive cosine to the main one."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._main_task import check_main
from mtljax.types import Gramian, Scale, Weights


class GCSState(NamedTuple):
    """State of :func:`gcs`."""

    task_weights: Weights


def gcs_weights(gramian: Gramian, main: int, *, weighted: bool) -> Weights:
    """Computes the weights of :func:`gcs`. The weight of the main task is 1."""
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
    """Gradient cosine similarity for auxiliary tasks (GCS).

    The update is ``d = g_m + Σ_{k≠m} γ_k g_k``, where m is the main task and
    ``γ_k = 1[cos(g_m, g_k) > 0]``. With ``weighted=True``,
    ``γ_k = max(0, cos(g_m, g_k))``. To first order, the auxiliary gradients never slow
    down the *main* task, but auxiliary tasks can get worse. If the main task is absent
    from the batch, the update is zero.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      main: Index m of the main task.
      weighted: Whether to multiply by the cosine instead of the indicator. The paper
        contains both variants.
      scale: The native scale is ``"sum"``.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the last task weights only.

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
