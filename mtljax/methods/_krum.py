"""Krum: selects the gradient that is nearest to most other gradients."""

from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_choice, factory, from_weights
from mtljax.types import Gramian, Mask, Scale, Weights

Compat: TypeAlias = Literal["paper", "torchjd"]


class KrumState(NamedTuple):
    """State of :func:`krum`."""

    task_weights: Weights


def krum_scores(
    gramian: Gramian,
    num_byzantine: int,
    mask: Mask | None = None,
    compat: Compat = "paper",
) -> Weights:
    """Sums the (squared) distances to the ``n − f − 2`` nearest of n tasks.

    At least one neighbour is used. The score of an absent task is infinite.

    Returns:
      The scores, shape ``[T]``.
    """
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    squares = jnp.diagonal(gramian)
    distances = squares[:, None] + squares[None, :] - gramian - gramian.T
    distances = jnp.maximum(distances, 0)  # rounding
    if compat == "torchjd":
        distances = jnp.sqrt(distances)
    others = mask[:, None] & mask[None, :] & ~jnp.eye(num, dtype=bool)
    nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    count = jnp.clip(mask.sum() - num_byzantine - 2, 1, jnp.maximum(mask.sum() - 1, 0))
    counted = (jnp.arange(num) < count)[None, :] & mask[:, None]
    return jnp.where(mask, jnp.where(counted, nearest, 0).sum(1), jnp.inf)


def krum_weights(
    gramian: Gramian,
    num_byzantine: int,
    num_selected: int = 1,
    mask: Mask | None = None,
    compat: Compat = "paper",
) -> Weights:
    """Computes equal weights for the tasks with the lowest scores.

    If scores are equal, the first task is selected.
    """
    num = gramian.shape[0]
    mask = jnp.ones(num, bool) if mask is None else mask
    scores = krum_scores(gramian, num_byzantine, mask, compat)
    ranks = jnp.argsort(jnp.argsort(scores, stable=True))
    chosen = mask & (ranks < num_selected)
    return chosen.astype(gramian.dtype) / jnp.maximum(chosen.sum(), 1)


@factory
def krum(
    num_tasks: int,
    *,
    num_byzantine: int = 0,
    num_selected: int = 1,
    compat: Compat = "paper",
    scale: Scale = "native",
) -> Balancer:
    """Krum and Multi-Krum, from Byzantine-robust distributed learning.

    The score of task i is ``s_i = Σ_{j ∈ N_i} ‖g_i − g_j‖²``, where ``N_i`` are the
    ``n − f − 2`` nearest other gradients and f of the n gradients may be arbitrary.
    The update is the gradient with the lowest score (Krum), or the mean of the
    gradients with the lowest scores (Multi-Krum). If scores are equal, the first task
    is selected, as in the paper. For n = 3 the two nearest tasks always have equal
    scores.

    The distances are computed from the Gramian. A distance far below the norms of the
    gradients is therefore lost in rounding.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      num_byzantine: Number f ≥ 0 of arbitrary gradients, with T ≥ f + 3. The guarantee
        of the paper requires T ≥ 2f + 3. In a masked batch at least one neighbour is
        used.
      num_selected: Number of gradients that are averaged. 1 is Krum.
      compat: ``"paper"`` sums squared distances, and ``"torchjd"`` sums distances.
      scale: ``"native"`` and ``"mean"`` average the selected gradients. ``"sum"``
        multiplies the update by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state contains the last task weights only.

    Raises:
      ValueError: If ``num_byzantine`` is negative or above T − 3, or ``num_selected``
        is not between 1 and T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.krum(4, num_byzantine=1)
      >>> grads = {"w": jnp.array([[1.0, 1.0], [75.0, -66.0], [1.0, 2.0], [3.0, 0.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [1.0, 1.0]

    References:
      Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient
      Descent, NeurIPS 2017; `Byzantine-Tolerant Machine Learning
      <https://arxiv.org/abs/1703.02757>`_, 2017.
    """
    check_choice("krum", "compat", compat, Compat)
    if num_byzantine < 0:
        raise ValueError(f"krum: num_byzantine must not be negative: {num_byzantine}.")
    if num_tasks < num_byzantine + 3:
        raise ValueError(
            f"krum: num_byzantine={num_byzantine} requires at least "
            f"{num_byzantine + 3} tasks, not num_tasks={num_tasks}."
        )
    if not 1 <= num_selected <= num_tasks:
        raise ValueError(
            f"krum: num_selected must be between 1 and num_tasks={num_tasks}, "
            f"not {num_selected}."
        )

    def weigh(state, *, losses, gramian, mask):
        del losses
        return krum_weights(gramian, num_byzantine, num_selected, mask, compat), state

    return from_weights(
        "krum",
        num_tasks,
        init=lambda: KrumState(jnp.ones(num_tasks, jnp.float32)),
        weigh=weigh,
        needs="gramian",
        native="mean",
        scale=scale,
    )
