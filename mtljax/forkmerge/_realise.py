"""How a branch follows its task weights: as a weighted sum, or one task at a time."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mtljax.types import Losses, Weights

Realisation: TypeAlias = Literal["sum", "sample"]


def weighted_sum(losses: Losses, weights: Weights) -> Float[Array, ""]:
    """The objective of a branch, ``Σ_k ν_k L_k``, without its absent tasks.

    A loss of weight zero is left out even where it is not finite (its gradient must
    still exist: 0 · NaN is NaN on the way back).

    Args:
      losses: L ``[T]``.
      weights: A row of ν ``[T]``.

    Returns:
      A scalar.

    Examples:
      >>> weighted_sum(jnp.array([2.0, jnp.inf]), jnp.array([0.5, 0.0])).tolist()
      1.0
    """
    used = weights != 0
    return jnp.where(used, weights * jnp.where(used, losses, 0), 0).sum()


def draw_task(
    key: PRNGKeyArray, step: ArrayLike, branch: ArrayLike, weights: Weights
) -> Int[Array, ""]:
    """The task of one step of one branch, drawn in proportion to its weights.

    A pure function of key, step and branch: a run that goes on after an interruption
    draws what it would have drawn.

    Args:
      key: Of the whole run.
      step: Steps taken before this one.
      branch: Index of the branch.
      weights: Its row of ν ``[T]``; a task of weight zero is never drawn.

    Returns:
      Index of a task, int32.

    Examples:
      >>> int(draw_task(jax.random.key(0), 3, 1, jnp.array([0.0, 2.0, 0.0])))
      1
    """
    key = jax.random.fold_in(jax.random.fold_in(key, step), branch)
    return jax.random.categorical(key, jnp.log(weights)).astype(jnp.int32)


def task_orders(
    key: PRNGKeyArray,
    branch_weights: Float[Array, "branches tasks"],
    num_steps: int,
    *,
    start_step: ArrayLike = 0,
) -> Int[Array, "branches steps"]:
    """The tasks that ``realisation="sample"`` draws, ahead of time.

    For data that come from the host: it reads one batch of the drawn task per branch
    and step instead of one of every task.

    Args:
      key: As given to :func:`mtljax.forkmerge.train_branches`.
      branch_weights: ν ``[B, T]``.
      num_steps: n.
      start_step: Steps taken before the first.

    Returns:
      Tasks ``[B, n]``.

    Examples:
      >>> nu = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> orders = task_orders(jax.random.key(0), nu, 100)
      >>> orders.shape, int(orders[0].max())
      ((2, 100), 0)
    """
    steps = start_step + jnp.arange(num_steps, dtype=jnp.int32)
    one = jax.vmap(draw_task, (None, 0, None, None))
    return jax.vmap(one, (None, None, 0, 0))(
        key, steps, jnp.arange(len(branch_weights)), branch_weights
    )


def take_task(tree: Any, task: ArrayLike) -> Any:
    """Row ``task`` of every leaf: a batch out of ``[T, ...]``, or a head.

    Under ``vmap`` over branches this is a gather, where ``lax.switch`` would run the
    computation of every task for every branch. Keep the heads of tasks of one shape in
    one leaf ``[T, ...]`` and the step computes a single trunk and a single head.

    Args:
      tree: Pytree of arrays ``[T, ...]``.
      task: Index of a task.

    Returns:
      The tree without its first axis.

    Examples:
      >>> take_task({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 1)["w"].tolist()
      [3.0, 4.0]
    """
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, task, keepdims=False), tree
    )
