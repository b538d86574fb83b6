"""Paired comparisons over seeds, and corrections for many of them."""

import math
from typing import Any, NamedTuple

import numpy as np


class Paired(NamedTuple):
    """Differences ``b - a`` along the first axis.

    Attributes:
      mean: Their mean.
      sd: Their standard deviation, with n - 1.
      n: How many there are.
      p: Two-sided p of Student's t test of mean zero; NaN if all are equal.
      low: Lower end of the confidence interval of the mean.
      high: Upper end.
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
      b: Values of the other row on the same seeds, or broadcast against ``a``.
      level: Of the interval.

    Returns:
      The comparison, an entry for each trailing index.

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
        raise ValueError(f"A paired comparison needs two seeds or more, not {n}.")
    mean, sd = d.mean(0), d.std(0, ddof=1)
    error = sd / math.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(error > 0, mean / error, np.nan)
    p = 2 * stats.t.sf(np.abs(t), n - 1)
    half = stats.t.ppf((1 + level) / 2, n - 1) * error
    return Paired(mean, sd, n, p, mean - half, mean + half)


def _adjust(p: Any, factors: Any, ascending: bool) -> np.ndarray:
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * factors
    run = (
        np.maximum.accumulate(scaled)
        if ascending
        else np.minimum.accumulate(scaled[::-1])[::-1]
    )
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(run, 1.0)
    return adjusted


def holm(p: Any) -> np.ndarray:
    """Adjusted p-values ``[m]`` that control the family-wise error.

    Examples:
      >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
      [0.03, 0.06, 0.06]
    """
    return _adjust(p, np.arange(len(p), 0, -1), ascending=True)


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Adjusted p-values ``[m]`` that control the rate of false discoveries.

    Examples:
      >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(2).tolist()
      [0.03, 0.04, 0.04]
    """
    return _adjust(p, len(p) / np.arange(1, len(p) + 1), ascending=False)


def minimum_detectable(n: int, *, level: float = 0.05, power: float = 0.8) -> float:
    """The mean difference, in its standard deviations, that a paired t test detects.

    The approximation (t(1 - level/2) + t(power)) / √n is 5 % low at n = 3.

    Examples:
      >>> [round(minimum_detectable(n), 3) for n in (3, 5, 10, 20)]
      [3.097, 1.663, 0.995, 0.661]
    """
    from scipy import stats

    quantiles = stats.t.ppf(1 - level / 2, n - 1) + stats.t.ppf(power, n - 1)
    return float(quantiles / math.sqrt(n))
