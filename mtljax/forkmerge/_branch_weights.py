"""Matrices ν of task weights, with one row per branch."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._checks import BranchWeights, Numbers


def _rows(
    name: str, num_tasks: int, target: int, groups: Sequence[Any], share: bool
) -> BranchWeights:
    """Returns one row per group, with 1 for the target and each of its tasks."""
    checks.task_index(name, num_tasks, target)
    rows = []
    for group in groups:
        row = [0.0] * num_tasks
        for task in group:
            row[task] = 1.0 / len(group) if share else 1.0
        row[target] = 1.0
        rows.append(row)
    return jnp.array(rows, jnp.float32)


def _auxiliaries(num_tasks: int, target: int) -> list[int]:
    return [task for task in range(num_tasks) if task != target]


def target_vs_all(
    num_tasks: int, *, target: int = 0, share: bool = False
) -> BranchWeights:
    """Builds two branches: the target alone, and the target with all other tasks.

    These are the branches of Algorithm 1 in the paper (arXiv 2301.12618).

    Args:
      num_tasks: T, at least two.
      target: Index of the target task.
      share: Whether to divide the weights of the auxiliary tasks of a branch by their
        number, as in the released DomainNet code. In the paper each weight is 1.

    Returns:
      ν of shape ``[2, T]``, with the target-only branch first.

    Raises:
      ValueError: If ``target`` is not the index of a task, or if no other task exists.

    Examples:
      >>> from mtljax.forkmerge import target_vs_all
      >>> target_vs_all(3).tolist()
      [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
      >>> target_vs_all(3, target=2, share=True).tolist()
      [[0.0, 0.0, 1.0], [0.5, 0.5, 1.0]]
    """
    _check_auxiliary("target_vs_all", num_tasks)
    groups = ([], _auxiliaries(num_tasks, target))
    return _rows("target_vs_all", num_tasks, target, groups, share)


def target_plus_each(num_tasks: int, *, target: int = 0) -> BranchWeights:
    """Builds T branches: the target alone, and with each of the auxiliary tasks.

    These are Eq. 9 to 12 of the paper (its ForkMerge‡), with K + 1 branches for K
    auxiliary tasks.

    Args:
      num_tasks: T, at least two.
      target: Index of the target task.

    Returns:
      ν of shape ``[T, T]``. The target-only branch is first. The others follow in the
      order of their task.

    Raises:
      ValueError: If ``target`` is not the index of a task, or if no other task exists.

    Examples:
      >>> from mtljax.forkmerge import target_plus_each
      >>> target_plus_each(3, target=1).tolist()
      [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    _check_auxiliary("target_plus_each", num_tasks)
    each = [[task] for task in _auxiliaries(num_tasks, target)]
    return _rows("target_plus_each", num_tasks, target, [[], *each], share=False)


def target_plus_each_and_all(
    num_tasks: int, *, target: int = 0, share: bool = False
) -> BranchWeights:
    """Builds T + 1 branches: the target alone, with all others, and with each of them.

    These are the branches of the "full" variant in the released
    Transfer-Learning-Library code. With two tasks, the branches "all" and "each" are
    equal, and the function returns one of them.

    Args:
      num_tasks: T, at least two.
      target: Index of the target task.
      share: See :func:`target_vs_all`.

    Returns:
      ν of shape ``[T + 1, T]``, in the order target only, all, then each task.

    Raises:
      ValueError: If ``target`` is not the index of a task, or if no other task exists.

    Examples:
      >>> from mtljax.forkmerge import target_plus_each_and_all
      >>> target_plus_each_and_all(3).tolist()
      [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """
    _check_auxiliary("target_plus_each_and_all", num_tasks)
    others = _auxiliaries(num_tasks, target)
    each = [[task] for task in others] if len(others) > 1 else []
    groups = [[], others, *each]
    return _rows("target_plus_each_and_all", num_tasks, target, groups, share)


def nested_topk(
    num_tasks: int,
    ranking: Sequence[int],
    *,
    topk: Sequence[int] = (0, 3, 5),
    target: int = 0,
    share: bool = False,
) -> BranchWeights:
    """Builds one branch per k: the target with the k best auxiliary tasks of a ranking.

    This is the recipe of the released code. Its ranking trains every pair of the target
    and an auxiliary task for a short time (:func:`rank_auxiliaries`). ``topk=(0, K)``
    with K auxiliary tasks is :func:`target_vs_all`. On DomainNet the code uses the
    default of ``topk`` with ``share=True``, and on NYUv2 ``(0, 1, 2)`` with
    ``share=False``.

    Args:
      num_tasks: T.
      ranking: Auxiliary tasks, the best first.
      topk: Number of auxiliary tasks of each branch. 0 is the target-only branch.
      target: Index of the target task.
      share: See :func:`target_vs_all`.

    Returns:
      ν of shape ``[len(topk), T]``.

    Raises:
      ValueError: If the ranking contains the target or a duplicate, or if an entry of
        ``topk`` is larger than the length of the ranking.

    Examples:
      >>> from mtljax.forkmerge import nested_topk
      >>> nested_topk(4, [2, 3, 1], topk=(0, 1, 2)).tolist()
      [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    """
    checks.task_index("nested_topk", num_tasks, target)
    ranking = [int(task) for task in ranking]
    others = set(_auxiliaries(num_tasks, target))
    if len(set(ranking)) != len(ranking) or not set(ranking) <= others:
        raise ValueError(
            f"nested_topk: ranking={ranking} must list different tasks out of "
            f"{sorted(others)}, all but the target {target}."
        )
    for k in topk:
        if not 0 <= k <= len(ranking):
            raise ValueError(
                f"nested_topk: topk holds {k}, but the ranking has {len(ranking)} "
                "tasks."
            )
    groups = [ranking[:k] for k in topk]
    return _rows("nested_topk", num_tasks, target, groups, share)


def custom(weights: Numbers) -> BranchWeights:
    """Validates user-defined branches, for example with groups of related tasks.

    Args:
      weights: ν of shape ``[B, T]``. Row b weights the losses of branch b.

    Returns:
      ν as float32.

    Raises:
      ValueError: If ν is not a matrix, or if a row has a negative or non-finite entry
        or consists of zeros. The message names the row.

    Examples:
      >>> from mtljax.forkmerge import custom
      >>> custom([[1, 0, 0], [1, 0.5, 0.5]]).tolist()
      [[1.0, 0.0, 0.0], [1.0, 0.5, 0.5]]
    """
    found = jnp.asarray(weights, jnp.float32)
    if found.ndim != 2:
        raise ValueError(
            f"custom: branch weights have shape {found.shape}; they must be "
            "(branches, tasks)."
        )
    for branch, row in enumerate(found.tolist()):
        if not all(math.isfinite(w) and w >= 0 for w in row) or sum(row) == 0:
            raise ValueError(
                f"custom: branch {branch} has the weights {row}; they must be finite, "
                "not negative, and not all zero."
            )
    return found


def rank_auxiliaries(
    scores: Numbers, num_tasks: int, *, target: int = 0, direction: str = "max"
) -> tuple[int, ...]:
    """Ranks auxiliary tasks by the score of their branch with the target.

    Args:
      scores: Validation scores ``[T]`` of the branches of :func:`target_plus_each`
        after the ranking phase. The first branch, target only, is not ranked.
      num_tasks: T.
      target: Index of the target task.
      direction: Whether a large (``"max"``) or a small (``"min"``) score is good.

    Returns:
      The ranking for :func:`nested_topk`. Among equal scores, the lower index is
      first.

    Raises:
      ValueError: If the number of scores differs from T, or if ``direction`` is
        unknown.

    Examples:
      >>> from mtljax.forkmerge import rank_auxiliaries
      >>> rank_auxiliaries([0.5, 0.1, 0.9, 0.4], 4)
      (2, 3, 1)
    """
    checks.task_index("rank_auxiliaries", num_tasks, target)
    sign = checks.sign_of("rank_auxiliaries", direction)
    found = jnp.asarray(scores, jnp.float32)
    if found.shape != (num_tasks,):
        raise ValueError(
            f"rank_auxiliaries: scores have shape {found.shape}; the branches of "
            f"target_plus_each({num_tasks}) give ({num_tasks},)."
        )
    pairs = zip(_auxiliaries(num_tasks, target), found.tolist()[1:], strict=True)
    # A branch that diverged has a NaN score and is ranked last.
    key = lambda p: (math.isnan(p[1]), -sign * p[1], p[0])
    return tuple(task for task, _ in sorted(pairs, key=key))


def target_only(branch_weights: Numbers, target: int = 0) -> int | None:
    """Returns the branch that trains on the target alone, or None.

    Args:
      branch_weights: ν of shape ``[B, T]``.
      target: Index of the target task.

    Returns:
      Index of the first such branch, or None if there is no such branch.

    Examples:
      >>> from mtljax.forkmerge import target_only, target_vs_all
      >>> target_only(target_vs_all(3)), target_only([[1.0, 1.0]])
      (0, None)
    """
    for branch, row in enumerate(jnp.asarray(branch_weights).tolist()):
        if row[target] > 0 and sum(w != 0 for w in row) == 1:
            return branch
    return None


def _check_auxiliary(name: str, num_tasks: int) -> None:
    if num_tasks < 2:
        raise ValueError(
            f"{name}: there is no auxiliary task with num_tasks={num_tasks}. Use at "
            "least 2 tasks."
        )
