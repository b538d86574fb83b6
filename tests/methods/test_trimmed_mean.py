"""Trimmed mean: golden value, sorting in numpy, mean and median, masks."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3

from mtljax.methods._trimmed_mean import stable_ranks, trimmed_mean

RNG = np.random.default_rng(0)
ROWS = np.array([[1e11, 3], [1, -1e11], [-1e10, 1e10], [2, 2]])


def test_golden():
    """Of TorchJD: two adversaries in every column."""
    got = step(make(trimmed_mean, 4), ROWS)
    np.testing.assert_allclose(got.update, [1.5, 2.5], rtol=1e-6)
    np.testing.assert_allclose(got.weights, np.array([1, 1, 0, 2]) / 4)


@pytest.mark.parametrize(("tasks", "trim"), [(4, 1), (7, 2), (7, 3)])
def test_sorted_in_numpy(tasks, trim):
    matrix = RNG.normal(size=(tasks, 9))
    got = step(make(trimmed_mean, tasks, trim=trim), matrix)
    expected = np.sort(matrix, axis=0)[trim : tasks - trim].mean(0)
    np.testing.assert_allclose(got.update, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.weights.sum(), 1, rtol=1e-5)


def test_ranks_are_those_of_a_stable_sort():
    x = np.random.default_rng(1).integers(0, 3, (6, 5, 4)).astype(np.float32)
    x[4:, 0] = np.inf
    order = np.argsort(x, axis=0, kind="stable")
    wanted = np.argsort(order, axis=0, kind="stable")
    np.testing.assert_array_equal(stable_ranks(jnp.asarray(x)), wanted)
    many = np.tile(x, (6, 1))  # ties, and more tasks than are compared in pairs
    order = np.argsort(many, axis=0, kind="stable")
    wanted = np.argsort(order, axis=0, kind="stable")
    np.testing.assert_array_equal(stable_ranks(jnp.asarray(many)), wanted)


def test_no_trim_is_the_mean_and_the_most_is_the_median():
    got = step(make(trimmed_mean, 3, trim=0), J3)
    np.testing.assert_allclose(got.update, J3.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.weights, np.full(3, 1 / 3), rtol=1e-6)
    got = step(make(trimmed_mean, 3), J3)
    np.testing.assert_allclose(got.update, np.median(J3, axis=0), rtol=1e-6)


def test_ties_count_once():
    got = step(make(trimmed_mean, 3), np.repeat(J3[:1], 3, 0))
    np.testing.assert_allclose(got.update, J3[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("present", "trim"), [([0, 1, 3, 4, 6], 2), ([1, 4], 0), ([5], 0)]
)
def test_trims_within_the_present_tasks(present, trim):
    matrix = RNG.normal(size=(7, 4))
    mask = np.isin(np.arange(7), present)
    got = step(make(trimmed_mean, 7, trim=2), matrix, mask=mask)
    rows = np.sort(matrix[mask], axis=0)
    expected = rows[trim : len(rows) - trim].mean(0)
    np.testing.assert_allclose(got.update, expected, rtol=1e-5, atol=1e-6)
    assert (got.weights[~mask] == 0).all()
    np.testing.assert_allclose(got.weights.sum(), 1, rtol=1e-5)


def test_scale():
    some = np.array([True, True, True, False])
    for mask, count in ((None, 4), (some, 3)):
        plain = step(make(trimmed_mean, 4), ROWS, mask=mask)
        mean = step(make(trimmed_mean, 4, scale="mean"), ROWS, mask=mask)
        total = step(make(trimmed_mean, 4, scale="sum"), ROWS, mask=mask)
        np.testing.assert_array_equal(mean.update, plain.update)
        np.testing.assert_allclose(total.update, count * plain.update, rtol=1e-6)
        np.testing.assert_allclose(total.weights, count * plain.weights, rtol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="trimmed_mean: trim must not be negative"):
        trimmed_mean(3, trim=-1)
    with pytest.raises(ValueError, match=r"trim=2 .* num_tasks=4; .* at least 5 tasks"):
        trimmed_mean(4, trim=2)
    with pytest.raises(ValueError, match="scale='big' is not one of"):
        trimmed_mean(3, scale="big")
