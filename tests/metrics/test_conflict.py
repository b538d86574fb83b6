"""Gradient conflict from Gramians, against gradients in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import metrics


def gradients(tasks=5, size=7, seed=0):
    scales = 10.0 ** np.arange(tasks) / 100
    return np.random.default_rng(seed).normal(size=(tasks, size)) * scales[:, None]


def gram(grads):
    return (grads @ grads.T).astype(np.float32)


def pairs(count):
    return [(i, j) for i in range(count) for j in range(i)]


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def test_cosines():
    g = gradients()
    expected = [[cosine(a, b) for a in g] for b in g]
    np.testing.assert_allclose(metrics.cosine_matrix(gram(g)), expected, atol=1e-5)
    mean = np.mean([cosine(g[i], g[j]) for i, j in pairs(5)])
    np.testing.assert_allclose(metrics.mean_cosine(gram(g)), mean, atol=1e-5)


def test_conflict_rate_counts_pairs():
    g = gradients()
    expected = np.mean([g[i] @ g[j] < 0 for i, j in pairs(5)])
    assert 0 < expected < 1
    np.testing.assert_allclose(metrics.conflict_rate(gram(g)), expected, rtol=1e-6)


def test_magnitude_similarity():
    g = gradients()
    n = np.linalg.norm(g, axis=1)
    expected = 2 * n[:, None] * n / (n[:, None] ** 2 + n**2)
    got = metrics.gradient_magnitude_similarity(gram(g))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_extreme_scales(scale):
    g = np.array([[1.0, 0.0], [-1.0, 1.0]])
    extreme = gram(g * scale)
    np.testing.assert_allclose(
        metrics.cosine_matrix(extreme), metrics.cosine_matrix(gram(g)), rtol=1e-5
    )
    got = metrics.gradient_magnitude_similarity(extreme)
    np.testing.assert_allclose(got[0, 1], 2 * np.sqrt(2) / 3, rtol=1e-5)


FUNCTIONS = [
    metrics.cosine_matrix,
    metrics.gradient_magnitude_similarity,
    metrics.conflict_rate,
    metrics.mean_cosine,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_mask_equals_present_tasks_alone(function):
    g = gradients()
    mask = np.array([True, False, True, True, False])
    everything = np.array(gram(g))
    everything[~mask] = np.nan  # absent entries may hold anything
    everything[:, ~mask] = np.nan
    got = np.asarray(jax.jit(function)(everything, mask))
    alone = np.asarray(jax.jit(function)(gram(g[mask])))
    if got.ndim:
        np.testing.assert_array_equal(got[~mask], 0)
        got = got[np.ix_(mask, mask)]
    np.testing.assert_allclose(got, alone, rtol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_zero_gradients_and_gradient_of_the_metric_are_finite(function):
    g = np.array([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    value_and_slope = jax.value_and_grad(lambda m: function(m).sum())
    value, slope = jax.jit(value_and_slope)(gram(g))
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_zero_gradient_values():
    zero = jnp.zeros((2, 2))
    np.testing.assert_array_equal(metrics.cosine_matrix(zero), zero)
    np.testing.assert_array_equal(metrics.gradient_magnitude_similarity(zero), 1)
    assert metrics.conflict_rate(zero) == 0


def test_no_pairs_gives_zero():
    assert metrics.conflict_rate(jnp.ones((1, 1))) == 0
    opposed = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    assert metrics.conflict_rate(opposed, jnp.array([True, False])) == 0
    assert metrics.mean_cosine(opposed) == -1
