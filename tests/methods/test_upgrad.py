"""UPGrad: golden values, two tasks in closed form, linearity, preferences."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, padded, random_pairs, step, steps
from solvers import problems
from zoo import J2, J3

import mtljax


def test_golden():
    got = step(make(mtljax.upgrad, 3), J3)
    np.testing.assert_allclose(got.weights, [0.611111, 0.484848, 0.333333], atol=1e-5)
    update = [0.737374, 1.176768, -0.181818, 1.944444]
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    assert got.state.solver.converged
    assert got.state.solver.residual < 1e-5
    matrix, mask = padded(J2)
    got = step(make(mtljax.upgrad, 3), matrix, mask=mask)
    np.testing.assert_allclose(got.weights, [1.111111, 0.789474, 0], atol=1e-5)
    np.testing.assert_allclose(got.update, [0.292398, 1.900585, 1.900585, 0], atol=1e-5)


def test_two_tasks_are_pcgrad():
    pairs = random_pairs()
    wide = pairs.astype(np.float64)
    dot = (wide[:, 0] * wide[:, 1]).sum(1)
    squares = (wide**2).sum(2)
    expected = 1 - np.minimum(dot, 0)[:, None] / squares
    got = steps(make(mtljax.upgrad, 2, scale="sum"), pairs)
    np.testing.assert_allclose(got.weights, expected, rtol=1e-5)


def test_against_nnls():
    matrices = np.random.default_rng(0).normal(size=(40, 5, 8)).astype(np.float32)
    got = steps(make(mtljax.upgrad, 5), matrices)
    for matrix, update in zip(matrices.astype(np.float64), got.update, strict=True):
        gramian = matrix @ matrix.T
        extra = [problems.nonnegative_qp(gramian, gramian[:, i]) for i in range(5)]
        expected = (1 + np.sum(extra, 0)) / 5 @ matrix
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-4)


def test_linear_in_the_length_of_every_gradient():
    balancer = make(mtljax.upgrad, 3)
    a, b = np.array([0.1, 20.0, 1.0]), np.array([3.0, 0.5, 0.2])
    whole = step(balancer, (a + b)[:, None] * J3).update
    parts = [step(balancer, c[:, None] * J3).update for c in (a, b)]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-4, atol=1e-4)


def test_preference_of_the_factory_and_of_the_step():
    p = np.array([0.2, 0.0, 1.8]) / 2  # normalised
    rows = [
        step(make(mtljax.upgrad, 3, preference=tuple(unit)), J3).update
        for unit in np.eye(3)
    ]
    equal = step(make(mtljax.upgrad, 3), J3).update
    np.testing.assert_allclose(np.sum(rows, 0) / 3, equal, atol=1e-5)
    expected = p @ np.array(rows)
    got = step(make(mtljax.upgrad, 3, preference=tuple(2 * p)), J3).update
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    balancer = mtljax.upgrad(3, preference=(1.0, 1.0, 1.0))
    grads = {"w": jnp.asarray(J3, jnp.float32)}
    state = balancer.init(grads)
    side = jnp.asarray(3 * p, jnp.float32)
    update, _ = balancer.update(grads, state, preference=side)
    np.testing.assert_allclose(update["w"], expected, rtol=1e-5, atol=1e-5)


def test_opposed_tasks_leave_nothing():
    got = steps(make(mtljax.upgrad, 2), np.stack([J3[0], -2 * J3[0]])[None])
    np.testing.assert_allclose(got.update, 0, atol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match=r"upgrad: preference has shape \(2,\)"):
        mtljax.upgrad(3, preference=[1.0, 2.0])
    with pytest.raises(ValueError, match="upgrad: preference must be"):
        mtljax.upgrad(2, preference=[1.0, -1.0])
