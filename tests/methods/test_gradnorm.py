"""GradNorm: the golden slope, and runs against the algorithm written in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._gradnorm import gradnorm, gradnorm_slope

NORMS = np.sqrt([6.0, 11.0, 21.0])
START = np.array([1.0, 2.0, 4.0])
SGD = optax.sgd(0.01)


def slope(weights, norms, progress, alpha=1.5):
    scaled = weights * norms
    gap = scaled - scaled.mean() * (progress / progress.mean()) ** alpha
    return np.abs(gap).sum(), np.sign(gap) * norms


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_golden_objective_and_slope():
    progress = jnp.asarray(LOSSES3 / START, jnp.float32)
    norms = jnp.asarray(NORMS, jnp.float32)
    value, got = gradnorm_slope(jnp.ones(3), norms, progress, 1.5)
    np.testing.assert_allclose(value, 8.328705, rtol=1e-5)
    np.testing.assert_allclose(got, [-2.44949, -3.316625, 4.582576], rtol=1e-5)


def test_slope_is_the_gradient_with_the_target_held():
    weights, norms = jnp.array([0.4, 1.5, 1.1]), jnp.asarray(NORMS, jnp.float32)
    progress = jnp.array([0.5, 0.9, 1.2])

    def objective(w):
        scaled = w * norms
        rate = progress / progress.mean()
        target = jax.lax.stop_gradient(scaled.mean() * rate**1.5)
        return jnp.abs(scaled - target).sum()

    expected = jax.value_and_grad(objective)(weights)
    got = gradnorm_slope(weights, norms, progress, 1.5)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_first_step_of_the_paper():
    """It is taken with equal weights; then w descends and is renormalised."""
    balancer = make(gradnorm, 3, optimizer=SGD, initial_losses=tuple(START))
    first = step(balancer, J3)
    np.testing.assert_array_equal(first.weights, np.ones(3))
    np.testing.assert_allclose(first.update, J3.sum(0), rtol=1e-5)
    moved = 1 - 0.01 * np.array([-2.44949, -3.316625, 4.582576])
    second = step(balancer, J3, state=first.state)
    np.testing.assert_allclose(second.weights, 3 * moved / moved.sum(), rtol=1e-5)


@pytest.mark.parametrize("compat", ["paper", "libmtl"])
def test_a_run_equals_the_reference(compat):
    balancer = make(gradnorm, 3, optimizer=SGD, compat=compat)
    rng = np.random.default_rng(0)
    learned = np.ones(3) if compat == "paper" else np.zeros(3)
    initial = state = None
    for _ in range(8):
        matrix, losses = rng.normal(size=(3, 4)), rng.uniform(0.5, 2, size=3)
        initial = losses if initial is None else initial
        weights = learned if compat == "paper" else 3 * softmax(learned)
        update, got, state = step(balancer, matrix, losses, state=state)
        np.testing.assert_allclose(got, weights, rtol=1e-4)
        np.testing.assert_allclose(update, weights @ matrix, rtol=1e-3, atol=1e-4)
        norms = np.linalg.norm(matrix, axis=1)
        _, grad = slope(weights, norms, losses / initial)
        if compat == "paper":
            learned = learned - 0.01 * grad
            learned = 3 * learned / learned.sum()
        else:
            z = softmax(learned)
            learned = learned - 0.01 * 3 * (np.diag(z) - np.outer(z, z)) @ grad
    assert np.abs(got - 1).max() > 0.05


def test_two_tasks_come_to_equal_norms():
    """α = 0 asks for w_i n_i all the same: w = 2 (n_2, n_1) / (n_1 + n_2)."""
    balancer = make(gradnorm, 2, alpha=0.0, learning_rate=0.01)
    state, matrix = None, np.diag([1.0, 3.0])
    for _ in range(120):
        last = step(balancer, matrix, np.ones(2), state=state)
        state = last.state
    np.testing.assert_allclose(last.weights, [1.5, 0.5], atol=0.03)


def test_a_slower_task_gets_more():
    balancer = make(gradnorm, 2, learning_rate=0.01)
    state = None
    for losses in ([1.0, 1.0], *[[0.2, 0.9]] * 10):
        last = step(balancer, np.eye(2), losses, state=state)
        state = last.state
    assert last.weights[1] > 1.05
    np.testing.assert_allclose(last.weights.sum(), 2, rtol=1e-5)


def test_weights_stay_positive_and_can_come_back():
    balancer = make(gradnorm, 2, optimizer=optax.sgd(1.0))
    state = None
    for _ in range(4):
        last = step(balancer, np.diag([1.0, 50.0]), np.ones(2), state=state)
        state = last.state
        assert (last.weights >= 0).all()
        assert (state.learned.value > 0).all()
    assert np.isfinite(last.weights).all()
    np.testing.assert_allclose(last.weights.sum(), 2, rtol=1e-5)
    slow = make(gradnorm, 2, learning_rate=0.1)
    low = slow.init({})
    low = low._replace(learned=low.learned._replace(value=jnp.array([1e-6, 2.0])))
    for _ in range(5):
        low = step(slow, np.eye(2), np.ones(2), state=low).state
    assert low.learned.value[0] > 0.3


def test_reference_losses_are_means_over_each_tasks_own_steps():
    balancer = make(gradnorm, 3, reference_steps=2)
    missing = np.array([True, False, True])
    state = step(balancer, J3, [1.0, 9.0, 2.0], mask=missing).state
    np.testing.assert_array_equal(state.steps, [1, 0, 1])
    state = step(balancer, J3, [3.0, 5.0, 4.0], state=state).state
    np.testing.assert_allclose(state.initial, [2.0, 5.0, 3.0])
    # One task present has not got its reference yet: nothing has been learned.
    np.testing.assert_array_equal(state.learned.value, np.ones(3))
    state = step(balancer, J3, [7.0, 9.0, 7.0], state=state).state
    np.testing.assert_allclose(state.initial, [2.0, 7.0, 3.0])
    assert np.abs(state.learned.value - 1).max() > 0.01


@pytest.mark.parametrize("compat", ["paper", "libmtl"])
def test_an_absent_task_keeps_its_share(compat):
    balancer = make(gradnorm, 3, learning_rate=0.1, compat=compat)
    state = step(balancer, J3).state
    before = state.learned
    missing = np.array([True, False, True])
    _, weights, state = step(balancer, J3, [0.1, 1.0, 1.0], state=state, mask=missing)
    np.testing.assert_allclose(weights.sum(), 2, rtol=1e-5)
    for new, old in zip(
        jax.tree.leaves(state.learned), jax.tree.leaves(before), strict=True
    ):
        assert new[1] == old[1]
    if compat == "paper":
        np.testing.assert_allclose(state.learned.value.sum(), 3, rtol=1e-5)


def test_the_reference_is_the_first_positive_loss():
    balancer, state = make(gradnorm, 3), None
    for losses in (np.zeros(3), np.array([0.0, 1.0, 2.0])):
        update, weights, state = step(balancer, J3, losses, state=state)
        assert np.isfinite(update).all()
        np.testing.assert_array_equal(weights, np.ones(3))
        np.testing.assert_array_equal(state.learned.value, np.ones(3))
    assert state.steps.tolist() == [0, 1, 1]
    _, _, state = step(balancer, J3, [4.0, 1.0, 2.0], state=state)
    assert state.initial.tolist() == [4.0, 1.0, 2.0]
    assert (state.learned.value != 1).any()


@pytest.mark.parametrize("compat", ["paper", "libmtl"])
def test_one_present_task_teaches_nothing(compat):
    balancer, state = make(gradnorm, 3, compat=compat), None
    for _ in range(2):  # the second step moves Adam
        _, _, state = step(balancer, J3, LOSSES3, state=state)
    mask = np.array([False, True, False])
    new = step(balancer, J3, 0.3 * LOSSES3, state=state, mask=mask).state
    chex.assert_trees_all_equal(new.learned, state.learned)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="gradnorm: alpha must be a finite number at least 0"
    ):
        gradnorm(2, alpha=-1.0)
    with pytest.raises(
        ValueError, match="learning_rate must be a finite number above 0, not 0"
    ):
        gradnorm(2, learning_rate=0.0)
    with pytest.raises(ValueError, match="reference_steps must be at least 1, not 0"):
        gradnorm(2, reference_steps=0)
    with pytest.raises(ValueError, match=r"initial_losses has shape \(3,\)"):
        gradnorm(2, initial_losses=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="compat='torch' is not one of 'paper'"):
        gradnorm(2, compat="torch")
