"""Krum: golden value, enumeration in parameter space, ties, masks."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3

from mtljax.methods._krum import krum, krum_scores

ROWS = np.array([[1, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1.0]])


def test_golden():
    """Of TorchJD, whose third row is the adversary."""
    for compat in ("paper", "torchjd"):
        balancer = make(krum, 5, num_byzantine=1, num_selected=4, compat=compat)
        got = step(balancer, ROWS)
        np.testing.assert_allclose(got.update, [1.25, 0.75, 1.5], atol=1e-5)
        np.testing.assert_allclose(got.weights, [0.25, 0.25, 0, 0.25, 0.25])


def scores(matrix, byzantine, power):
    distances = np.linalg.norm(matrix[:, None] - matrix[None], axis=-1) ** power
    count = max(len(matrix) - byzantine - 2, 1)
    return np.sort(distances, axis=1)[:, 1 : count + 1].sum(1)


@pytest.mark.parametrize(("compat", "power"), [("paper", 2), ("torchjd", 1)])
@pytest.mark.parametrize("byzantine", [0, 2])
def test_scores_in_parameter_space(compat, power, byzantine):
    matrix = np.random.default_rng(0).normal(size=(6, 4))
    gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
    got = krum_scores(gramian, byzantine, compat=compat)
    np.testing.assert_allclose(got, scores(matrix, byzantine, power), rtol=1e-4)
    update = step(make(krum, 6, num_byzantine=byzantine, compat=compat), matrix).update
    best = matrix[scores(matrix, byzantine, power).argmin()]
    np.testing.assert_allclose(update, best, atol=1e-5)


def test_squares_and_distances_can_disagree():
    """A far neighbour weighs more under the square."""
    points = np.array([0.0, 3.0, 4.0, 8.0, 9.5])[:, None]
    by_square, by_distance = scores(points, 0, 2), scores(points, 0, 1)
    rng = np.random.default_rng(1)
    while by_square.argmin() == by_distance.argmin():
        points = rng.normal(size=(5, 1)) ** 3
        by_square, by_distance = scores(points, 0, 2), scores(points, 0, 1)
    for compat, expected in (("paper", by_square), ("torchjd", by_distance)):
        got = step(make(krum, 5, compat=compat), points)
        assert got.weights.argmax() == expected.argmin()


def test_of_equal_scores_the_first_wins():
    got = step(make(krum, 3), J3)  # the two nearest of three always tie
    near = scores(J3, 0, 2)
    assert np.isclose(near, near.min()).sum() == 2
    expected = np.eye(3)[np.flatnonzero(np.isclose(near, near.min()))[0]]
    np.testing.assert_array_equal(got.weights, expected)
    equal = step(make(krum, 3, num_selected=2), np.repeat(J3[:1], 3, 0))
    np.testing.assert_array_equal(equal.weights, [0.5, 0.5, 0])


def test_identical_rows_have_distance_zero_not_nan():
    matrix = np.repeat(1e4 * J3[:1] + 0.1, 3, 0)
    gramian = jnp.asarray((matrix @ matrix.T).astype(np.float32))
    gramian = gramian.at[0, 1].multiply(1 + 1e-6).at[1, 0].multiply(1 + 1e-6)
    got = krum_scores(gramian, 0, compat="torchjd")
    assert np.isfinite(got).all()
    assert (got >= 0).all()


@pytest.mark.parametrize("present", [2, 1])
def test_fewer_present_tasks_than_the_theory_wants(present):
    mask = np.arange(5) < present
    balancer = make(krum, 5, num_byzantine=1, num_selected=4)
    got = step(balancer, ROWS, mask=mask)
    np.testing.assert_allclose(got.weights, mask / present)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for tasks, options, message in [
        (2, {}, "num_byzantine=0 requires at least 3 tasks, not num_tasks=2"),
        (5, {"num_byzantine": 3}, "num_byzantine=3 requires at least 6 tasks"),
        (5, {"num_byzantine": -1}, "num_byzantine must not be negative: -1"),
        (3, {"num_selected": 0}, "num_selected must be between 1 and .* not 0"),
        (3, {"num_selected": 4}, "num_selected must be between 1 and .* not 4"),
        (3, {"compat": "libmtl"}, "compat='libmtl' is not one of 'paper', 'torchjd'"),
    ]:
        with pytest.raises(ValueError, match=f"krum: {message}"):
            krum(tasks, **options)
