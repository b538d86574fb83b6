"""A vector of numbers, each with an optimiser state of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtljax import per_task

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
}
START = jnp.array([1.0, -2.0, 0.5, 3.0])
GRADS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
each = pytest.mark.parametrize("name", OPTIMIZERS)


def alone(optimizer, start, grads):
    """optax on the whole vector."""
    value, state = start, optimizer.init(start)
    for grad in grads:
        updates, state = optimizer.update(jnp.asarray(grad), state, value)
        value = optax.apply_updates(value, updates)
    return value


@each
def test_without_masks_it_is_the_optimizer(name):
    optimizer = OPTIMIZERS[name]
    state = per_task.init(optimizer, START)
    for grad in GRADS:
        state = per_task.step(optimizer, state, jnp.asarray(grad), jnp.ones(4, bool))
    np.testing.assert_allclose(
        state.value, alone(optimizer, START, GRADS), rtol=1e-5, atol=1e-6
    )


@each
def test_every_entry_sees_only_its_own_steps(name):
    optimizer = OPTIMIZERS[name]
    masks = np.random.default_rng(1).random((6, 4)) < 0.5
    state = per_task.init(optimizer, START)
    for grad, mask in zip(GRADS, masks, strict=True):
        before = state
        dirty = jnp.asarray(np.where(mask, grad, np.nan))
        state = per_task.step(optimizer, state, dirty, jnp.asarray(mask))
        # Absent entries are frozen, moments and step count included.
        for old, new in zip(
            jax.tree.leaves(before), jax.tree.leaves(state), strict=True
        ):
            np.testing.assert_array_equal(old[~mask], new[~mask])
    for task in range(4):
        expected = alone(optimizer, START[task], GRADS[masks[:, task], task])
        np.testing.assert_allclose(state.value[task], expected, rtol=1e-5, atol=1e-6)


def test_the_count_is_per_entry():
    optimizer = OPTIMIZERS["adam"]
    state = per_task.init(optimizer, START)
    mask = jnp.array([True, False, True, False])
    for _ in range(3):
        state = per_task.step(optimizer, state, START, mask)
    count = optax.tree_utils.tree_get(state.opt_state, "count")
    np.testing.assert_array_equal(count, [3, 0, 3, 0])
