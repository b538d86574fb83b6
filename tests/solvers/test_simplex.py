"""Projection on the simplex against bisection in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtljax import solvers

project = jax.jit(jax.vmap(solvers.project_simplex))


def reference(vector):
    def excess(threshold):
        return np.maximum(vector - threshold, 0).sum() - 1

    low, high = vector.min() - 1, vector.max()
    threshold = scipy.optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14)
    return np.maximum(vector - threshold, 0)


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_against_bisection(size):
    rng = np.random.default_rng(size)
    vectors = rng.normal(size=(100, size)) * 10.0 ** rng.uniform(-2, 2, size=(100, 1))
    vectors = vectors.astype(np.float32)
    expected = np.array([reference(v.astype(np.float64)) for v in vectors])
    np.testing.assert_allclose(project(vectors), expected, atol=1e-5)


def test_optimality_conditions():
    vectors = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)
    points = np.asarray(project(vectors))
    assert (points >= 0).all()
    np.testing.assert_allclose(points.sum(1), 1, atol=1e-6)
    # v - x is the same on the support and not larger elsewhere.
    gap = vectors - points
    top = gap.max(1, keepdims=True)
    assert np.abs(np.where(points > 0, gap - top, 0)).max() < 1e-5


def test_huge_entries_stay_exact():
    point = solvers.project_simplex(jnp.array([1e8, 1e8, -3e8]))
    np.testing.assert_array_equal(point, [0.5, 0.5, 0])


def test_mask():
    vector = jnp.array([0.2, 9.0, 0.4])
    mask = jnp.array([True, False, True])
    np.testing.assert_allclose(
        solvers.project_simplex(vector, mask), [0.4, 0, 0.6], rtol=1e-6
    )
    np.testing.assert_array_equal(
        solvers.project_simplex(vector, jnp.zeros(3, bool)), np.zeros(3)
    )
