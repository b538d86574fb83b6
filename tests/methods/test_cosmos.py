"""COSMOS is the gradient of its scalarisation, for any preference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._cosmos import cosmos, cosmos_weights

GRADS = {"w": jnp.eye(3)}
LOSSES = jnp.asarray(LOSSES3, jnp.float32)


def slope(losses, r, lam):
    """Closed form in float64."""
    length, size = np.linalg.norm(losses), np.linalg.norm(r)
    cosine = r @ losses / length / size
    return r - lam * (r / (length * size) - cosine * losses / length**2)


@pytest.mark.parametrize("lam", [0.01, 2.0, 8.0])
def test_weights_are_the_gradient_of_the_papers_loss(lam):
    r = jnp.array([0.2, 0.7, 0.1])

    def loss(x):
        return r @ x - lam * (r @ x) / jnp.linalg.norm(x) / jnp.linalg.norm(r)

    weights = cosmos_weights(LOSSES, r, lam)
    np.testing.assert_allclose(weights, jax.grad(loss)(LOSSES), rtol=1e-4, atol=1e-5)
    expected = slope(LOSSES3, np.asarray(r, np.float64), lam)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)


def test_two_tasks_closed_form():
    """ℓ = (3, 4) is 5 long; r = (1/2, 1/2) is 1/√2 long, at a cosine of 1.4/√2."""
    weights = cosmos_weights(jnp.array([3.0, 4.0]), jnp.full(2, 0.5), 1.0)
    expected = 0.5 - (np.array([1.0, 1.0]) - 1.4 * np.array([0.6, 0.8])) / 5 / 2**0.5
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_without_penalty_it_is_linear():
    _, weights, _ = step(make(cosmos, 3, lam=0.0), J3)
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)
    _, weights, _ = step(make(cosmos, 3, lam=0.0, scale="sum"), J3)
    np.testing.assert_allclose(weights, np.ones(3), rtol=1e-6)


def test_losses_along_the_preference_feel_no_penalty():
    r = jnp.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(cosmos_weights(4 * r, r, 8.0), r, atol=1e-5)


def test_preference_of_the_construction_and_of_the_step():
    balancer = make(cosmos, 3, preference=(2.0, 1.0, 1.0))
    update = jax.jit(balancer.update)
    state = balancer.init({})
    got, _ = update(GRADS, state, losses=LOSSES)
    expected = slope(LOSSES3, np.array([0.5, 0.25, 0.25]), 2.0)
    np.testing.assert_allclose(got["w"], expected, rtol=1e-5)
    r = jnp.array([0.1, 0.2, 0.7])
    got, state = update(GRADS, state, losses=LOSSES, preference=r)
    expected = slope(LOSSES3, np.array([0.1, 0.2, 0.7]), 2.0)
    np.testing.assert_allclose(got["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(state.task_weights, expected, rtol=1e-5)


def test_a_front_of_preferences_by_vmap():
    preferences = np.random.default_rng(0).dirichlet([1.2] * 3, size=5)

    def weights(r):
        balancer = cosmos(3, preference=r)
        return balancer.update(GRADS, balancer.init({}), losses=LOSSES)[0]["w"]

    got = jax.jit(jax.vmap(weights))(jnp.asarray(preferences, jnp.float32))
    expected = [slope(LOSSES3, r, 2.0) for r in preferences]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_preference_is_shared_by_the_present_tasks():
    balancer = make(cosmos, 3, preference=(0.2, 0.5, 0.3))
    _, weights, _ = step(balancer, J3, mask=[True, False, True])
    expected = slope(LOSSES3[[0, 2]], np.array([0.4, 0.6]), 2.0)
    np.testing.assert_allclose(weights[[0, 2]], expected, rtol=1e-5)
    assert weights[1] == 0
    one_sided = make(cosmos, 3, preference=(0.0, 1.0, 0.0))
    update, _, _ = step(one_sided, J3, mask=[True, False, True])
    np.testing.assert_array_equal(update, np.zeros(4))


def test_zero_losses_have_no_angle():
    r = jnp.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(cosmos_weights(jnp.zeros(3), r, 2.0), r, rtol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="cosmos: lam must be a finite number at least 0, not -1"
    ):
        cosmos(2, lam=-1.0)
    with pytest.raises(ValueError, match=r"cosmos: preference has shape \(3,\).*\(2,"):
        cosmos(2, preference=[1.0, 1.0, 1.0])
    for bad in ([-1.0, 2.0], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="not negative and not all zero"):
            cosmos(2, preference=bad)
    balancer = cosmos(3)
    with pytest.raises(ValueError, match=r"preference has shape \(2,\)"):
        balancer.update(GRADS, balancer.init({}), losses=LOSSES, preference=jnp.ones(2))
