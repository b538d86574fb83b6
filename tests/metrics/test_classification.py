"""Classification metrics, against scikit-learn, scipy and loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sk

from mtljax import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(500, 6)).astype(np.float32) * 2
LABELS = np.where(RNG.random(500) < 0.5, LOGITS.argmax(1), RNG.integers(0, 6, 500))
MASK = RNG.random(500) < 0.7


def numpy_ece(logits, labels, num_bins=10):
    """Bin by bin, as Guo et al. write it."""
    p = special.softmax(logits.astype(np.float64), axis=1)
    confidence, correct = p.max(1), p.argmax(1) == labels
    total = 0.0
    for b in range(num_bins):
        inside = (confidence > b / num_bins) & (confidence <= (b + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


def numpy_brier(logits, labels):
    p = special.softmax(logits.astype(np.float64), axis=1)
    return np.mean(
        [np.sum((row - np.eye(6)[y]) ** 2) for row, y in zip(p, labels, strict=True)]
    )


REFERENCES = {
    metrics.accuracy: lambda x, y: sk.accuracy_score(y, x.argmax(1)),
    metrics.ece: numpy_ece,
    metrics.brier: numpy_brier,
}


@pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)
def test_matches_reference(function):
    expected = REFERENCES[function](LOGITS, LABELS)
    np.testing.assert_allclose(jax.jit(function)(LOGITS, LABELS), expected, rtol=1e-5)


@pytest.mark.parametrize("function", REFERENCES, ids=lambda f: f.__name__)
def test_mask_equals_the_rest_alone(function):
    expected = REFERENCES[function](LOGITS[MASK], LABELS[MASK])
    run = jax.jit(function)
    garbage = np.where(MASK[:, None], LOGITS, np.nan)
    np.testing.assert_allclose(run(garbage, LABELS, MASK), expected, rtol=1e-5)
    assert np.isnan(run(LOGITS, LABELS, np.zeros(500, bool)))


def test_leading_axes_pool():
    got = jax.jit(metrics.ece)(LOGITS.reshape(5, 100, 6), LABELS.reshape(5, 100))
    np.testing.assert_allclose(got, numpy_ece(LOGITS, LABELS), rtol=1e-5)


def test_brier_matches_sklearn_for_two_classes():
    p = RNG.random(50).astype(np.float32)
    labels = RNG.integers(0, 2, 50)
    logits = np.log(np.stack([1 - p, p], axis=1))
    expected = 2 * sk.brier_score_loss(labels, p)  # sklearn sums one class of two
    np.testing.assert_allclose(metrics.brier(logits, labels), expected, rtol=1e-5)


def test_ece_bins_are_closed_on_the_right():
    # Confidence 0.5 belongs to (0.4, 0.5]; with 0.55 it must not share a bin.
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.55, 0.45]]))
    got = metrics.ece(logits, jnp.array([1, 0]))
    np.testing.assert_allclose(got, (0.5 + 0.45) / 2, rtol=1e-5)
    pooled = metrics.ece(logits, jnp.array([1, 0]), num_bins=1)
    np.testing.assert_allclose(pooled, abs(0.5 - 0.525), rtol=1e-4)


def test_ece_certain_predictions():
    logits = jnp.array([[100.0, 0.0], [100.0, 0.0]])
    np.testing.assert_allclose(metrics.ece(logits, jnp.array([0, 1])), 0.5)
    with pytest.raises(ValueError, match="num_bins"):
        metrics.ece(logits, jnp.array([0, 1]), num_bins=0)


def test_entropy():
    p = special.softmax(LOGITS, axis=1)
    got = metrics.predictive_entropy(LOGITS)
    np.testing.assert_allclose(got, stats.entropy(p, axis=1), rtol=1e-4)


def test_entropy_of_zero_probabilities():
    logits = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, -jnp.inf, -jnp.inf]])
    got = metrics.predictive_entropy(logits)
    np.testing.assert_allclose(got, [np.log(2), 0], atol=1e-6)


def test_small_integer_labels():
    assert metrics.accuracy(jnp.eye(3), np.arange(3, dtype=np.uint8)) == 1
