"""The geometric loss strategy is the gradient of the geometric mean."""

import jax
import jax.numpy as jnp
import numpy as np
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._geometric_mean import geometric_mean, geometric_mean_weights
from mtljax.methods._scale_invariant import scale_invariant


def test_golden_weights():
    update, weights, _ = step(make(geometric_mean, 3), J3)
    np.testing.assert_allclose(weights, [2 / 3, 1 / 6, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(update, np.array([2 / 3, 1 / 6, 1 / 3]) @ J3, rtol=1e-5)


def test_weights_are_the_gradient_of_the_papers_loss():
    losses = jnp.array([0.3, 2.0, 7.0, 1e-3])
    expected = jax.grad(lambda x: jnp.prod(x) ** 0.25)(losses)
    np.testing.assert_allclose(geometric_mean_weights(losses), expected, rtol=1e-5)


def test_two_tasks_closed_form():
    """Half the square root of the other loss over this one."""
    weights = geometric_mean_weights(jnp.array([4.0, 9.0]))
    np.testing.assert_allclose(weights, [0.75, 1 / 3], rtol=1e-6)


def test_the_mean_is_over_present_tasks():
    mask = [True, False, True]
    _, weights, _ = step(make(geometric_mean, 3), J3, [4.0, 1e6, 9.0], mask=mask)
    np.testing.assert_allclose(weights, [0.75, 0.0, 1 / 3], rtol=1e-6)


def test_direction_is_that_of_scale_invariant():
    for losses in (LOSSES3, np.array([1e-3, 5.0, 1e4])):
        one = step(make(geometric_mean, 3, scale="mean"), J3, losses)
        other = step(make(scale_invariant, 3, scale="mean"), J3, losses)
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-5)


def test_products_that_leave_the_range_of_floats():
    for loss in (1e-12, 1e12):
        weights = geometric_mean_weights(jnp.full(40, loss))
        np.testing.assert_allclose(weights, np.full(40, 1 / 40), rtol=1e-4)
