"""PBI is the gradient of its scalarisation, and finite on the line itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._pbi import pbi, pbi_weights

LOSSES = jnp.asarray(LOSSES3, jnp.float32)
ZEROS = jnp.zeros(3)


def slope(losses, r, ideal=0.0, theta=5.0):
    """Closed form in float64."""
    unit = r / np.linalg.norm(r)
    beside = (losses - ideal) - (losses - ideal) @ unit * unit
    return unit + theta * beside / np.linalg.norm(beside)


@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
def test_weights_are_the_gradient_of_the_papers_loss(theta):
    r, ideal = jnp.array([0.2, 0.7, 0.1]), jnp.array([0.1, 0.3, -0.2])

    def loss(x):
        unit = r / jnp.linalg.norm(r)
        along = (x - ideal) @ unit
        return along + theta * jnp.linalg.norm(x - ideal - along * unit)

    weights = pbi_weights(LOSSES, r, ideal, theta)
    np.testing.assert_allclose(weights, jax.grad(loss)(LOSSES), rtol=1e-4, atol=1e-5)
    exact = slope(LOSSES3, np.array([0.2, 0.7, 0.1]), np.array([0.1, 0.3, -0.2]), theta)
    np.testing.assert_allclose(weights, exact, rtol=1e-5, atol=1e-5)


def test_two_tasks_closed_form():
    """Beside r = (3, 4) there is only ±(4, -3)."""
    r, zero = jnp.array([3.0, 4.0]), jnp.zeros(2)
    above = pbi_weights(jnp.array([3.0, 3.0]), r, zero, 1.0)
    np.testing.assert_allclose(above, [0.6 + 0.8, 0.8 - 0.6], rtol=1e-5)
    below = pbi_weights(jnp.array([2.0, 5.0]), r, zero, 1.0)
    np.testing.assert_allclose(below, [0.6 - 0.8, 0.8 + 0.6], rtol=1e-5)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_on_the_line_there_is_no_penalty(size):
    """Rounding errors beside the line are not blown up to unit length."""
    r = np.array([0.3, 0.2, 0.5])
    losses = jnp.asarray(size * r, jnp.float32)
    weights = pbi_weights(losses, jnp.asarray(r, jnp.float32), ZEROS, 5.0)
    np.testing.assert_allclose(weights, r / np.linalg.norm(r), rtol=1e-6)
    exact = pbi_weights(jnp.full(3, size), jnp.full(3, 0.25), ZEROS, 0.0)
    np.testing.assert_allclose(exact, np.full(3, 3**-0.5), rtol=1e-6)
    at_ideal = pbi_weights(ZEROS, jnp.ones(3), ZEROS, 5.0)
    np.testing.assert_allclose(at_ideal, np.full(3, 3**-0.5), rtol=1e-6)


def test_a_single_task_is_itself():
    _, weights, _ = step(make(pbi, 3), J3, mask=[False, True, False])
    np.testing.assert_allclose(weights, [0.0, 1.0, 0.0], atol=1e-5)


def test_preference_of_the_construction_and_of_the_step():
    balancer = make(pbi, 3, preference=(2.0, 1.0, 1.0), ideal=(0.1, 0.0, 0.2))
    grads, state, update = (
        {"w": jnp.eye(3)},
        balancer.init({}),
        jax.jit(balancer.update),
    )
    ideal = np.array([0.1, 0.0, 0.2])
    for r, extra in (
        ([2.0, 1.0, 1.0], {}),
        ([0.1, 0.2, 0.7], {"preference": jnp.array([0.1, 0.2, 0.7])}),
    ):
        got, _ = update(grads, state, losses=LOSSES, **extra)
        expected = slope(LOSSES3, np.array(r), ideal)
        np.testing.assert_allclose(got["w"], expected, rtol=1e-4, atol=1e-5)


def test_absent_tasks_have_no_axis():
    _, weights, _ = step(make(pbi, 3, preference=(2.0, 1.0, 1.0)), J3, mask=[1, 0, 1])
    expected = slope(LOSSES3[[0, 2]], np.array([2.0, 1.0]))
    np.testing.assert_allclose(weights[[0, 2]], expected, rtol=1e-5)
    assert weights[1] == 0


def test_scale_is_a_constant_and_keeps_the_direction():
    r = np.array([1.0, 0.2, 0.2])
    losses = np.array([5.0, 0.0, 0.0])
    native = step(make(pbi, 3, preference=tuple(r)), J3, losses)
    assert native.weights.sum() < -1  # dividing by it would turn the direction
    factor = np.linalg.norm(r) / r.sum()
    for scale, count in (("mean", 1), ("sum", 3)):
        got = step(make(pbi, 3, preference=tuple(r), scale=scale), J3, losses)
        np.testing.assert_allclose(
            got.weights, count * factor * native.weights, rtol=1e-5
        )


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="pbi: theta must be a finite number at least 0, not -1"
    ):
        pbi(2, theta=-1.0)
    with pytest.raises(ValueError, match=r"pbi: ideal has shape \(3,\)"):
        pbi(2, ideal=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="pbi: preference must be finite"):
        pbi(2, preference=[0.0, 0.0])
