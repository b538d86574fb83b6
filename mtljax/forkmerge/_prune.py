"""Selects the branches that are kept after pruning."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._branch_weights import target_only
from mtljax.forkmerge._checks import Direction, Numbers


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
    """Returns the branches with the K′ largest merge weights.

    After the first merge, the paper drops branches of weight zero and keeps the K′
    largest. The released code compares by value, so it keeps more branches if weights
    are equal. It may also drop the target-only branch, which protects against negative
    transfer. Here the score of the branch, and then its index, decides between equal
    weights. The target-only branch is kept and replaces the last of the K′ branches if
    necessary.

    Args:
      weights: Merge weights Λ, shape ``[B]``.
      branch_scores: Scores of the single branches at this merge, shape ``[B]``.
      branch_weights: ν of shape ``[B, T]``.
      keep: K′, the maximum number of branches to keep.
      target: Index of the target task.
      direction: ``"max"`` if a large score is good, ``"min"`` if a small one is.
      drop_zeros: Whether to drop branches of weight zero even if fewer than K′ remain.
      keep_target_only: Whether to keep the branch that trains on the target alone.

    Returns:
      Indices of the branches in ascending order, for :func:`take_branches`. The
      arguments are read on the host. The number of branches changes, so the step is
      compiled once more.

    Raises:
      ValueError: If shapes are inconsistent, or if ``keep`` is not positive.

    Examples:
      >>> from mtljax.forkmerge import prune
      >>> nu = [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
      >>> prune([0.0, 0.4, 0.6], [0.1, 0.2, 0.3], nu, keep=2)
      (0, 2)
    """
    checks.positive("prune", "keep", keep)
    sign = checks.sign_of("prune", direction)
    share = jnp.asarray(weights).tolist()
    scores = checks.merge_weights("prune", branch_scores, len(share)).tolist()
    nu = checks.branch_weights("prune", branch_weights, len(share))

    def rank(branch: int):
        score = sign * scores[branch]
        return -share[branch], math.inf if math.isnan(score) else -score, branch

    ranked = sorted(range(len(share)), key=rank)
    kept = [b for b in ranked if share[b] > 0 or not drop_zeros][:keep]
    safe = target_only(nu, target)
    if keep_target_only and safe is not None and safe not in kept:
        kept = [*kept[: keep - 1], safe]  # replaces the last one if all are taken
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
    """Applies :func:`prune` to several targets with equally many kept branches.

    The number is the largest that a target needs, at most ``keep``.

    Args:
      weights: Merge weights Λ, shape ``[G, B]``.
      branch_scores: Scores of the single branches, shape ``[G, B]``.
      branch_weights: ν of shape ``[G, B, T]``.
      targets: Indices of the G target tasks.
      keep: K′, the maximum number of branches to keep per target.
      direction: See :func:`prune`.
      keep_target_only: See :func:`prune`.

    Returns:
      G tuples of indices, all of the same length.

    Examples:
      >>> from mtljax.forkmerge import prune_groups
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
