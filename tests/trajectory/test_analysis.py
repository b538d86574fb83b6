"""Gaps at equal loss, aggregates, differences and correlations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtljax import trajectory


def runs(offset, losses, seeds=3, noise=0.01):
    """A score that depends on the loss alone, plus an offset and noise by run."""
    loss = np.tile(losses, (seeds, 1)).astype(np.float32)
    rng = np.random.default_rng(seeds + int(100 * abs(offset)))
    own = noise * rng.uniform(-1, 1, size=(seeds, 1))
    score = 0.9 + 0.05 * np.log10(loss) / 4 + offset + own
    return jnp.asarray(loss), jnp.asarray(score.astype(np.float32))


SLOW, FAST = 10.0 ** -np.arange(0, 2, 0.1), 10.0 ** -np.arange(0, 4, 0.2)


def test_a_constant_offset_is_the_gap_whatever_the_speed():
    found = trajectory.generalization_gap(*runs(0, FAST), *runs(0.1, SLOW))
    assert np.isfinite(found.gap).any()
    gap = np.asarray(found.gap)[np.isfinite(found.gap)]
    # Within a bin of a quarter decade the score moves by 0.003, and runs by 0.01.
    np.testing.assert_allclose(gap, 0.1, atol=0.02)
    assert found.significant[np.isfinite(found.gap)].all()
    high, low = found.overlap
    np.testing.assert_allclose([high, low], [1, SLOW[-1]], rtol=1e-4)
    assert found.loss[-1] > SLOW[-1] / 2  # nothing below what the slow runs reach
    np.testing.assert_allclose(found.onset, found.loss[0], rtol=1e-6)
    assert "significant from" in found.describe()


def test_runs_are_averaged_first():
    """A run with many checkpoints in a bin does not outweigh one with a single."""
    nan = np.nan
    loss = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.5, nan, nan, nan]])
    score = jnp.array([[1.0, 1.0, 1.0, 1.0], [0.0, nan, nan, nan]])
    found = trajectory.generalization_gap(loss, score, loss, score + 1)
    np.testing.assert_allclose(found.single[:, 0], [1, 0])
    np.testing.assert_allclose(found.gap, 1)
    assert found.ignored == 6
    assert found.runs.tolist() == [[2], [2]]


def test_the_onset_is_where_the_last_stretch_begins():
    loss, score = runs(0, FAST, noise=1e-4)
    helps_late = score + jnp.where(loss < 0.02, 0.2, -0.2)
    found = trajectory.generalization_gap(loss, score, loss, helps_late)
    assert 0.009 < found.onset < 0.02
    worse = trajectory.generalization_gap(
        loss, score, loss, helps_late, higher_is_better=False
    )
    np.testing.assert_allclose(worse.gap, -found.gap)


def test_no_overlap_and_a_single_run_are_said():
    none = trajectory.generalization_gap(*runs(0, SLOW), *runs(0, SLOW / 1e3))
    assert none.overlap is None
    assert none.gap.shape == (0,)
    assert np.isnan(none.onset)
    assert "do not overlap" in none.describe()
    alone = trajectory.generalization_gap(
        *runs(0, SLOW, seeds=1), *runs(0.5, SLOW, seeds=1)
    )
    assert not alone.significant.any()
    assert "no significant gap" in alone.describe()


def test_first_passage_takes_the_first_checkpoint_below():
    loss = jnp.array([[1.0, 0.3, 0.5, 0.1]])
    score = jnp.array([[0.0, 0.1, 0.2, 0.3]])
    found = trajectory.generalization_gap(
        loss, score, loss, score, matching="first_passage", edges=[0.4, 0.2]
    )
    np.testing.assert_allclose(found.single[0], [0.1, 0.3])
    np.testing.assert_allclose(found.loss, [0.4, 0.2])


def test_aggregates_of_the_paper():
    values = np.array([[1.0, 9.0, np.nan, 4.0, 2.0, 8.0], [np.nan] * 6])
    run = lambda rule, count, **kw: np.asarray(
        trajectory.aggregate(jnp.asarray(values), rule, count, **kw)
    )
    np.testing.assert_allclose(run("last", 2), [5, np.nan])
    np.testing.assert_allclose(run("largest", 2), [8.5, np.nan])
    np.testing.assert_allclose(run("last", 50), [24 / 5, np.nan])
    by = jnp.asarray([[0.5, 0.1, 0.9, 0.8, 0.2, 0.3]] * 2)
    np.testing.assert_allclose(run("at_best", 2, by=by), [2.5, np.nan])
    blown = trajectory.aggregate(jnp.array([1.0, np.inf]), "last", 2)
    assert np.isinf(blown)  # not hidden in a mean


def test_differences_and_sign_agreement():
    rng = np.random.default_rng(0)
    multi, single = rng.normal(size=(2, 3, 4))
    single = single + np.array([[0, 9, -9, 1]])
    found = trajectory.factor_delta(multi, single)
    np.testing.assert_allclose(found.delta, (multi - single.mean(0)).mean(0), rtol=1e-4)
    spread = 2 * (multi.std(0, ddof=1) + single.std(0, ddof=1))
    expected = np.abs(multi.mean(0) - single.mean(0)) > spread
    assert expected.tolist() == [False, True, True, False]
    assert found.significant.tolist() == expected.tolist()
    higher = trajectory.sign_agreement(found, found, lower=False)
    assert higher == trajectory.SignAgreement(2, 0, 2)
    assert trajectory.sign_agreement(found, found, lower=True).disagree == 2
    one = trajectory.factor_delta(multi[:1], single[:1])
    assert not one.significant.any()


def test_rank_correlations_are_scipys():
    rng = np.random.default_rng(1)
    x = rng.integers(6, size=25).astype(np.float32)  # with ties
    y = (x + 2 * rng.normal(size=25)).astype(np.float32)
    found = trajectory.rank_correlation(x, y, key=jax.random.key(0))
    np.testing.assert_allclose(
        found.spearman, scipy.stats.spearmanr(x, y).statistic, rtol=1e-5
    )
    np.testing.assert_allclose(
        found.kendall, scipy.stats.kendalltau(x, y).statistic, rtol=1e-5
    )
    low, high = found.interval
    assert low < found.spearman < high
    gone = np.where(np.arange(25) == 3, np.nan, y)
    assert trajectory.rank_correlation(x, gone).points == 24


def test_a_confounder_is_taken_out():
    """Similarity and sharpness both follow T: correlated, but not at equal T."""
    rng = np.random.default_rng(2)
    size = np.repeat([2, 5, 20], 20)
    x = size**-0.5 + 0.01 * rng.normal(size=60)
    y = size + 0.5 * rng.normal(size=60)
    found = trajectory.rank_correlation(x, y, covariate=size, groups=size)
    assert found.spearman < -0.85
    # Ranks are not linear in T: what is left is much less, not nothing.
    assert abs(float(found.partial)) < 0.4
    assert all(abs(v) < 0.5 for v in found.within.values())
    residual = lambda v: v - np.polyval(np.polyfit(k, v, 1), k)
    k, a, b = (scipy.stats.rankdata(v) for v in (size, x, y))
    expected = np.corrcoef(residual(a), residual(b))[0, 1]
    np.testing.assert_allclose(found.partial, expected, atol=1e-4)


def test_what_is_not_defined_is_nan():
    few = trajectory.rank_correlation([1.0, 2.0], [1.0, 2.0])
    assert np.isnan(few.spearman)
    flat = trajectory.rank_correlation([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert np.isnan(flat.spearman)
    same = trajectory.rank_correlation(
        [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], covariate=[1.0, 2.0, 3.0]
    )
    assert np.isnan(same.partial)


def test_mistakes_are_named(as_users):
    with pytest.raises(ValueError, match="multi_loss has shape"):
        trajectory.generalization_gap(
            np.ones((1, 2)), np.ones((1, 2)), np.ones(2), np.ones(2)
        )
    with pytest.raises(ValueError, match="'at_best' needs by="):
        trajectory.aggregate(np.ones(3), "at_best", 1)
    with pytest.raises(ValueError, match=r"y has shape \(2,\)"):
        trajectory.rank_correlation(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"'rho' \(0.1 and absent\)"):
        trajectory.check_comparable({"s": {"rho": 0.1}}, {"s": {}})
    with pytest.raises(ValueError, match="must be two or more positive"):
        trajectory.generalization_gap(*[np.ones((1, 1))] * 4, edges=[0.0, 1.0])
