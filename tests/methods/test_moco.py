"""MoCo: golden values, the recurrences of paper and LibMTL in float64, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import J3, LOSSES3

from mtljax.methods._moco import moco

RNG = np.random.default_rng(0)
ALL = np.ones(3, bool)


@functools.cache
def jitted(**options):
    balancer = moco(3, **options)
    return balancer, jax.jit(balancer.update)


def tree(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return {"a": matrix[:, :2].reshape(3, 2, 1), "b": [matrix[:, 2:]]}


def run(matrices, masks=None, **options):
    """Weights, updates and the state after every step."""
    balancer, update = jitted(**options)
    state = balancer.init(jax.tree.map(lambda g: g[0], tree(J3)))
    for matrix, mask in zip(matrices, masks or [ALL] * len(matrices), strict=True):
        losses = jnp.asarray(LOSSES3, jnp.float32)
        out, state = update(tree(matrix), state, losses=losses, mask=jnp.asarray(mask))
        yield np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)]), state


def test_golden():
    (update, state), (_, after) = run([J3, J3])
    np.testing.assert_allclose(state.task_weights, [0.4, 0.375, 0.225], atol=1e-5)
    np.testing.assert_allclose(update, [0.2125, 0.475, -0.0375, 0.65], atol=1e-5)
    expected = [0.467474, 0.405228, 0.127298]
    np.testing.assert_allclose(after.task_weights, expected, atol=1e-5)


def project(vector):
    descending = np.sort(vector)[::-1]
    excess = np.cumsum(descending) - 1
    size = np.arange(1, len(vector) + 1)
    last = np.nonzero(descending * size > excess)[0][-1]
    return np.maximum(vector - excess[last] / (last + 1), 0)


def softmax(vector):
    return np.exp(vector) / np.exp(vector).sum()


@pytest.mark.parametrize("compat", ["paper", "libmtl"])
def test_recurrence(compat):
    matrices = RNG.normal(size=(6, 3, 4))
    tracked, shares = np.zeros((3, 4)), np.full(3, 1 / 3)
    options = {"beta": 0.7, "beta_sigma": 0.3, "gamma": 0.2, "rho": 0.5}
    steps = run(matrices, compat=compat, **options)
    for k, (matrix, (update, state)) in enumerate(zip(matrices, steps, strict=True), 1):
        grads = matrix
        if compat == "libmtl":
            grads = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
            grads = grads * LOSSES3[:, None]
        tracked = tracked - 0.7 / k**0.3 * (tracked - grads)
        slope = (tracked @ tracked.T + 0.5 * np.eye(3)) @ shares
        shares = shares - 0.2 / k**0.5 * slope
        shares = project(shares) if compat == "paper" else softmax(shares)
        np.testing.assert_allclose(state.task_weights, shares, atol=1e-5)
        np.testing.assert_allclose(update, shares @ tracked, atol=1e-5)


def test_tracks_the_mean_of_noisy_gradients():
    """What the method is for: weights of the mean gradients, not of the noise."""
    noise = 3 * RNG.normal(size=(400, 3, 4))
    *_, (_, state) = run(J3[None] + noise, beta_sigma=0.9)
    tracked = np.hstack([state.tracked["a"][..., 0], state.tracked["b"][0]])
    assert np.abs(tracked - J3).max() < 1.0
    assert np.abs(tracked - J3).mean() < 0.4


def test_an_absent_task_keeps_its_gradient_and_its_count():
    masks = [ALL, np.array([True, False, True]), ALL]
    first, second, third = (s for _, s in run([J3, 2 * J3, J3], masks))
    for before, after in zip(
        jax.tree.leaves(first.tracked), jax.tree.leaves(second.tracked), strict=True
    ):
        np.testing.assert_array_equal(before[1], after[1])
        assert np.abs(before[0] - after[0]).max() > 0.1
    np.testing.assert_array_equal(second.steps, [2, 1, 2])
    np.testing.assert_array_equal(third.steps, [3, 2, 3])
    assert second.task_weights[1] == 0
    np.testing.assert_array_equal(second.shares[1], first.shares[1])


def test_halves_are_tracked_in_float32():
    balancer = moco(2)
    params = {"w": jnp.zeros(3, jnp.bfloat16)}
    state = balancer.init(params)
    assert state.tracked["w"].dtype == jnp.float32
    grads = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    update, new = balancer.update(grads, state)
    assert update["w"].dtype == jnp.bfloat16
    assert new.tracked["w"].dtype == jnp.float32


def test_scale():
    for scale, factor in (("sum", 3), ("mean", 1)):
        ((update, state),) = run([J3], scale=scale)
        expected = factor * np.array([0.2125, 0.475, -0.0375, 0.65])
        np.testing.assert_allclose(update, expected, atol=1e-5)
        np.testing.assert_allclose(state.task_weights.sum(), factor, rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for options, message in [
        ({"beta": 0.0}, r"beta must be a finite number above 0 and at most 1, not 0.0"),
        ({"beta": 1.5}, r"beta must be a finite number above 0 and at most 1, not 1.5"),
        ({"gamma": 0.0}, "gamma must be a finite number above 0, not 0.0"),
        (
            {"beta_sigma": -1.0},
            "beta_sigma must be a finite number at least 0, not -1.0",
        ),
        (
            {"gamma_sigma": -1.0},
            "gamma_sigma must be a finite number at least 0, not -1.0",
        ),
        ({"rho": float("nan")}, "rho must be a finite number at least 0, not nan"),
        ({"compat": "torchjd"}, "compat='torchjd' is not one of 'paper', 'libmtl'"),
        ({"scale": "big"}, "scale='big' is not one of"),
    ]:
        with pytest.raises(ValueError, match=f"moco: {message}"):
            moco(2, **options)
    grads, balancer = {"w": jnp.eye(2)}, moco(2)
    for wrong in ({}, grads):
        with pytest.raises(ValueError, match=r"moco: gradient .*shared_params"):
            balancer.update(grads, balancer.init(wrong))
    balancer = moco(2, compat="libmtl")
    state = balancer.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="moco reads the task losses"):
        balancer.update(grads, state)
