"""Regression metrics, against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from sklearn import metrics as sk

from mtljax import metrics

RNG = np.random.default_rng(0)
TARGETS = RNG.normal(size=(40, 3)).astype(np.float32) + 5
PREDICTIONS = TARGETS + RNG.normal(size=(40, 3)).astype(np.float32) * 0.3 + 0.2
MASK = RNG.random((40, 3)) < 0.6

REFERENCES = {
    metrics.rmse: sk.root_mean_squared_error,
    metrics.mae: sk.mean_absolute_error,
    metrics.relative_error: sk.mean_absolute_percentage_error,
    metrics.r2: sk.r2_score,
    metrics.explained_variance: sk.explained_variance_score,
}
parametrize = pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)


@parametrize
def test_matches_sklearn(function):
    expected = REFERENCES[function](TARGETS.ravel(), PREDICTIONS.ravel())
    got = jax.jit(function)(PREDICTIONS, TARGETS)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@parametrize
def test_mask_equals_the_rest_alone(function):
    expected = REFERENCES[function](TARGETS[MASK], PREDICTIONS[MASK])
    garbage = np.where(MASK, PREDICTIONS, np.nan)
    np.testing.assert_allclose(
        jax.jit(function)(garbage, TARGETS, MASK), expected, rtol=1e-4
    )


@parametrize
def test_nan_prediction_is_not_hidden(function):
    broken = PREDICTIONS.copy()
    broken[0, 0] = np.nan
    assert np.isnan(jax.jit(function)(broken, TARGETS))
    assert np.isnan(function(broken[:2, 0], np.full(2, 3.0, np.float32)))


@parametrize
def test_one_number_an_output_by_vmap(function):
    got = jax.jit(jax.vmap(function, in_axes=1))(PREDICTIONS, TARGETS)
    expected = [
        REFERENCES[function](TARGETS[:, i], PREDICTIONS[:, i]) for i in range(3)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_constant_targets_as_sklearn(offset):
    targets = np.full(4, 2.0, np.float32)
    predictions = targets + np.array([offset, 0, 0, 0], np.float32)
    for function in (metrics.r2, metrics.explained_variance):
        expected = REFERENCES[function](targets, predictions)
        np.testing.assert_allclose(function(predictions, targets), expected)


def test_relative_error_skips_zero_targets_and_has_finite_gradient():
    predictions, targets = jnp.array([1.0, 9.0]), jnp.array([2.0, 0.0])
    np.testing.assert_allclose(metrics.relative_error(predictions, targets), 0.5)
    slope = jax.grad(metrics.relative_error)(predictions, targets)
    np.testing.assert_allclose(slope, [-0.5, 0.0])


def test_broadcasting_is_an_error():
    with pytest.raises((ValueError, TypeCheckError)):
        metrics.rmse(jnp.ones((4, 1)), jnp.ones(4))
