"""Trimmed mean: coordinate by coordinate, without the extremes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtljax.balancer import Balancer, check_choice, factory, from_grads, rescale
from mtljax.types import Mask, Scale, Weights


class TrimmedMeanState(NamedTuple):
    """State of :func:`trimmed_mean`."""

    task_weights: Weights  # weight of each task, averaged over the coordinates


def trimmed_mean_kept(
    grads: Float[Array, "tasks ..."], trim: int, mask: Mask
) -> Bool[Array, "tasks ..."]:
    """Which entries remain: all but the k largest and k smallest present ones."""
    present = mask.reshape((-1,) + (1,) * (grads.ndim - 1))
    ranks = jnp.where(present, grads, jnp.inf)
    ranks = jnp.argsort(jnp.argsort(ranks, axis=0, stable=True), axis=0)
    count = mask.sum()
    cut = jnp.clip(trim, 0, jnp.maximum(count - 1, 0) // 2)
    return present & (ranks >= cut) & (ranks < count - cut)


@factory
def trimmed_mean(num_tasks: int, *, trim: int = 1, scale: Scale = "native") -> Balancer:
    """Coordinate-wise trimmed mean, from Byzantine-robust distributed learning.

    In every coordinate the k largest and the k smallest entries are dropped and the
    rest averaged: the mean for k = 0, the median for the largest k. The update depends
    on the coordinates, not on the Gramian alone.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      trim: k ≥ 0, with 2k < T. The paper removes a share of the entries; 1 is our
        default. In a batch of n present tasks at most ``(n − 1) // 2`` are cut on
        each side, so that something is left.
      scale: ``"native"`` and ``"mean"``, or ``"sum"``: times the number of tasks.

    Returns:
      A balancer; needs the stacked gradients: T backward passes. State: the weight of
      each task, averaged over the coordinates.

    Raises:
      ValueError: If ``trim`` is negative or leaves nothing.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = trimmed_mean(4, trim=1)
      >>> rows = [[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]]
      >>> grads = {"w": jnp.array(rows)}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [1.5, 2.5]

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical
      Rates <https://arxiv.org/abs/1803.01498>`_, 2018.
    """
    check_choice("trimmed_mean", "scale", scale, Scale)
    if trim < 0:
        raise ValueError(f"trimmed_mean: trim must not be negative, not {trim}.")
    if 2 * trim >= num_tasks:
        raise ValueError(
            f"trimmed_mean: trim={trim} on each side leaves nothing of "
            f"num_tasks={num_tasks}; it needs at least {2 * trim + 1} tasks."
        )

    def init(params):
        del params
        return TrimmedMeanState(jnp.ones(num_tasks, jnp.float32))

    def combine(state, grads, *, losses, mask):
        del state, losses
        unit = rescale(jnp.ones(num_tasks), mask, scale, "mean")[0]
        count = jnp.maximum(mask.sum(), 1)
        left = count - 2 * jnp.clip(trim, 0, (count - 1) // 2)
        unit = unit / left.astype(unit.dtype)

        def leaf(g):
            kept = trimmed_mean_kept(g, trim, mask)
            wide = jnp.where(kept, g, 0).astype(jnp.promote_types(g.dtype, jnp.float32))
            shares = kept.sum(tuple(range(1, g.ndim)), dtype=jnp.int32)
            return wide.sum(0) * unit.astype(wide.dtype), shares

        leaves, treedef = jax.tree.flatten(grads)
        combined, shares = zip(*map(leaf, leaves), strict=True)
        size = max(sum(g[0].size for g in leaves), 1)
        weights = sum(shares, jnp.zeros(num_tasks, jnp.float32)) * unit / size
        update = jax.tree.unflatten(treedef, combined)
        return update, TrimmedMeanState(weights.astype(jnp.float32))

    return from_grads("trimmed_mean", num_tasks, init=init, combine=combine)
