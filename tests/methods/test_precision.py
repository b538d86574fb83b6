"""Precision and dtypes: x64, the condition of the gradients, states in a scan."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64

import mtljax

LOSSES = np.array([0.5, 2.0, 1.0])
SMALL = {
    "igb_v2": {
        "phases": mtljax.IGBPhases(window=(0, 1)),
        "agent": mtljax.IGBAgent(hidden=(4,), capacity=4, batch_size=2),
    }
}


@pytest.mark.parametrize("name", mtljax.METHODS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_state_dtypes_do_not_change_under_x64(name, dtype):
    with enable_x64():
        key = jax.random.key(0)
        balancer = mtljax.get_method(name).build(3, key=key, **SMALL.get(name, {}))
        params = {"w": jnp.zeros(5, dtype)}
        state = balancer.init(params)
        grads = {"w": jax.ShapeDtypeStruct((3, 5), dtype)}
        losses = jax.ShapeDtypeStruct((3,), dtype)
        update, new = jax.eval_shape(
            lambda g, s, v: balancer.update(g, s, losses=v), grads, state, losses
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(update, params)


def test_nash_uses_its_solution_at_full_precision():
    """At condition 8e3 weights rounded to float32 leave a residual of 0.5."""
    with enable_x64():
        rng = np.random.default_rng(0)
        left = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        right = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
        matrix = left @ np.diag([1, 1, 1, 1 / 8e3]) @ right
        for every in (1, 3):
            balancer = mtljax.nash_mtl(4, update_every=every)
            weights, _ = balancer.weigh(
                balancer.init({}), gramian=jnp.asarray(matrix @ matrix.T)
            )
            weights = np.asarray(weights)
            residual = np.abs(weights * (matrix @ (matrix.T @ weights)) - 1).max()
            assert residual < 1e-6


def test_constants_keep_their_digits():
    with enable_x64():
        grads = {"w": jnp.eye(3, dtype=jnp.float64)}
        thirds = np.array([1 / 3, 2 / 3, 1.0])
        balancer = mtljax.linear(3, weights=thirds)
        update, _ = balancer.update(grads, balancer.init({}))
        np.testing.assert_allclose(update["w"], thirds, rtol=1e-15)
        balancer = mtljax.upgrad(3, preference=thirds)
        update, _ = balancer.update(grads, balancer.init({}))
        np.testing.assert_allclose(update["w"], thirds / 2, rtol=1e-15)


def rows(condition, rng):
    """Unit-length rows whose matrix has about this condition number."""
    left = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    right = np.linalg.qr(rng.normal(size=(300, 300)))[0][:4]
    matrix = left @ np.diag(np.geomspace(1, 1 / condition, 4)) @ right
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def test_conflict_free_loses_the_condition_and_not_its_square():
    balancer = mtljax.conflict_free(4)
    rng = np.random.default_rng(0)
    for condition, bound in ((23, 4e-5), (300, 5e-4)):
        for _ in range(5):
            matrix = rows(condition, rng) * rng.uniform(0.1, 10, (4, 1))
            matrix = matrix.astype(np.float32).astype(np.float64)
            units = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
            x = np.linalg.pinv(units) @ np.ones(4)
            x = x / np.linalg.norm(x)
            expected = (matrix @ x).sum() * x
            grads = {"w": jnp.asarray(matrix, jnp.float32)}
            update, _ = balancer.update(grads, balancer.init({}))
            error = np.linalg.norm(update["w"] - expected) / np.linalg.norm(expected)
            assert error < bound
