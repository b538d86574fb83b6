"""Krum: the gradient that lies closest to most of the others."""

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
    """Sum of the (squared) distances to the ``n − f − 2`` nearest of n tasks ``[T]``.

    At least one neighbour counts. Absent tasks score infinity.
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
    """Equal weights on the tasks of lowest score; of equal ones the first."""
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

    A task's score is the sum of the squared distances from its gradient to the
    ``n − f − 2`` nearest others, with n tasks of which f may be arbitrary. The update
    is the gradient of lowest score (Krum), or the mean of the several lowest
    (Multi-Krum); of equal scores the first task's counts, as in the paper. For n = 3
    the two nearest tasks always tie.

    Distances come from the Gramian, so those far below the lengths of the gradients
    are lost in rounding.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      num_byzantine: f ≥ 0; T ≥ f + 3. The paper's guarantee needs T ≥ 2f + 3. Among
        the present tasks of a masked batch at least one neighbour counts.
      num_selected: How many gradients are averaged; 1 is Krum.
      compat: ``"torchjd"`` adds up distances instead of their squares.
      scale: ``"native"`` and ``"mean"`` average the chosen; ``"sum"`` multiplies by the
        number of tasks.

    Returns:
      A balancer; needs the Gramian: T backward passes. No state.

    Raises:
      ValueError: If ``num_byzantine`` is negative or above T − 3, or ``num_selected``
        is not between 1 and T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = krum(4, num_byzantine=1)
      >>> grads = {"w": jnp.array([[1.0, 1.0], [75.0, -66.0], [1.0, 2.0], [3.0, 0.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [1.0, 1.0]

    References:
      Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient
      Descent, NeurIPS 2017; `Byzantine-Tolerant Machine Learning
      <https://arxiv.org/abs/1703.02757>`_.
    """
    check_choice("krum", "compat", compat, Compat)
    if num_byzantine < 0:
        raise ValueError(f"krum: num_byzantine must not be negative: {num_byzantine}.")
    if num_tasks < num_byzantine + 3:
        raise ValueError(
            f"krum: num_byzantine={num_byzantine} needs at least "
            f"{num_byzantine + 3} tasks, not num_tasks={num_tasks}."
        )
    if not 1 <= num_selected <= num_tasks:
        raise ValueError(
            f"krum: num_selected must lie between 1 and num_tasks={num_tasks}, "
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
