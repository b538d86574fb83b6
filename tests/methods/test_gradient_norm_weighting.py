"""Gradient-norm weighting: the moving average against a loop in float64."""

import numpy as np
import pytest
from methods.stepping import step

from mtljax.methods._gradient_norm_weighting import gradient_norm_weighting


def test_follows_the_recurrence():
    rng = np.random.default_rng(0)
    balancer = gradient_norm_weighting(3, decay=0.8, update_every=3)
    average, state = np.ones(3), None
    for k in range(8):
        matrix = rng.normal(size=(3, 6)) * [[1.0], [10.0], [100.0]]
        if k % 3 == 0:
            norms = np.linalg.norm(matrix, axis=1)
            average = 0.8 * average + 0.2 * norms.mean() / norms
        found = step(balancer, matrix, state=state)
        np.testing.assert_allclose(found.weights, average, rtol=1e-5)
        np.testing.assert_allclose(found.update, average @ matrix, rtol=1e-4)
        state = found.state


def test_a_zero_gradient_keeps_its_weight_and_leaves_the_mean():
    matrix = np.array([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    found = step(gradient_norm_weighting(3, decay=0.0), matrix)
    np.testing.assert_allclose(found.weights, [2, 2 / 3, 1], rtol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_bad_options_are_named():
    with pytest.raises(
        ValueError, match=r"decay must be a finite number at least 0 and below 1, not 1"
    ):
        gradient_norm_weighting(3, decay=1)
    with pytest.raises(ValueError, match="update_every must be positive, not 0"):
        gradient_norm_weighting(3, update_every=0)
