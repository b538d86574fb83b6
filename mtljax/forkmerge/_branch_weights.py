"""Which tasks a branch trains on: matrices ν of branches by tasks."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mtljax.forkmerge._checks import BranchWeights, Numbers, check_target, sign_of


def _rows(
    name: str, num_tasks: int, target: int, groups: Sequence[Any], share: bool
) -> BranchWeights:
    """A row per group of auxiliary tasks: 1 for the target and for each of them."""
    check_target(name, num_tasks, target)
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
    """Two branches: the target alone, the target with all auxiliary tasks.

    Algorithm 1 of the paper.

    Args:
      num_tasks: T, at least two.
      target: Index of the task that is to become good.
      share: Divides the weights of a branch's auxiliary tasks by their number, as
        the released DomainNet code does; 1 each in the paper.

    Returns:
      ν ``[2, T]``, the target-only branch first.

    Raises:
      ValueError: If ``target`` is not the index of a task, or there is no other.

    Examples:
      >>> target_vs_all(3).tolist()
      [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
      >>> target_vs_all(3, target=2, share=True).tolist()
      [[0.0, 0.0, 1.0], [0.5, 0.5, 1.0]]
    """
    _check_auxiliary("target_vs_all", num_tasks)
    groups = ([], _auxiliaries(num_tasks, target))
    return _rows("target_vs_all", num_tasks, target, groups, share)


def target_plus_each(num_tasks: int, *, target: int = 0) -> BranchWeights:
    """T branches: the target alone, and with each of the auxiliary tasks.

    Eq. 9 to 12 of the paper (its ForkMerge‡), K + 1 branches for K auxiliary tasks.

    Args:
      num_tasks: T, at least two.
      target: Index of the task that is to become good.

    Returns:
      ν ``[T, T]``: the target-only branch first, then the others in the order of
      their task.

    Raises:
      ValueError: If ``target`` is not the index of a task, or there is no other.

    Examples:
      >>> target_plus_each(3, target=1).tolist()
      [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    _check_auxiliary("target_plus_each", num_tasks)
    each = [[task] for task in _auxiliaries(num_tasks, target)]
    return _rows("target_plus_each", num_tasks, target, [[], *each], share=False)


def target_plus_each_and_all(
    num_tasks: int, *, target: int = 0, share: bool = False
) -> BranchWeights:
    """T + 1 branches: the target alone, with all others, and with each of them.

    The set of the "full" variant of the released Transfer-Learning-Library code. With
    two tasks, "all" and "each" are the same and given once.

    Args:
      num_tasks: T, at least two.
      target: Index of the task that is to become good.
      share: As for :func:`target_vs_all`.

    Returns:
      ν ``[T + 1, T]``: target only, all, then each in the order of their task.

    Raises:
      ValueError: If ``target`` is not the index of a task, or there is no other.

    Examples:
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
    """A branch for every k: the target with the k best auxiliary tasks of a ranking.

    The recipe of the released code, whose ranking trains every target + auxiliary pair
    for a short while (:func:`rank_auxiliaries`); ``topk=(0, K)`` is
    :func:`target_vs_all`. Defaults are those of the code for DomainNet; it uses
    ``(0, 1, 2)`` and ``share=False`` on NYUv2, ``share=True`` on DomainNet.

    Args:
      num_tasks: T.
      ranking: Auxiliary tasks, the best first.
      topk: How many of them each branch gets; 0 is the target-only branch.
      target: Index of the task that is to become good.
      share: As for :func:`target_vs_all`.

    Returns:
      ν ``[len(topk), T]``.

    Raises:
      ValueError: If the ranking names the target or a task twice, or some k is larger
        than the ranking is long.

    Examples:
      >>> nested_topk(4, [2, 3, 1], topk=(0, 1, 2)).tolist()
      [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]]
    """
    check_target("nested_topk", num_tasks, target)
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
    """Any branches, checked: prior knowledge and groups of tasks come in here.

    Args:
      weights: ν ``[B, T]``; row b weighs the losses of branch b.

    Returns:
      ν as float32.

    Raises:
      ValueError: If ν is no matrix, has a negative or non-finite entry, or a branch
        that trains on nothing; the row is named.

    Examples:
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
    """Auxiliary tasks by what a branch with the target and each of them reached.

    Args:
      scores: Validation scores ``[T]`` of the branches of :func:`target_plus_each`
        after the ranking phase; the first, target only, is not ranked.
      num_tasks: T.
      target: As there.
      direction: Whether a large (``"max"``) or a small score is good.

    Returns:
      The ranking for :func:`nested_topk`; of equals, the lower index first.

    Raises:
      ValueError: If there is not one score per branch, or ``direction`` is unknown.

    Examples:
      >>> rank_auxiliaries([0.5, 0.1, 0.9, 0.4], 4)
      (2, 3, 1)
    """
    check_target("rank_auxiliaries", num_tasks, target)
    sign = sign_of("rank_auxiliaries", direction)
    found = jnp.asarray(scores, jnp.float32)
    if found.shape != (num_tasks,):
        raise ValueError(
            f"rank_auxiliaries: scores have shape {found.shape}; the branches of "
            f"target_plus_each({num_tasks}) give ({num_tasks},)."
        )
    pairs = zip(_auxiliaries(num_tasks, target), found.tolist()[1:], strict=True)
    # A score that is NaN, of a branch that diverged, comes last.
    key = lambda p: (math.isnan(p[1]), -sign * p[1], p[0])
    return tuple(task for task, _ in sorted(pairs, key=key))


def target_only(branch_weights: Numbers, target: int = 0) -> int | None:
    """The branch that trains on the target alone, None if there is none.

    Examples:
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
            f"{name}: there is no auxiliary task with num_tasks={num_tasks}."
        )
