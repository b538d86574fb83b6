"""Recomputes the running statistics of a merged model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recompute_statistics(
    update: Callable[[Any, Any], Any], statistics: Any, batches: Any, *, momentum: float
) -> Any:
    """Recomputes the statistics of batch normalisation from k batches.

    The statistics of a mixture of networks differ from the mixture of their statistics.
    This function averages the batch statistics of the merged network over k batches
    with equal weights. Call it in the ``refresh`` of a search, so that candidates are
    scored with the statistics that are used later.

    Args:
      update: ``update(statistics, batch) -> statistics``, a forward pass in training
        mode that updates running averages by ``s <- m s + (1 − m) s_batch``.
      statistics: The running averages. Only their shapes and dtypes are used.
      batches: Pytree of arrays ``[k, ...]``.
      momentum: m, at least 0 and below 1 (flax uses 0.99 by default).

    Returns:
      The statistics. The cost is k forward passes.

    Raises:
      ValueError: If ``momentum`` is outside [0, 1), or if ``batches`` is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import recompute_statistics
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
        raise ValueError(
            "recompute_statistics: there is no batch to measure on. Pass arrays "
            "[k, ...] with k >= 1."
        )
    nothing = jax.tree.map(jnp.zeros_like, statistics)
    each = jax.lax.map(lambda batch: update(nothing, batch), batches)
    return jax.tree.map(
        lambda x, old: (x.mean(0) / (1 - momentum)).astype(old.dtype), each, statistics
    )
