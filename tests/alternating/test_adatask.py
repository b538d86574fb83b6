"""adatask: an optimiser a task, side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtljax
from mtljax.alternating import adatask

GRADS = (
    np.random.default_rng(0).normal(size=(6, 3, 4)) * np.array([1, 100, 0.01])[:, None]
)
PARAMS = {"w": jnp.arange(4.0)}


def alone(optimizer, rows, params=PARAMS):
    """Updates of one task's optimiser, and its last state."""
    state, found = optimizer.init(params), []
    for row in rows:
        updates, state = optimizer.update({"w": jnp.asarray(row)}, state, params)
        found.append(np.asarray(updates["w"]))
    return np.array(found), state


def test_the_update_is_the_sum_of_the_tasks_own():
    adamw = optax.adamw(0.1, weight_decay=0.3)  # reads the parameters
    opt = adatask(adamw, 3)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    grads = GRADS.astype(np.float32)
    expected = sum(alone(adamw, grads[:, t])[0] for t in range(3))
    for grad, want in zip(grads, expected, strict=True):
        updates, state = update({"w": jnp.asarray(grad)}, state, PARAMS)
        np.testing.assert_allclose(updates["w"], want, rtol=1e-5, atol=1e-6)
    assert int(state.batch) == 6


def test_absent_and_broken_tasks():
    adam = optax.adam(lambda count: 0.1 / (count + 1.0))
    opt = adatask(adam, 3)
    state, update = opt.init(PARAMS), jax.jit(opt.update)
    grad = jnp.asarray(GRADS[0], jnp.float32)
    _, state = update({"w": grad}, state, mask=jnp.ones(3, bool))
    mask = jnp.array([True, False, True])
    poisoned = grad.at[1].set(jnp.nan)
    updates, new = update({"w": poisoned}, state, mask=mask)
    # Row 1 is frozen, its bias correction too; the schedule goes by updates.
    for old, after in zip(
        jax.tree.leaves(state.tasks), jax.tree.leaves(new.tasks), strict=True
    ):
        same = np.asarray(old) == np.asarray(after)
        assert same.reshape(3, -1)[1].all()
        assert not same.reshape(3, -1)[[0, 2]].all(1).any()
    assert new.tasks[0].count.tolist() == [2, 1, 2]
    rate = 0.1 / 2
    np.testing.assert_allclose(
        updates["w"], -rate * jnp.sign(grad[jnp.array([0, 2])]).sum(0), atol=1e-5
    )
    broken, same = update({"w": poisoned}, new, mask=jnp.ones(3, bool))
    assert np.isnan(broken["w"]).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), same, new))


def test_in_the_engine_and_in_16_bits():
    def task_losses(params):
        return jnp.stack([params["w"].sum(), -1000 * params["w"].sum()])

    opt = adatask(optax.adam(0.1), 2, moments="bfloat16", key=jax.random.key(0))
    grad_fn = mtljax.value_and_balanced_grad(task_losses, opt)
    losses, update, state = jax.jit(grad_fn)(PARAMS, opt.init(PARAMS))
    np.testing.assert_allclose(losses, [6, -6000])
    np.testing.assert_allclose(update["w"], 0, atol=1e-6)
    assert state.tasks[0].nu["w"].dtype == jnp.bfloat16
    assert state.tasks[0].nu["w"].shape == (2, 4)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="adatask: num_tasks must be a positive"):
        adatask(optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="adatask: moments='bfloat16' rounds"):
        adatask(optax.sgd(0.1), 2, moments="bfloat16")
    with pytest.raises(ValueError, match="adatask: the optimizer must be an optax"):
        adatask(mtljax, 2).init(PARAMS)
    opt = adatask(optax.sgd(0.1), 2)
    with pytest.raises(ValueError, match="first axis must be num_tasks=2"):
        opt.update({"w": jnp.ones((3, 4))}, opt.init(PARAMS))
