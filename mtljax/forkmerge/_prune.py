"""Which branches are worth going on with."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from mtljax.forkmerge._branch_weights import target_only
from mtljax.forkmerge._checks import (
    Direction,
    Numbers,
    as_merge_weights,
    check_branch_weights,
    check_positive,
    sign_of,
)


def prune(
    weights: Numbers,
    branch_scores: Numbers,
    branch_weights: Numbers,
    *,
    keep: int,
    target: int = 0,
    direction: Direction = "max",
    drop_zeros: bool = True,
    keep_target_only: bool = True,
) -> tuple[int, ...]:
    """The branches to keep: those of the K′ largest merge weights, exactly.

    The paper drops branches of weight zero and keeps the K′ largest after the first
    merge. The released code compares by value, so that ties keep more, and may drop the
    target-only branch, without which nothing guards against negative transfer; here
    ties are broken by the score of the branch, then by its index, and that branch
    stays, in the place of the last.

    Args:
      weights: Λ ``[B]`` of a merge.
      branch_scores: Scores ``[B]`` of the single branches there.
      branch_weights: ν ``[B, T]``.
      keep: K′, the most branches to keep.
      target: Index of the target task.
      direction: Whether a large or a small score is good.
      drop_zeros: Whether branches of weight zero go even if there is room.
      keep_target_only: Whether the branch that trains on the target alone stays.

    Returns:
      Indices of the branches, ascending; for :func:`take_branches`. Reads its
      arguments on the host: shapes change, so the step is compiled once more.

    Raises:
      ValueError: If shapes do not fit, or ``keep`` is not positive.

    Examples:
      >>> nu = [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
      >>> prune([0.0, 0.4, 0.6], [0.1, 0.2, 0.3], nu, keep=2)
      (0, 2)
    """
    check_positive("prune", "keep", keep)
    sign = sign_of("prune", direction)
    share = jnp.asarray(weights).tolist()
    scores = as_merge_weights("prune", branch_scores, len(share)).tolist()
    nu = check_branch_weights("prune", branch_weights, len(share))

    def rank(branch: int):
        score = sign * scores[branch]
        return -share[branch], math.inf if math.isnan(score) else -score, branch

    ranked = sorted(range(len(share)), key=rank)
    kept = [b for b in ranked if share[b] > 0 or not drop_zeros][:keep]
    safe = target_only(nu, target)
    if keep_target_only and safe is not None and safe not in kept:
        kept = [*kept[: keep - 1], safe]  # in the place of the last, if all are taken
    return tuple(sorted(kept))


def prune_groups(
    weights: Numbers,
    branch_scores: Numbers,
    branch_weights: Numbers,
    *,
    targets: Sequence[int],
    keep: int,
    direction: Direction = "max",
    keep_target_only: bool = True,
) -> list[tuple[int, ...]]:
    """:func:`prune` for several targets, all keeping equally many branches.

    As many as the target that needs most, ``keep`` at most.

    Args:
      weights: Λ ``[G, B]``.
      branch_scores: ``[G, B]``.
      branch_weights: ν ``[G, B, T]``.
      targets: G indices.
      keep: K′.
      direction: As there.
      keep_target_only: As there.

    Returns:
      G tuples of indices, of one length.

    Examples:
      >>> nu = [[[1, 0], [1, 1]], [[0, 1], [1, 1]]]
      >>> prune_groups([[1.0, 0.0], [0.5, 0.5]], [[2, 1], [2, 1]], nu, targets=(0, 1),
      ...              keep=2)
      [(0, 1), (0, 1)]
    """
    rows = list(
        zip(
            jnp.asarray(weights),
            jnp.asarray(branch_scores),
            jnp.asarray(branch_weights),
            targets,
            strict=True,
        )
    )

    def run(keep: int, drop_zeros: bool):
        return [
            prune(
                share,
                score,
                nu,
                keep=keep,
                target=target,
                direction=direction,
                drop_zeros=drop_zeros,
                keep_target_only=keep_target_only,
            )
            for share, score, nu, target in rows
        ]

    needed = max(map(len, run(keep, True)))
    return run(needed, False)
