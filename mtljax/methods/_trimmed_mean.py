"""Trimmed mean: coordinate-wise mean without the extreme entries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtljax import stack
from mtljax.balancer import Balancer, check_choice, factory, from_grads, rescale
from mtljax.types import Mask, Scale, Weights


class TrimmedMeanState(NamedTuple):
    """State of :func:`trimmed_mean`."""

    task_weights: Weights  # task weights, averaged over the coordinates


FEW = 32  # tasks; the program of the comparisons grows with T


def stable_ranks(x: Float[Array, "tasks ..."]) -> Int[Array, "tasks ..."]:
    """Ranks along the first axis from 0. Equal entries keep their order.

    For few tasks it compares all pairs, which on a CPU is much faster than sorting T
    numbers in each coordinate.
    """
    if len(x) > FEW:
        return jnp.argsort(jnp.argsort(x, axis=0, stable=True), axis=0)
    order = jnp.arange(len(x)).reshape((-1,) + (1,) * (x.ndim - 1))
    others = [x[s : s + 1] for s in range(len(x))]
    before = [(o < x) | ((o == x) & (s < order)) for s, o in enumerate(others)]
    return sum((b.astype(jnp.int32) for b in before[1:]), before[0].astype(jnp.int32))


def trimmed_mean_kept(
    grads: Float[Array, "tasks ..."], trim: int, mask: Mask
) -> Bool[Array, "tasks ..."]:
    """Marks the present entries except the k largest and the k smallest."""
    present = mask.reshape((-1,) + (1,) * (grads.ndim - 1))
    ranks = stable_ranks(jnp.where(present, grads, jnp.inf))
    count = mask.sum()
    cut = jnp.clip(trim, 0, jnp.maximum(count - 1, 0) // 2)
    return present & (ranks >= cut) & (ranks < count - cut)


@factory
def trimmed_mean(num_tasks: int, *, trim: int = 1, scale: Scale = "native") -> Balancer:
    """Coordinate-wise trimmed mean, from Byzantine-robust distributed learning.

    In each coordinate, the k largest and the k smallest entries are removed, and the
    remaining entries are averaged, ``d = Σ_{i=k+1}^{T−k} g_(i) / (T − 2k)`` with the
    sorted entries ``g_(1) ≤ … ≤ g_(T)``. The result is the mean for k = 0 and the
    median for the largest possible k. The update depends on the coordinates and is not
    a function of the Gramian.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      trim: Number k ≥ 0 of removed entries on each side, with 2k < T. The paper removes
        a fraction of the entries. The default 1 is not from the paper. In a batch with
        n present tasks at most ``(n − 1) // 2`` entries are removed on each side, so
        that an entry remains.
      scale: ``"native"`` and ``"mean"`` are the trimmed mean. ``"sum"`` multiplies it
        by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the stacked gradients. A step costs T
      backward passes. The state contains the weight of each task, averaged over the
      coordinates.

    Raises:
      ValueError: If ``trim`` is negative, or if ``2 * trim`` is at least T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.trimmed_mean(4, trim=1)
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
        raise ValueError(f"trimmed_mean: trim must not be negative, but is {trim}.")
    if 2 * trim >= num_tasks:
        raise ValueError(
            f"trimmed_mean: trim={trim} on each side removes all entries of "
            f"num_tasks={num_tasks}; it requires at least {2 * trim + 1} tasks."
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
            wide = jnp.where(kept, g, 0).astype(stack.wide_dtype(g.dtype))
            shares = kept.sum(tuple(range(1, g.ndim)), dtype=jnp.int32)
            return wide.sum(0) * unit.astype(wide.dtype), shares

        leaves, treedef = jax.tree.flatten(grads)
        combined, shares = zip(*map(leaf, leaves), strict=True)
        size = max(sum(g[0].size for g in leaves), 1)
        weights = sum(shares, jnp.zeros(num_tasks, jnp.float32)) * unit / size
        update = jax.tree.unflatten(treedef, combined)
        return update, TrimmedMeanState(weights.astype(jnp.float32))

    return from_grads("trimmed_mean", num_tasks, init=init, combine=combine)
