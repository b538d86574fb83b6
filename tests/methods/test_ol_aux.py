"""OL-AUX: the recurrence against a loop in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import step

from mtljax.methods._ol_aux import ol_aux


def test_follows_the_recurrence():
    rng = np.random.default_rng(0)
    balancer = ol_aux(3, main=1, learning_rate=0.01, update_every=4)
    weights, gathered, state = np.ones(3), np.zeros(3), None
    for k in range(13):
        matrix = rng.normal(size=(3, 6))
        found = step(balancer, matrix, state=state)
        np.testing.assert_allclose(found.weights, weights, rtol=1e-5)
        state = found.state
        gathered += matrix @ matrix[1]
        if k % 4 == 3:
            change = 0.01 * gathered
            change[1] = 0
            weights, gathered = weights + change, np.zeros(3)


def test_is_the_hypergradient_of_the_main_loss_one_step_ahead():
    """d/dw_k of L_m(θ - η Σ w_j g_j) is -η <g_m, g_k> to first order in η."""
    targets = np.array([[1.0, 0.0], [0.5, 2.0]])
    eta = 1e-5

    def grads(theta):
        return theta - targets

    def ahead(w):
        theta = -eta * w @ grads(np.zeros(2))
        return 0.5 * ((theta - targets[0]) ** 2).sum()

    h = 1e-3
    numeric = (ahead(np.array([1, 1 + h])) - ahead(np.array([1, 1 - h]))) / (2 * h)
    balancer = ol_aux(2, learning_rate=1.0, update_every=1)
    learned = step(balancer, grads(np.zeros(2))).state.learned
    np.testing.assert_allclose(-eta * (learned[1] - 1), numeric, rtol=3e-3)


def test_an_absent_task_keeps_what_it_gathered():
    balancer = ol_aux(3, learning_rate=0.1, update_every=2)
    matrix = np.eye(3) + 1.0
    first = step(balancer, matrix)
    second = step(
        balancer, matrix, state=first.state, mask=np.array([True, True, False])
    )
    assert second.state.learned[1] > 1
    assert second.state.learned[2] == 1
    assert second.state.gathered[2] == first.state.gathered[2] > 0
    third = step(
        balancer, matrix, state=second.state, mask=np.array([False, True, True])
    )
    np.testing.assert_array_equal(third.state.learned, second.state.learned)


@pytest.mark.usefixtures("as_users")
def test_bad_options_are_named():
    with pytest.raises(ValueError, match="main=5"):
        ol_aux(3, main=5)
    with pytest.raises(
        ValueError, match="learning_rate must be a finite number above 0, not 0"
    ):
        ol_aux(3, learning_rate=0)
    with pytest.raises(ValueError, match="update_every must be positive, not 0"):
        ol_aux(3, update_every=0)
    assert ol_aux(2).init({"w": jnp.zeros(2)}).learned.shape == (2,)
