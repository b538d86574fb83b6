"""IMTL-L against its loss in closed form, and against uncertainty weighting."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._imtl_l import imtl_l, imtl_l_weights
from mtljax.methods._uncertainty import uncertainty

LOSSES = jnp.asarray(LOSSES3, jnp.float32)


def test_golden_loss_and_slope_at_the_start():
    weights, slope = imtl_l_weights(jnp.zeros(3), LOSSES)
    np.testing.assert_allclose(weights @ LOSSES, 3.5, rtol=1e-6)
    np.testing.assert_allclose(slope, [-0.5, 1.0, 0.0], atol=1e-6)


def test_weights_and_slope_are_the_gradients_of_the_papers_loss():
    s = jnp.array([0.3, -1.0, 2.0])
    loss = lambda losses, s: jnp.sum(jnp.exp(s) * losses - s)
    expected = jax.grad(loss, (0, 1))(LOSSES, s)
    np.testing.assert_allclose(imtl_l_weights(s, LOSSES), expected, rtol=1e-5)


def test_first_steps_of_the_log_scales():
    balancer = make(imtl_l, 3, optimizer=optax.sgd(0.1))
    first = step(balancer, J3)
    np.testing.assert_allclose(first.weights, np.ones(3))
    s = -0.1 * np.array([-0.5, 1.0, 0.0])
    np.testing.assert_allclose(first.state.log_scales.value, s, atol=1e-6)
    second = step(balancer, J3, state=first.state)
    np.testing.assert_allclose(second.weights, np.exp(s), rtol=1e-6)
    np.testing.assert_allclose(second.update, second.weights @ J3, rtol=1e-5)


def test_it_is_twice_uncertainty_weighting_with_the_opposite_sign():
    """Adam does not see the factor of the slope, so this lasts over steps."""
    ours, theirs = (
        make(imtl_l, 3, initial_log_scale=0.5),
        make(uncertainty, 3, initial_log_variance=-0.5),
    )
    state = their_state = None
    rng = np.random.default_rng(0)
    for _ in range(5):
        losses = rng.uniform(0.5, 3, size=3)
        _, weights, state = step(ours, J3, losses, state=state)
        _, halves, their_state = step(theirs, J3, losses, state=their_state)
        np.testing.assert_allclose(weights, 2 * halves, rtol=1e-5)


def test_at_its_optimum_all_scaled_losses_are_one():
    balancer = make(imtl_l, 3, optimizer=optax.sgd(0.5))
    state = None
    for _ in range(60):
        last = step(balancer, J3, state=state)
        state = last.state
    np.testing.assert_allclose(last.weights * LOSSES3, np.ones(3), rtol=1e-4)


def test_an_absent_task_keeps_its_scale_and_its_adam():
    balancer, alone = make(imtl_l, 3), make(imtl_l, 1)
    state = alone_state = None
    rng = np.random.default_rng(0)
    for present in ([1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0]):
        losses = rng.uniform(0.5, 3, size=3)
        state = step(balancer, J3, losses, state=state, mask=np.array(present, bool))[2]
        if present[1]:
            alone_state = step(alone, J3[1:2], losses[1:2], state=alone_state)[2]
    np.testing.assert_allclose(
        state.log_scales.value[1], alone_state.log_scales.value[0], rtol=1e-5
    )


def test_a_scale_without_bound_stays_finite():
    weights, slope = imtl_l_weights(jnp.array([1e4, 0.0]), jnp.array([0.0, 1.0]))
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(slope, [-1.0, 0.0])


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="imtl_l: learning_rate must be a finite number above 0"
    ):
        imtl_l(2, learning_rate=0.0)
