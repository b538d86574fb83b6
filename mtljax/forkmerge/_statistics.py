"""Running statistics of a merged model, measured anew."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recompute_statistics(
    update: Callable[[Any, Any], Any], statistics: Any, batches: Any, *, momentum: float
) -> Any:
    """Statistics of batch normalisation from k batches, instead of averaged ones.

    The mean of a mixture of networks is not the mixture of their means. Here the batch
    statistics of the merged network are averaged over k batches, with equal weight.
    Write it into the ``refresh`` of a search to score candidates as they would be used.

    Args:
      update: ``update(statistics, batch) -> statistics``, a forward pass in training
        mode, which moves running averages by ``s <- m s + (1 − m) s_batch``.
      statistics: The running averages; only their shapes matter.
      batches: Pytree of arrays ``[k, ...]``.
      momentum: m, at least 0 and below 1 (flax: 0.99 by default).

    Returns:
      The statistics. Cost: k forward passes.

    Raises:
      ValueError: If ``momentum`` is outside [0, 1), or there is no batch.

    Examples:
      >>> move = lambda s, x: {"mean": 0.9 * s["mean"] + 0.1 * x.mean()}
      >>> batches = jnp.array([[0.0, 2.0], [4.0, 6.0]])
      >>> recompute_statistics(move, {"mean": jnp.array(99.0)}, batches, momentum=0.9)
      {'mean': Array(3., dtype=float32)}
    """
    if not 0 <= momentum < 1:
        raise ValueError(
            f"recompute_statistics: momentum={momentum} must be at least 0 and below 1."
        )
    leaves = jax.tree.leaves(batches)
    if not leaves or any(jnp.ndim(x) == 0 or jnp.shape(x)[0] == 0 for x in leaves):
        raise ValueError("recompute_statistics: there is no batch to measure on.")
    nothing = jax.tree.map(jnp.zeros_like, statistics)
    each = jax.lax.map(lambda batch: update(nothing, batch), batches)
    return jax.tree.map(
        lambda x, old: (x.mean(0) / (1 - momentum)).astype(old.dtype), each, statistics
    )
