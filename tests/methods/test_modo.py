"""MoDo: golden values, the recurrence in float64, the fixed point, two batches."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from methods.stepping import make, step
from zoo import J2, J3

from mtljax import stack
from mtljax.methods._modo import modo

RNG = np.random.default_rng(0)


def project(vector):
    """Onto the simplex, by bisection on the shift."""
    shift = scipy.optimize.brentq(
        lambda t: np.maximum(vector - t, 0).sum() - 1, vector.min() - 1, vector.max()
    )
    return np.maximum(vector - shift, 0)


def test_golden_three_steps():
    balancer, state = make(modo, 3, gamma=0.1, rho=0.1), None
    for expected in ([0.55, 0.45, 0], [0.607, 0.393, 0], [0.58648, 0.41352, 0]):
        got = step(balancer, J3, state=state)
        state = got.state
        np.testing.assert_allclose(got.weights, expected, atol=1e-5)
        np.testing.assert_allclose(got.update, expected @ J3, atol=1e-5)


def test_a_large_step_jumps_between_the_vertices():
    """Why the docstring warns: γ = 0.1 is above 1/‖G‖ on J2."""
    balancer, state, seen = make(modo, 2, gamma=0.1), None, []
    for _ in range(4):
        got = step(balancer, J2, state=state)
        state = got.state
        seen.append(got.weights[0])
    np.testing.assert_allclose(seen, [1, 0, 1, 0], atol=1e-6)


def test_rests_at_the_weights_of_mgda():
    balancer, state = make(modo, 3, gamma=0.05, rho=0.0), None
    for _ in range(60):
        got = step(balancer, J3, state=state)
        state = got.state
    np.testing.assert_allclose(got.weights, [0.592593, 0.407407, 0], atol=1e-5)


def test_large_rho_keeps_the_weights_uniform():
    balancer, state = make(modo, 3, gamma=1e-3, rho=900.0), None
    for _ in range(20):
        got = step(balancer, J3, state=state)
        state = got.state
    np.testing.assert_allclose(got.weights, np.full(3, 1 / 3), atol=0.02)


def test_recurrence_with_the_gramian_of_two_other_batches():
    balancer = make(modo, 3, gamma=0.1, rho=0.1)
    grads, state = {"w": jnp.asarray(J3, jnp.float32)}, balancer.init({})
    weights = np.full(3, 1 / 3)
    for _ in range(5):
        one, two = RNG.normal(size=(2, 3, 4)).astype(np.float32)
        cross = stack.cross_gramian({"w": jnp.asarray(one)}, {"w": jnp.asarray(two)})
        update, state = balancer.update(grads, state, cross_gramian=cross)
        matrix = one.astype(np.float64) @ two.astype(np.float64).T
        weights = project(weights - 0.1 * (matrix @ weights + 0.1 * weights))
        np.testing.assert_allclose(state.task_weights, weights, atol=1e-5)
        np.testing.assert_allclose(update["w"], weights @ J3, atol=1e-5)


def test_cross_gramian_under_a_mask_and_when_it_is_not_finite():
    balancer = make(modo, 3, gamma=0.1, rho=0.1)
    grads, state = {"w": jnp.asarray(J3, jnp.float32)}, balancer.init({})
    mask = jnp.array([True, True, False])
    cross = jnp.array([[2.0, 1, jnp.nan], [0, 1, 5], [jnp.nan, 0, 1]])
    _, new = balancer.update(grads, state, mask=mask, cross_gramian=cross)
    weights = project(np.array([0.5, 0.5]) - 0.1 * np.array([1.5, 0.5]))
    np.testing.assert_allclose(new.task_weights, [*weights, 0], atol=1e-6)
    np.testing.assert_allclose(new.shares[2], 1 / 3)
    update, new = balancer.update(grads, state, cross_gramian=cross)
    assert np.isnan(update["w"]).all()
    np.testing.assert_array_equal(new.shares, state.shares)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for gamma in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"modo: gamma .* above 0, not {gamma}"):
            modo(2, gamma=gamma)
    with pytest.raises(
        ValueError, match="modo: rho must be a finite number at least 0, not -1"
    ):
        modo(2, rho=-1.0)
    balancer, grads = modo(2), {"w": jnp.eye(2)}
    with pytest.raises(ValueError, match=r"modo: cross_gramian has shape \(3, 3\)"):
        balancer.update(grads, balancer.init(grads), cross_gramian=jnp.eye(3))
