"""Statistics of experiments: values of scipy and statsmodels, and simulations."""

import doctest

import numpy as np
import pytest
from scipy import stats

from experiments.common import claims, results, selection, statistics
from experiments.common.statistics import (
    benjamini_hochberg,
    bootstrap_sets,
    friedman,
    holm,
    minimum_detectable,
    nemenyi_distance,
    paired,
    tost,
    wilcoxon,
)

A = [77.64, 78.10, 76.90, 78.30, 77.25]
B = [78.48, 79.05, 77.10, 79.40, 78.60]


@pytest.mark.parametrize("module", [claims, results, selection, statistics])
def test_examples(module):
    flags = doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(module, optionflags=flags)
    assert found.attempted > 0
    assert found.failed == 0


def test_equivalence():
    found = tost(A, B, 1.3)
    np.testing.assert_allclose((found.low, found.high), (0.478519, 1.297481), rtol=1e-5)
    assert found.equivalent
    assert found.p < 0.05
    assert not tost(A, B, 1.29).equivalent
    # The larger one-sided p is that of the nearer margin.
    d = np.subtract(B, A)
    wanted = stats.ttest_1samp(d, 1.3, alternative="less").pvalue
    np.testing.assert_allclose(found.p, wanted, rtol=1e-9)
    assert tost(A, A, 0.1).p == 0
    assert tost(A, np.add(A, 1.0), 0.1).p > 0.99


def test_bootstrap_over_sets_and_seeds():
    d = [[0.5, 0.7, 0.2], [1, 1.4, 0.9], [-0.3, 0.1, 0], [0.6, 0.4, 0.8]]
    np.testing.assert_allclose(bootstrap_sets(d), (0.525, 0.10, 0.95), atol=1e-6)
    means = np.mean(d, 1)
    found = paired(np.zeros(4), means)
    wanted = (-0.238, 1.288, 0.116)
    np.testing.assert_allclose((found.low, found.high, found.p), wanted, atol=6e-4)


def test_ranks_over_sets():
    scores = [
        [0.80, 0.82, 0.79, 0.85],
        [0.70, 0.75, 0.69, 0.74],
        [0.60, 0.61, 0.62, 0.66],
        [0.90, 0.93, 0.91, 0.92],
        [0.55, 0.58, 0.54, 0.60],
        [0.71, 0.70, 0.72, 0.75],
    ]
    found = friedman(scores)
    np.testing.assert_allclose(found.ranks, [3.3333, 2.1667, 3.1667, 1.3333], atol=5e-5)
    wanted = (9.4, 0.024419, 5.465116, 0.009676)
    np.testing.assert_allclose(found[1:], wanted, atol=5e-7)
    lower = friedman(np.negative(scores), maximise=False)
    np.testing.assert_array_equal(lower.ranks, found.ranks)
    # One method is the best on every set: nothing is left of the denominator.
    assert friedman([[1, 0], [1, 0], [1, 0]]).p == 0
    tied = friedman([[1, 1, 0], [2, 2, 2]]).ranks
    np.testing.assert_allclose(tied, [1.75, 1.75, 2.5])


def test_the_distance_of_nemenyi():
    quantiles = {2: 1.9600, 3: 2.3437, 4: 2.5690, 5: 2.7278, 10: 3.1637, 60: 4.0760}
    for k, wanted in quantiles.items():
        found = nemenyi_distance(k, 6) / np.sqrt(k * (k + 1) / 36)
        np.testing.assert_allclose(found, wanted, atol=5e-5)
    np.testing.assert_allclose(nemenyi_distance(4, 6), 1.914843, atol=5e-7)
    for k, wanted in ((12, 4.45), (40, 17.2), (60, 26.9)):
        np.testing.assert_allclose(nemenyi_distance(k, 14), wanted, rtol=4e-3)


def test_signed_ranks():
    assert wilcoxon(np.arange(1, 7)) == pytest.approx(0.03125)
    assert wilcoxon(np.arange(1, 15)) == pytest.approx(2**-13)
    assert wilcoxon(-np.arange(1, 7)) == pytest.approx(0.03125)
    assert wilcoxon([0, 0, 0]) == 1
    tied = [1, 1, 2, 2, -1, 3]
    wanted = stats.wilcoxon(tied, method="approx").pvalue
    np.testing.assert_allclose(wilcoxon(tied), wanted)


def test_corrections_are_monotone_and_agree_with_scipy():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p = rng.random(rng.integers(1, 12)) ** 2
        found = benjamini_hochberg(p)
        np.testing.assert_allclose(found, stats.false_discovery_control(p))
        for adjusted in (found, holm(p)):
            assert (adjusted >= p).all()
            assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
        assert (holm(p) >= found - 1e-12).all()


# --- simulations ----------------------------------------------------------------------


def test_the_interval_covers_the_mean():
    """95 ± 1 % of 4,000 intervals of five seeds."""
    rng = np.random.default_rng(1)
    d = rng.normal(0.3, 2.0, (5, 4000))
    found = paired(np.zeros_like(d), d)
    covered = np.mean((found.low < 0.3) & (found.high > 0.3))
    assert abs(covered - 0.95) < 0.01


def test_an_absent_effect_is_seldom_reproduced():
    """Below 2.5 + 1 % without an effect, at κ twice the detectable effect."""
    n, draws = 10, 4000
    kappa = 2 * minimum_detectable(n)
    d = np.random.default_rng(2).normal(size=(n, draws))
    wide, narrow = paired(np.zeros_like(d), d), paired(np.zeros_like(d), d, level=0.9)
    words = [
        claims.verdict(claims.Evidence(*values, n, 0.5, 1.0), 0.1, kappa).word
        for values in zip(
            wide.mean, wide.low, wide.high, narrow.low, narrow.high, strict=True
        )
    ]
    assert np.mean([word == "reproduced" for word in words]) <= 0.035
    # An effect of κ would be twice what these runs detect: its absence shows.
    assert np.mean([word == "contradicted" for word in words]) > 0.9
