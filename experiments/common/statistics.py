"""Paired comparisons over seeds and sets, corrected for many tests.

Differences over seeds use Student's interval, because a bootstrap interval of five
seeds is too narrow. Differences over data sets use :func:`bootstrap_sets` and Student's
interval over the means of the sets.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Paired(NamedTuple):
    """Differences ``b - a`` along the first axis.

    Attributes:
      mean: Mean of the differences.
      sd: Standard deviation of the differences, with n - 1.
      n: Number of differences.
      p: Two-sided p-value of Student's t-test for mean zero. NaN if all are equal.
      low: Lower end of the confidence interval of the mean.
      high: Upper end of the confidence interval of the mean.
    """

    mean: Any
    sd: Any
    n: int
    p: Any
    low: Any
    high: Any


def paired(a: Any, b: Any, *, level: float = 0.95) -> Paired:
    """Compares two rows on the same seeds.

    Args:
      a: Values over seeds ``[n, ...]``.
      b: Values of the other row on the same seeds, or broadcastable to ``a``.
      level: Level of the confidence interval.

    Returns:
      The comparison, with one entry per trailing index.

    Raises:
      ValueError: If there are fewer than two seeds.

    Examples:
      >>> found = paired([77.64, 78.10, 76.90, 78.30, 77.25],
      ...                [78.48, 79.05, 77.10, 79.40, 78.60])
      >>> round(float(found.p), 4), round(float(found.low), 4)
      (0.0099, 0.3547)
    """
    from scipy import stats

    d = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    n = len(d)
    if n < 2:
        raise ValueError(f"A paired comparison needs at least two seeds, not {n}.")
    mean, sd = d.mean(0), d.std(0, ddof=1)
    error = sd / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, mean / error, np.nan)
    p = 2 * stats.t.sf(np.abs(t), n - 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return Paired(mean, sd, n, p, mean - half, mean + half)


def holm(p: Any) -> np.ndarray:
    """Returns adjusted p-values ``[m]`` that control the family-wise error rate.

    Examples:
      >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
      [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Returns adjusted p-values ``[m]`` that control the false discovery rate.

    Examples:
      >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(2).tolist()
      [0.03, 0.04, 0.04]
    """
    from scipy import stats

    return np.asarray(stats.false_discovery_control(p) if len(p) else p, np.float64)


def comparison_table(
    pairs: Mapping[str, tuple[Any, Any]], digits: int = 2, head: str = "difference"
) -> str:
    """Paired differences over seeds as a Markdown table, with Holm's correction.

    Args:
      pairs: Name -> ``(a, b)`` ``[n]``; the difference is ``b - a``.
      digits: Of the differences.
      head: Of the first column.
    """
    found = {name: paired(a, b) for name, (a, b) in pairs.items() if len(a) > 1}
    if not found:
        return ""
    adjusted = holm([1.0 if math.isnan(f.p) else f.p for f in found.values()])
    lines = [
        f"| {name} | {f.mean:+.{digits}f} | [{f.low:+.{digits}f}, {f.high:+.{digits}f}]"
        f" | {f.p:.2g} | {p:.2g} | {f.n} |"
        for (name, f), p in zip(found.items(), adjusted, strict=True)
    ]
    top = f"| {head} | mean | 95 % interval | p | p, Holm | n |"
    return "\n".join([top, "|:--|--:|--:|--:|--:|--:|", *lines])


def minimum_detectable(n: int, *, level: float = 0.05, power: float = 0.8) -> float:
    """Returns the smallest mean difference that a paired t-test detects.

    The unit is the standard deviation of the differences. The approximation
    (t(1 - level/2) + t(power)) / √n is 5 % too low at n = 3.

    Examples:
      >>> [round(minimum_detectable(n), 3) for n in (3, 5, 10, 20)]
      [3.097, 1.662, 0.995, 0.661]
    """
    from scipy import stats

    quantiles = stats.t.ppf(1 - level / 2, n - 1) + stats.t.ppf(power, n - 1)
    return float(quantiles / math.sqrt(n))


class Equivalence(NamedTuple):
    """Two one-sided tests of a mean difference.

    Attributes:
      equivalent: Whether the interval of level ``1 - 2 alpha`` lies inside ±margin.
      p: The larger of the two one-sided p-values.
      low: Lower end of that interval.
      high: Upper end of the confidence interval of the mean.
    """

    equivalent: bool
    p: float
    low: float
    high: float


def tost(a: Any, b: Any, margin: float, *, alpha: float = 0.05) -> Equivalence:
    """Tests whether two rows differ by less than a margin on the same seeds.

    Args:
      a: Values over seeds ``[n]``.
      b: Values of the other row on the same seeds.
      margin: The largest difference that does not matter, positive.
      alpha: Level of each of the two tests.

    Returns:
      The result; equivalence holds if ``p < alpha``.

    Raises:
      ValueError: If there are fewer than two seeds.

    Examples:
      >>> found = tost([1.0, 2.0, 3.0, 4.0], [1.1, 2.0, 2.9, 4.1], margin=0.5)
      >>> found.equivalent
      True
    """
    from scipy import stats

    found = paired(a, b, level=1 - 2 * alpha)
    error = float(found.sd) / math.sqrt(found.n)
    mean, low, high = (float(x) for x in (found.mean, found.low, found.high))
    if error > 0:
        p = float(stats.t.sf((margin - abs(mean)) / error, found.n - 1))
    else:
        p = 0.0 if abs(mean) < margin else 1.0
    return Equivalence(-margin < low and high < margin, p, low, high)


def bootstrap_sets(differences: Any) -> tuple[float, float, float]:
    """The mean difference over data sets and seeds, and its 95 % bootstrap interval.

    Draws data sets with replacement, and then seeds inside each drawn set. With fewer
    than 8 sets the interval is too narrow; report Student's interval over the means of
    the sets as well.

    Args:
      differences: ``[sets, seeds]``.

    Returns:
      The mean and the two ends.

    Examples:
      >>> d = [[.5, .7, .2], [1, 1.4, .9], [-.3, .1, 0], [.6, .4, .8]]
      >>> [round(x, 3) for x in bootstrap_sets(d)]
      [0.525, 0.1, 0.95]
    """
    d = np.asarray(differences, np.float64)
    sets, n = d.shape
    draws, rng = 10_000, np.random.default_rng(0)
    which = rng.integers(0, sets, (draws, sets))
    inside = rng.integers(0, n, (draws, sets, n))
    means = d[which[:, :, None], inside].mean((1, 2))
    low, high = np.quantile(means, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    return float(d.mean()), float(low), float(high)


class Friedman(NamedTuple):
    """Friedman's test over data sets, with the correction of Iman and Davenport.

    Attributes:
      ranks: Mean rank of each method ``[k]``; 1 is the best.
      chi2: χ² with k - 1 degrees of freedom.
      p_chi2: Its p.
      f: The corrected statistic.
      p: Its p, with ``(k - 1, (k - 1)(N - 1))`` degrees of freedom.
    """

    ranks: np.ndarray
    chi2: float
    p_chi2: float
    f: float
    p: float


def friedman(scores: Any, *, maximise: bool = True) -> Friedman:
    """Tests whether k methods have equal ranks over N data sets.

    Ties share the mean of their ranks. Source: Demšar, JMLR 7, 2006.

    Args:
      scores: ``[N, k]``.
      maximise: Whether more is better.

    Returns:
      The test.

    Examples:
      >>> friedman([[0.8, 0.9], [0.6, 0.7], [0.5, 0.4]]).ranks.round(3).tolist()
      [1.667, 1.333]
    """
    from scipy import stats

    scores = np.asarray(scores, np.float64)
    n, k = scores.shape
    ranks = stats.rankdata(-scores if maximise else scores, axis=1).mean(0)
    chi2 = 12 * n / (k * (k + 1)) * (np.sum(ranks**2) - k * (k + 1) ** 2 / 4)
    rest = n * (k - 1) - chi2
    f = (n - 1) * chi2 / rest if rest > 0 else math.inf
    p = float(stats.f.sf(f, k - 1, (k - 1) * (n - 1)))
    return Friedman(ranks, float(chi2), float(stats.chi2.sf(chi2, k - 1)), float(f), p)


def nemenyi_distance(methods: int, sets: int, *, level: float = 0.05) -> float:
    """The difference of mean ranks that is significant between any two methods.

    Source: Demšar, JMLR 7, 2006.

    Examples:
      >>> round(nemenyi_distance(4, 6), 6)
      1.914843
    """
    from scipy import stats

    quantile = stats.studentized_range.ppf(1 - level, methods, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * sets)))


def wilcoxon(differences: Any) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, one difference per data set.

    Exact up to 50 differences without ties and zeros. Zeros are dropped; if all
    differences are zero, p is 1.

    Examples:
      >>> round(wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), 5)
      0.03125
    """
    from scipy import stats

    d = np.asarray(differences, np.float64)
    d = d[d != 0]
    if not d.size:
        return 1.0
    tied = len(np.unique(np.abs(d))) < d.size
    method = "approx" if tied or d.size > 50 else "exact"
    found: Any = stats.wilcoxon(d, method=method)
    return float(found.pvalue)
