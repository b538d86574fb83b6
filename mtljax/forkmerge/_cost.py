"""What a run costs, before it is started."""

import math
from typing import NamedTuple

from mtljax.forkmerge._checks import check_positive
from mtljax.forkmerge._search import Method, Search


class ForkMergeCost(NamedTuple):
    """Counts of :func:`forkmerge_cost`, for all targets together."""

    branch_steps: int  # steps of training, one gradient each
    merges: int
    validation_passes: int
    states: int  # train states in memory


def merge_passes(
    num_branches: int,
    *,
    method: Method | Search = "auto",
) -> int:
    """Validation passes of one :func:`search_merge`.

    Examples:
      >>> [merge_passes(b) for b in (2, 3, 4)]
      [6, 13, 19]
      >>> [merge_passes(b, method="simplex") for b in (2, 3, 4, 6)]
      [6, 21, 56, 252]
    """
    check_positive("merge_passes", "num_branches", num_branches)
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
    """Training steps, merges, validation passes and memory of a run.

    Every target needs a run (and gets a model) of its own, unlike a balancer that
    trains one model for all.

    Args:
      num_branches: B.
      num_steps: T.
      interval: Δt.
      pruned_to: Branches after the first merge; all of them by default.
      ranking_steps: Steps of each target + auxiliary pair in a ranking phase.
      num_auxiliaries: Pairs there.
      num_targets: G.
      method: See :func:`search_merge`.

    Returns:
      The counts. For ``num_steps=50_000`` and one branch: those of training alone.

    Examples:
      >>> forkmerge_cost(6, 50_000, 12_500, pruned_to=3).branch_steps
      187500
    """
    for argument, value in (
        ("num_branches", num_branches),
        ("num_steps", num_steps),
        ("interval", interval),
    ):
        check_positive("forkmerge_cost", argument, value)
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
