"""Relative improvement and mean rank, against published tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtljax.metrics import delta_m, delta_p, mean_rank

HIGHER = [True, True, False, False, False, False, True, True, True]
GROUPS = [0, 0, 1, 1, 2, 2, 2, 2, 2]  # segmentation, depth, normals
SINGLE = np.array([38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15])

# NYUv2, MTAN: FAMO (2306.03792), Table 1: nine metrics, printed delta m and mean rank;
# then delta p of the same row in DB-MTL (2308.12029), Table 6, where it has the row.
NYU = {
    "LS": "39.29 65.33 .5493 .2263 28.15 23.96 22.09 47.50 61.08 5.59 8.89 .88",
    "SI": "38.45 64.27 .5354 .2201 27.60 23.37 22.53 48.57 62.32 4.39 7.89 nan",
    "RLW": "37.17 63.77 .5759 .2410 28.27 24.18 22.26 47.05 60.62 7.78 11.22 -2.16",
    "DWA": "39.11 65.31 .5510 .2285 27.61 23.18 24.17 50.18 62.39 3.57 7.67 1.93",
    "UW": "36.87 63.17 .5446 .2260 27.04 22.61 23.54 49.05 63.65 4.05 7.44 .91",
    "MGDA": "30.47 59.90 .6070 .2555 24.88 19.45 29.18 56.88 69.36 1.38 6.00 -1.66",
    "PCGrad": "38.06 64.64 .5550 .2325 27.41 22.80 23.86 49.83 63.14 3.97 8.00 1.11",
    "GradDrop": "39.39 65.12 .5455 .2279 27.48 22.96 23.38 49.44 62.87 3.58 7.00 2.07",
    "CAGrad": "39.79 65.49 .5486 .2250 26.31 21.58 25.61 52.36 65.58 .20 4.56 nan",
    # IMTL-G's printed delta m, -0.76, does not follow from its row (-0.60).
    "IMTL-G": "39.35 65.60 .5426 .2256 26.02 21.19 26.20 53.13 66.24 nan 3.78 4.77",
    "Nash": "40.13 65.93 .5261 .2171 25.26 20.08 28.40 55.47 68.15 -4.04 2.11 7.65",
    "FAMO": "38.88 64.90 .5474 .2194 25.06 19.57 29.21 56.61 68.98 -4.10 3.44 nan",
}
TABLE = np.array([[float(v) for v in row.split()] for row in NYU.values()])


@pytest.mark.parametrize("name", NYU)
def test_published_rows(name):
    row = TABLE[list(NYU).index(name)]
    printed_m, printed_p = row[9], row[11]
    if not np.isnan(printed_m):
        got = delta_m(row[:9], SINGLE, HIGHER)
        np.testing.assert_allclose(got, printed_m, atol=0.011)
    if not np.isnan(printed_p):
        got = delta_p(row[:9], SINGLE, HIGHER, groups=GROUPS)
        np.testing.assert_allclose(got, printed_p, atol=0.01)
        got = delta_m(row[:9], SINGLE, HIGHER, groups=GROUPS)
        np.testing.assert_allclose(got, -printed_p, atol=0.01)


def test_imtl_row_disagrees_with_its_printed_number():
    row = TABLE[list(NYU).index("IMTL-G"), :9]
    np.testing.assert_allclose(delta_m(row, SINGLE, HIGHER), -0.60, atol=0.01)


def test_table_at_once_and_jit():
    got = jax.jit(lambda v, s: delta_m(v, s, HIGHER))(TABLE[:, :9], SINGLE)
    assert got.shape == (12,)
    one_by_one = [delta_m(row, SINGLE, HIGHER) for row in TABLE[:, :9]]
    np.testing.assert_allclose(got, one_by_one, rtol=1e-4, atol=1e-4)


def test_baseline_itself_is_zero():
    assert delta_m(SINGLE, SINGLE, HIGHER) == 0


def test_negative_baseline_improves_downwards():
    # A reward that rises from -10 to -5 is a gain of 50 %.
    got = delta_m(jnp.array([-5.0]), jnp.array([-10.0]), [True])
    np.testing.assert_allclose(got, -50, rtol=1e-6)


def test_zero_baseline():
    values, zero = jnp.array([1.0, 1.0]), np.array([1.0, 0.0])
    with pytest.raises(ValueError, match="baseline of metric 1 is zero"):
        delta_m(values, zero, [True, True])
    with pytest.raises(ValueError, match="baseline of metric 1 is zero"):
        jax.jit(lambda v: delta_m(v, zero, [True, True]))(values)
    traced = jax.jit(lambda v, s: delta_m(v, s, [True, True]))(values, zero)
    assert not np.isfinite(traced)


@pytest.mark.parametrize("groups", [[0, 0], [0, 2, 2], [1, 1, 2]])
def test_bad_groups(groups):
    with pytest.raises(ValueError, match="must name the task of each of the 3"):
        delta_m(jnp.ones(3), jnp.ones(3), [True] * 3, groups=groups)


def test_bad_directions():
    with pytest.raises(ValueError, match="one entry for each of the 3 metrics"):
        delta_m(jnp.ones(3), jnp.ones(3), [True])


def test_published_mean_ranks():
    got = mean_rank(TABLE[:, :9], HIGHER)
    np.testing.assert_allclose(got, TABLE[:, 10], atol=0.006)


def test_mean_rank_ties_match_scipy():
    table = np.random.default_rng(0).integers(0, 4, (7, 5)).astype(np.float32)
    higher = np.array([True, False, False, True, True])
    signed = table * np.where(higher, -1, 1)
    expected = stats.rankdata(signed, axis=0).mean(axis=1)
    np.testing.assert_allclose(mean_rank(table, higher), expected, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(lambda t: mean_rank(t, higher))(table), expected, rtol=1e-6
    )


def test_nan_ranks_last_in_both_directions():
    table = jnp.array([[jnp.nan, jnp.nan], [1.0, 2.0], [2.0, 1.0]])
    np.testing.assert_array_equal(mean_rank(table, [True, False]), [3.0, 2.0, 1.0])


NAMED = ("acc", "err", "iou")
VALUES, BASE = jnp.array([[0.6, 0.3, 0.5], [0.4, 0.2, 0.7]]), jnp.array([0.5, 0.4, 0.6])
UP = [True, False, True]


def by_name(array, names=NAMED):
    return {name: array[..., NAMED.index(name)] for name in names}


def test_named_metrics_have_the_bits_of_unnamed_ones():
    others = list(reversed(NAMED))  # the baseline determines the order
    values, up = by_name(VALUES, others), by_name(np.array(UP), others)
    base = by_name(BASE)
    np.testing.assert_array_equal(delta_m(values, base, up), delta_m(VALUES, BASE, UP))
    named = {"iou": "seg", "acc": "seg", "err": "depth"}
    for groups in (named, ["seg", "depth", "seg"]):
        np.testing.assert_array_equal(
            delta_p(values, base, up, groups=groups),
            delta_p(VALUES, BASE, UP, groups=[0, 1, 0]),
        )
    np.testing.assert_array_equal(mean_rank(by_name(VALUES), up), mean_rank(VALUES, UP))


def test_errors_of_named_metrics():
    base = by_name(BASE)
    with pytest.raises(ValueError, match="values is a dict with the names"):
        delta_m({"acc": 1.0}, base, UP)
    with pytest.raises(ValueError, match=r"higher_is_better .* have no names"):
        delta_m(VALUES, BASE, by_name(np.array(UP)))
    with pytest.raises(ValueError, match="baseline of metric 'err' is zero"):
        jax.jit(lambda v: delta_m(v, {**base, "err": 0.0}, UP))(VALUES)
