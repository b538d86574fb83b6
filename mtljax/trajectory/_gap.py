"""Generalisation gap at equal training loss, significance and onset."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtljax.balancer import check_choice

Matching: TypeAlias = Literal["bins", "first_passage"]


class GeneralizationGap(NamedTuple):
    """Result of :func:`generalization_gap`, one entry per bin, largest loss first.

    If the two loss ranges do not overlap, there is no bin, and ``overlap`` is None.
    """

    loss: Float[Array, " bins"]  # centre of the bin (first passage: the threshold)
    gap: Float[Array, " bins"]  # positive: multi-task is better; NaN: no match
    significant: Bool[Array, " bins"]  # ± 2 sd over runs do not overlap
    single: Float[Array, "runs bins"]  # run means of the single-task score
    multi: Float[Array, "runs2 bins"]
    runs: Int[Array, "2 bins"]  # number of runs with a checkpoint in the bin
    onset: float  # largest loss from which one significant sign persists; NaN if none
    overlap: tuple[float, float] | None  # losses that both groups reach, largest first
    ignored: int  # checkpoints whose loss or score is not finite, or whose loss <= 0

    def describe(self) -> str:
        """Describes the result in one sentence."""
        if self.overlap is None:
            return "The loss ranges do not overlap: nothing can be compared."
        high, low = self.overlap
        text = f"Compared at losses from {high:.3g} to {low:.3g}"
        if not bool(jnp.isfinite(self.gap).any()):
            return f"{text}: no bin holds checkpoints of both."
        last = [float(g) for g in self.gap if math.isfinite(float(g))][-1]
        text += f", the gap at the smallest is {last:+.3g}"
        if math.isnan(self.onset):
            return f"{text}; no significant gap lasts to the end."
        return f"{text}; it is significant from {self.onset:.3g} on."


def generalization_gap(
    single_loss: Any,
    single_score: Any,
    multi_loss: Any,
    multi_score: Any,
    *,
    higher_is_better: bool = True,
    bins_per_decade: int = 4,
    edges: Sequence[float] | None = None,
    matching: Matching = "bins",
) -> GeneralizationGap:
    r"""Compares the generalisation of two groups of runs at equal own-task loss.

    Scores are averaged in bins of the logarithm of the training loss, first within a
    run and then over runs. The gap is significant if ``|gap| > 2 sd + 2 sd``, with
    standard deviations over runs. Bins cover only the overlap of the two loss ranges,
    so nothing is extrapolated. ``"first_passage"`` uses, at each edge, the score of the
    first checkpoint whose loss is at most the edge. It is suitable for noisy losses.
    The matching rule is inferred from the paper's figures. Its text specifies only the
    two deviations.

    Args:
      single_loss: Training loss of the task in single-task runs, shape ``[R, C]`` for C
        checkpoints. Each entry is an evaluation of the whole set, and not a running
        mean.
      single_score: Test score of these runs, shape ``[R, C]``.
      multi_loss: Loss of the same task in multi-task runs, shape ``[R', C']``.
      multi_score: Test score of these runs.
      higher_is_better: Whether a high score is good. False changes the sign, so that a
        positive gap is always good.
      bins_per_decade: Number of bins per factor of ten in loss, unless ``edges`` are
        given.
      edges: Losses that bound the bins.
      matching: ``"bins"`` or ``"first_passage"``, see above.

    Returns:
      :class:`GeneralizationGap`: The gap per bin, with the underlying scores and
      counts. Significance requires two runs in each group.

    Raises:
      ValueError: If shapes differ, or if an edge is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import generalization_gap
      >>> loss = jnp.array([[1.0, 0.1, 0.01]] * 2)
      >>> st = jnp.array([[0.5, 0.6, 0.7], [0.52, 0.62, 0.72]])
      >>> found = generalization_gap(loss, st, loss, st + 0.1, bins_per_decade=1)
      >>> found.gap.tolist(), found.significant.tolist()
      ([0.1, 0.1, 0.1], [True, True, True])

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      figures 1 and 2.
    """
    name = "generalization_gap"
    check_choice(name, "matching", matching, Matching)
    pairs, ignored = [], 0
    given = ("single", single_loss, single_score), ("multi", multi_loss, multi_score)
    for label, losses, scores in given:
        loss, score = jnp.asarray(losses), jnp.asarray(scores)
        if loss.ndim != 2 or loss.shape != score.shape or loss.size == 0:
            raise ValueError(
                f"{name}: {label}_loss has shape {loss.shape} and {label}_score "
                f"{score.shape}; both must be [runs, checkpoints]."
            )
        good = jnp.isfinite(loss) & jnp.isfinite(score) & (loss > 0)
        ignored += int((~good).sum())
        pairs.append((jnp.where(good, loss, jnp.nan), score, good))
    overlap = _overlap([loss for loss, _, _ in pairs])
    bounds = _edges(name, overlap, bins_per_decade, edges)
    count = max(len(bounds) - 1, 0) if matching == "bins" else len(bounds)
    if overlap is None or count == 0:
        empty = jnp.zeros(0)
        runs = [jnp.zeros((len(loss), 0)) for loss, _, _ in pairs]
        none = jnp.zeros(0, bool), runs[0], runs[1], jnp.zeros((2, 0), jnp.int32)
        return GeneralizationGap(empty, empty, *none, math.nan, overlap, ignored)
    logs = [math.log10(b) for b in bounds]
    match = _in_bins if matching == "bins" else _first_passages
    single, multi = (match(loss, score, good, logs) for loss, score, good in pairs)
    if matching == "bins":
        centres = [10 ** ((a + b) / 2) for a, b in itertools.pairwise(logs)]
    else:
        centres = bounds
    order = sorted(range(count), key=lambda i: -centres[i])
    at = jnp.array(order)
    single, multi = single[:, at], multi[:, at]
    centres = [centres[i] for i in order]
    (mean_s, sd_s, n_s), (mean_m, sd_m, n_m) = _over_runs(single), _over_runs(multi)
    gap = mean_m - mean_s if higher_is_better else mean_s - mean_m
    significant = jnp.abs(gap) > 2 * sd_s + 2 * sd_m  # False if an sd is unknown
    return GeneralizationGap(
        loss=jnp.array(centres),
        gap=gap,
        significant=significant,
        single=single,
        multi=multi,
        runs=jnp.stack([n_s, n_m]),
        onset=_onset(centres, gap.tolist(), significant.tolist()),
        overlap=overlap,
        ignored=ignored,
    )


def _overlap(losses: list[Array]) -> tuple[float, float] | None:
    """Returns the largest and the smallest loss that both groups reach."""
    if any(not bool(jnp.isfinite(x).any()) for x in losses):
        return None
    high = min(float(jnp.nanmax(x)) for x in losses)
    low = max(float(jnp.nanmin(x)) for x in losses)
    return (high, low) if high >= low else None


def _edges(name, overlap, bins_per_decade, edges) -> list[float]:
    if edges is not None:
        found = sorted(float(e) for e in edges)
        if len(found) < 2 or found[0] <= 0:
            raise ValueError(
                f"{name}: edges={list(edges)} must be two or more positive losses."
            )
        return found
    if not bins_per_decade > 0:
        raise ValueError(f"{name}: bins_per_decade={bins_per_decade} must be positive.")
    if overlap is None:
        return []
    # Whole bins of a fixed grid are used, so that two comparisons share their bins. The
    # first and the last bin may exceed the overlap by less than a bin.
    high, low = (math.log10(x) * bins_per_decade for x in overlap)
    first, last = math.floor(low + 1e-6), math.floor(high + 1e-6) + 1
    return [10 ** (i / bins_per_decade) for i in range(first, last + 1)]


def _in_bins(loss, score, good, logs) -> Array:
    """Returns the mean score of each run in each bin; NaN without a checkpoint."""
    place = jnp.log10(jnp.where(good, loss, 1)) + 1e-6  # same rounding as the grid
    found = []
    for low, high in itertools.pairwise(logs):
        inside = good & (place >= low) & (place < high)
        count = inside.sum(1)
        total = jnp.where(inside, score, 0).sum(1)
        found.append(jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan))
    return jnp.stack(found, 1)


def _first_passages(loss, score, good, logs) -> Array:
    """Returns the score of each run when its loss first reaches each edge."""
    found = []
    for edge in logs:
        below = good & (jnp.log10(jnp.where(good, loss, 1)) <= edge + 1e-6)
        first = jnp.take_along_axis(score, below.argmax(1)[:, None], 1)[:, 0]
        found.append(jnp.where(below.any(1), first, jnp.nan))
    return jnp.stack(found, 1)


def _over_runs(values: Array) -> tuple[Array, Array, Array]:
    """Returns mean, standard deviation and number of the runs that are not NaN."""
    there = ~jnp.isnan(values)
    count = there.sum(0)
    filled = jnp.where(there, values, 0)
    mean = jnp.where(count > 0, filled.sum(0) / jnp.maximum(count, 1), jnp.nan)
    squares = jnp.where(there, jnp.square(values - mean[None]), 0).sum(0)
    sd = jnp.where(count > 1, jnp.sqrt(squares / jnp.maximum(count - 1, 1)), jnp.nan)
    return mean, sd, count.astype(jnp.int32)


def _onset(centres: list[float], gap: list[float], significant: list[bool]) -> float:
    """Returns the largest loss of the final stretch with one significant sign."""
    onset, sign = math.nan, 0.0
    for loss, value, sure in reversed(
        list(zip(centres, gap, significant, strict=True))
    ):
        if math.isnan(value):
            continue
        if not sure or (sign and math.copysign(1, value) != sign):
            break
        onset, sign = loss, math.copysign(1, value)
    return onset
