"""Random loss weighting: the distribution, and fresh draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import step
from zoo import J3

import mtljax
from mtljax.methods._random_loss_weighting import random_weights


def test_golden_softmax():
    weights = random_weights(jnp.array([0.0, 1.0, -1.0]))
    np.testing.assert_allclose(weights, [0.244728, 0.665241, 0.090031], atol=1e-6)


def test_softmax_of_standard_normals():
    """Unbiased, and log-ratios are N(0, 2), as for no other weights."""

    def draw(key):
        balancer = mtljax.random_loss_weighting(3, key=key)
        return balancer.update({"w": jnp.eye(3)}, balancer.init({}))[0]["w"]

    weights = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), 4000))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.mean(0), np.full(3, 1 / 3), atol=0.02)
    ratios = np.log(weights[:, 0] / weights[:, 1])
    np.testing.assert_allclose(ratios.mean(), 0, atol=0.12)
    np.testing.assert_allclose(ratios.var(), 2, rtol=0.12)


def test_every_step_draws_anew_and_a_key_repeats():
    balancer = mtljax.random_loss_weighting(3, key=jax.random.key(0))
    first = step(balancer, J3)
    second = step(balancer, J3, state=first.state)
    assert np.abs(first.weights - second.weights).max() > 1e-3
    np.testing.assert_array_equal(step(balancer, J3).weights, first.weights)
    np.testing.assert_allclose(second.update, second.weights @ J3, rtol=1e-5)


def test_present_tasks_share_the_weight():
    balancer = mtljax.random_loss_weighting(3, key=jax.random.key(0))
    _, weights, _ = step(balancer, J3, mask=[True, False, True])
    assert weights[1] == 0
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


def test_a_key_is_required():
    with pytest.raises(TypeError, match="key"):
        mtljax.random_loss_weighting(3)
