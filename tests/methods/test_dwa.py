"""Dynamic weight average: the golden vector, windows, and absent tasks."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import step
from zoo import J3

import mtljax
from mtljax.methods._dwa import dwa_weights

PREVIOUS, LAST = np.array([0.6, 2.2, 1.1]), np.array([0.5, 2.0, 1.0])
GOLDEN = [0.974909, 1.012546, 1.012546]


def test_golden_weights():
    weights = dwa_weights(jnp.asarray(LAST), jnp.asarray(PREVIOUS), 2.0)
    np.testing.assert_allclose(weights, GOLDEN, atol=2e-6)


def test_windows_are_averaged_and_uniform_until_there_are_two():
    balancer = mtljax.dwa(3, window=2)
    wiggle = np.array([0.1, -0.2, 0.3])
    fed = [PREVIOUS + wiggle, PREVIOUS - wiggle, LAST - wiggle, LAST + wiggle]
    state = None
    for losses in fed:
        _, weights, state = step(balancer, J3, losses, state=state)
        np.testing.assert_array_equal(weights, np.ones(3))
    for _ in range(2):  # and stay until the next window is full
        update, weights, state = step(balancer, J3, [9.0, 1.0, 1.0], state=state)
        np.testing.assert_allclose(weights, GOLDEN, atol=2e-6)
        np.testing.assert_allclose(update, weights @ J3, rtol=1e-5)
    _, weights, _ = step(balancer, J3, state=state)
    assert weights[0] > 2  # its loss went from 0.5 to 9


def test_temperature_goes_to_equal_weights():
    last, previous = jnp.array([1.0, 4.0]), jnp.array([2.0, 1.0])
    hot = dwa_weights(last, previous, 1e4)
    np.testing.assert_allclose(hot, [1, 1], atol=1e-3)
    cold = dwa_weights(last, previous, 0.1)
    np.testing.assert_allclose(cold, [0, 2], atol=1e-6)


def test_a_window_counts_the_batches_in_which_a_task_was_present():
    balancer = mtljax.dwa(3, window=1)
    fed = [([1.0, 2.0, 4.0], [1, 1, 1]), ([2.0, 3.0, np.nan], [1, 1, 0])]
    state = None
    for losses, mask in fed:
        state = step(balancer, J3, losses, state=state, mask=np.array(mask, bool))[2]
    # Task 2 has one window only, so batches with it are not weighted yet ...
    third = step(balancer, J3, [2.0, 3.0, 1.0], state=state)
    np.testing.assert_array_equal(third.weights, np.ones(3))
    # ... while those without it are.
    pair = step(
        balancer, J3, [2.0, 3.0, 1.0], state=state, mask=np.array([1, 1, 0], bool)
    )
    raw = np.exp(np.array([2 / 1, 3 / 2]) / 2)
    np.testing.assert_allclose(pair.weights[:2], 2 * raw / raw.sum(), rtol=1e-5)
    fourth = step(balancer, J3, [1.0, 1.0, 1.0], state=third.state)
    raw = np.exp(np.array([2 / 2, 3 / 3, 1 / 4]) / 2)
    np.testing.assert_allclose(fourth.weights, 3 * raw / raw.sum(), rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="window must be at least one step, not 0"):
        mtljax.dwa(2, window=0)
    with pytest.raises(
        ValueError, match="temperature must be a finite number above 0, not 0"
    ):
        mtljax.dwa(2, temperature=0.0)
