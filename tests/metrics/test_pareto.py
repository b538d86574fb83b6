"""Hypervolume and dominance, against inclusion-exclusion and Monte Carlo."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from mtljax.metrics import hypervolume, non_dominated

JITTED = jax.jit(hypervolume)


def inclusion_exclusion(points, reference):
    """Volume of a union of boxes [point, reference]: exact, exponential in points."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            sides = np.maximum(reference - np.max(subset, axis=0), 0)
            total += (-1) ** (size + 1) * np.prod(sides)
    return total


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_matches_inclusion_exclusion(objectives, seed):
    rng = np.random.default_rng(seed)
    points = rng.random((8, objectives)).astype(np.float32) * 1.3  # some beyond
    points[3] = points[1]  # a duplicate
    points[5, -1] = points[2, -1]  # a tie
    reference = np.ones(objectives, np.float32)
    expected = inclusion_exclusion(points.astype(np.float64), reference)
    got = JITTED(points, reference)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("objectives", [2, 3])
def test_matches_monte_carlo(objectives):
    rng = np.random.default_rng(0)
    points = rng.random((40, objectives)).astype(np.float32) - 0.5
    reference = np.full(objectives, 0.5, np.float32)
    samples = rng.random((100_000, objectives)) - 0.5
    covered = (points[:, None] <= samples[None]).all(-1).any(0)
    error = 4 * np.sqrt(covered.mean() * (1 - covered.mean()) / len(samples))
    np.testing.assert_allclose(JITTED(points, reference), covered.mean(), atol=error)


def test_three_objectives_by_hand():
    # Boxes 1x2x3, 2x1x1 and 1x1x1 inside both.
    points = jnp.array([[2.0, 1.0, 0.0], [1.0, 2.0, 2.0]])
    assert JITTED(points, jnp.array([3.0, 3.0, 3.0])) == 6 + 2 - 1


def test_points_that_add_nothing():
    reference = jnp.array([1.0, 1.0])
    points = jnp.array([[0.5, 0.5], [jnp.nan, 0.0], [2.0, 0.0], [1.0, 0.0], [0.6, 0.7]])
    assert JITTED(points, reference) == 0.25
    assert JITTED(points[1:4], reference) == 0


def test_order_does_not_matter_and_vmap():
    rng = np.random.default_rng(1)
    points = rng.random((6, 3)).astype(np.float32)
    shuffled = np.stack([points[rng.permutation(6)] for _ in range(3)])
    got = jax.jit(jax.vmap(hypervolume, (0, None)))(shuffled, np.ones(3, np.float32))
    expected = inclusion_exclusion(points.astype(np.float64), np.ones(3))
    np.testing.assert_allclose(got, [expected] * 3, rtol=1e-5)


def test_gradient_pushes_the_front_down():
    points = jnp.array([[0.2, 0.6], [0.5, 0.3], [0.9, 0.9]])
    slope = jax.jit(jax.grad(hypervolume))(points, jnp.ones(2))
    # d/dx of point 0: -(its own strip's height); the dominated point has none.
    np.testing.assert_allclose(slope[0], [-0.4, -0.3], rtol=1e-5)
    np.testing.assert_allclose(slope[1], [-0.3, -0.5], rtol=1e-5)
    np.testing.assert_allclose(slope[2], [0, 0], atol=1e-6)


@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((3, 1), (1,)), ((3, 2), (3,))])
def test_wrong_shapes(shapes):
    with pytest.raises((ValueError, TypeCheckError)):
        hypervolume(jnp.ones(shapes[0]), jnp.ones(shapes[1]))


def test_non_dominated_matches_loops():
    points = np.random.default_rng(0).integers(0, 5, (30, 3)).astype(np.float32)
    expected = [
        not any((q <= p).all() and (q < p).any() for q in points) for p in points
    ]
    np.testing.assert_array_equal(jax.jit(non_dominated)(points), expected)
    assert not non_dominated(jnp.array([[jnp.nan, 0.0], [1.0, 1.0]]))[0]
