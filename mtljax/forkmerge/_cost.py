"""Cost of a ForkMerge run in steps, validation passes and memory."""

import math
from typing import NamedTuple

from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._search import Method, Search


class ForkMergeCost(NamedTuple):
    """Result of :func:`forkmerge_cost`, summed over all targets."""

    branch_steps: int  # training steps, one gradient each
    merges: int
    validation_passes: int
    states: int  # train states in memory


def merge_passes(
    num_branches: int,
    *,
    method: Method | Search = "auto",
) -> int:
    """Returns the number of validation passes of one :func:`search_merge`.

    Args:
      num_branches: B.
      method: See :func:`search_merge`.

    Returns:
      The number of passes.

    Examples:
      >>> from mtljax.forkmerge import merge_passes
      >>> [merge_passes(b) for b in (2, 3, 4)]
      [6, 13, 19]
      >>> [merge_passes(b, method="simplex") for b in (2, 3, 4, 6)]
      [6, 21, 56, 252]
    """
    checks.positive("merge_passes", "num_branches", num_branches)
    search = method if isinstance(method, Search) else Search(method)
    method = search.method
    if method == "auto":
        method = "grid" if num_branches <= 2 else "greedy"
    if method == "greedy":
        return num_branches + search.levels * (num_branches - 1)
    if method == "random":
        return num_branches + search.num_samples
    return math.comb(search.levels + num_branches - 1, num_branches - 1)


def forkmerge_cost(
    num_branches: int,
    num_steps: int,
    interval: int,
    *,
    pruned_to: int | None = None,
    ranking_steps: int = 0,
    num_auxiliaries: int = 0,
    num_targets: int = 1,
    method: Method | Search = "auto",
) -> ForkMergeCost:
    """Computes training steps, merges, validation passes and memory of a run.

    Every target needs its own run and has its own model. A balancer, in contrast,
    trains one model for all tasks.

    Args:
      num_branches: B.
      num_steps: Number of training steps.
      interval: Δt.
      pruned_to: Number of branches after the first merge. By default all are kept.
      ranking_steps: Number of steps of each pair of the target and an auxiliary task
        in a ranking phase.
      num_auxiliaries: Number of such pairs.
      num_targets: G.
      method: See :func:`search_merge`.

    Returns:
      :class:`ForkMergeCost`: The counts. With one branch, the number of steps is that
      of ordinary training.

    Examples:
      >>> from mtljax.forkmerge import forkmerge_cost
      >>> forkmerge_cost(6, 50_000, 12_500, pruned_to=3).branch_steps
      187500
    """
    for argument, value in (
        ("num_branches", num_branches),
        ("num_steps", num_steps),
        ("interval", interval),
    ):
        checks.positive("forkmerge_cost", argument, value)
    later = num_branches if pruned_to is None else pruned_to
    first = min(interval, num_steps)
    steps = num_branches * first + later * (num_steps - first)
    merges = math.ceil(num_steps / interval)
    passes = merge_passes(num_branches, method=method)
    passes += (merges - 1) * merge_passes(later, method=method)
    ranking = ranking_steps * num_auxiliaries
    passes += num_auxiliaries if ranking else 0
    return ForkMergeCost(
        branch_steps=num_targets * (steps + ranking),
        merges=num_targets * merges,
        validation_passes=num_targets * passes,
        states=num_targets * (num_branches + 1),
    )
