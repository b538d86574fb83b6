"""Uncertainty weighting against its loss in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

import mtljax
from mtljax.methods._uncertainty import uncertainty_weights

LOSSES = jnp.asarray(LOSSES3, jnp.float32)


def test_golden_loss_and_slope_at_the_start():
    weights, slope = uncertainty_weights(jnp.zeros(3), LOSSES, jnp.full(3, 0.5))
    np.testing.assert_allclose(weights @ LOSSES, 1.75, rtol=1e-6)
    np.testing.assert_allclose(slope, [0.25, -0.5, 0.0], atol=1e-6)


def test_weights_and_slope_are_the_gradients_of_the_papers_loss():
    s, factors = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.5, 1.0, 0.5])

    def loss(losses, s):
        return jnp.sum(factors * jnp.exp(-s) * losses + s / 2)

    expected = jax.grad(loss, (0, 1))(LOSSES, s)
    got = uncertainty_weights(s, LOSSES, factors)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_first_steps_of_the_log_variances():
    balancer = mtljax.uncertainty(3, optimizer=optax.sgd(0.1))
    first = step(balancer, J3)
    np.testing.assert_allclose(first.weights, [0.5, 0.5, 0.5])
    s = -0.1 * np.array([0.25, -0.5, 0.0])
    np.testing.assert_allclose(first.state.log_variances.value, s, atol=1e-6)
    second = step(balancer, J3, state=first.state)
    np.testing.assert_allclose(second.weights, 0.5 * np.exp(-s), rtol=1e-6)
    np.testing.assert_allclose(second.update, second.weights @ J3, rtol=1e-5)


def test_kinds_and_start():
    kinds = ["classification", "regression", "classification"]
    balancer = mtljax.uncertainty(3, kinds=kinds, initial_log_variance=-0.5)
    weights = np.array([1.0, 0.5, 1.0]) * np.exp(0.5)
    np.testing.assert_allclose(step(balancer, J3).weights, weights, rtol=1e-6)


def test_at_its_optimum_it_is_scale_invariant():
    balancer = mtljax.uncertainty(3, optimizer=optax.sgd(1.0))
    state = None
    for _ in range(60):
        last = step(balancer, J3, state=state)
        state = last.state
    np.testing.assert_allclose(
        state.log_variances.value, np.log(LOSSES3), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(last.weights, 0.5 / LOSSES3, rtol=1e-4)


def test_an_absent_task_keeps_its_variance_and_its_adam():
    """Adam's bias correction counts the steps of each task."""
    balancer = mtljax.uncertainty(3, learning_rate=0.1)
    alone = mtljax.uncertainty(1, learning_rate=0.1)
    state, alone_state = balancer.init({}), alone.init({})
    rng = np.random.default_rng(0)
    for present in ([1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]):
        losses = rng.uniform(0.5, 3, size=3)
        state = step(balancer, J3, losses, state=state, mask=np.array(present, bool))[2]
        if present[1]:
            alone_state = step(alone, J3[1:2], losses[1:2], state=alone_state)[2]
    np.testing.assert_allclose(
        state.log_variances.value[1], alone_state.log_variances.value[0], rtol=1e-5
    )


def test_scale_does_not_change_what_is_learned():
    native = step(make(mtljax.uncertainty, 3), J3)
    mean = step(make(mtljax.uncertainty, 3, scale="mean"), J3)
    np.testing.assert_allclose(mean.weights, np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(
        native.state.log_variances.value, mean.state.log_variances.value
    )


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="kinds='ranking' is not one of"):
        mtljax.uncertainty(2, kinds="ranking")
    with pytest.raises(ValueError, match="kinds has 1 entries for num_tasks=2"):
        mtljax.uncertainty(2, kinds=["regression"])
