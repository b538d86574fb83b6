"""Training on task weights, by a weighted sum or by sampled tasks."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mtljax.types import Losses, Weights

Realisation: TypeAlias = Literal["sum", "sample"]


def weighted_sum(losses: Losses, weights: Weights) -> Float[Array, ""]:
    """Computes the objective of a branch, ``Σ_k ν_k L_k``, without its absent tasks.

    A loss with weight zero is excluded even if it is not finite. Its gradient must be
    finite, because ``0 * NaN`` is NaN in the backward pass.

    Args:
      losses: L, shape ``[T]``.
      weights: A row of ν, shape ``[T]``.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import weighted_sum
      >>> weighted_sum(jnp.array([2.0, jnp.inf]), jnp.array([0.5, 0.0])).tolist()
      1.0
    """
    used = weights != 0
    return jnp.where(used, weights * jnp.where(used, losses, 0), 0).sum()


def draw_task(
    key: PRNGKeyArray, step: ArrayLike, branch: ArrayLike, weights: Weights
) -> Int[Array, ""]:
    """Samples the task of one step of one branch in proportion to its weights.

    The result is a pure function of key, step and branch. A resumed run therefore
    samples the same tasks as an uninterrupted run.

    Args:
      key: Random key of the whole run.
      step: Number of completed steps.
      branch: Index of the branch.
      weights: Row of ν of the branch, shape ``[T]``. A task with weight zero is never
        sampled.

    Returns:
      Index of a task, int32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.forkmerge import draw_task
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
    """Computes in advance the tasks that ``realisation="sample"`` uses.

    Use it for data that the host loads. The host then reads one batch of the sampled
    task per branch and step, instead of one batch of every task.

    Args:
      key: The key that is passed to :func:`mtljax.forkmerge.train_branches`.
      branch_weights: ν of shape ``[B, T]``.
      num_steps: n.
      start_step: Number of steps before the first.

    Returns:
      Task indices, shape ``[B, n]``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.forkmerge import task_orders
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
    """Selects row ``task`` of every leaf, a batch or a head out of ``[T, ...]``.

    Under ``vmap`` over branches this is a gather. ``lax.switch`` would instead evaluate
    all tasks for every branch. If the heads have one shape, store them in one leaf
    ``[T, ...]``. The step then evaluates one trunk and one head.

    Args:
      tree: Pytree of arrays ``[T, ...]``.
      task: Index of a task.

    Returns:
      The tree without its first axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import take_task
      >>> take_task({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, 1)["w"].tolist()
      [3.0, 4.0]
    """
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, task, keepdims=False), tree
    )
