"""Forks and their training: exact for one SGD step, equal for every strategy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forkmerge.problem import (
    ADAM,
    STEPS,
    TASKS,
    batches,
    initial,
    make_step,
    task_losses,
    trained,
)
from jax.sharding import Mesh
from precision import enable_x64

from mtljax import forkmerge

SGD = optax.sgd(0.1)


def leaves_close(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def merged_and_weighted(optimizer, nu, weights):
    """Merged after one step of every branch, and one step on the mixed weights."""
    one = batches(1, np.float64)
    state, step = initial(optimizer, np.float64), make_step(optimizer)
    nu, weights = jnp.asarray(nu, float), jnp.asarray(weights)

    @jax.jit
    def both(state):
        branches = forkmerge.fork(state, len(nu))
        branches, _ = forkmerge.train_branches(step, branches, nu, one)
        single, _ = step(state, weights @ nu, jax.tree.map(lambda x: x[0], one))
        return forkmerge.merge(branches, weights).params, single.params

    return both(state)


@pytest.mark.parametrize(
    ("nu", "weights"),
    [
        # Algorithm 1, Λ = (1 - λ, λ); and K + 1 branches.
        (forkmerge.target_vs_all(TASKS), [0.3, 0.7]),
        (forkmerge.target_plus_each(TASKS), [0.5, 0.2, 0.3]),
    ],
    ids=["B=2", "B=K+1"],
)
def test_one_step_of_sgd_is_the_step_on_mixed_weights(nu, weights):
    with enable_x64():
        leaves_close(*merged_and_weighted(SGD, nu, weights), rtol=0, atol=1e-15)


def test_one_step_of_adam_is_not():
    with enable_x64():
        nu = forkmerge.target_vs_all(TASKS)
        merged, single = merged_and_weighted(ADAM, nu, [0.3, 0.7])
        assert np.abs(merged["trunk"]["w"] - single["trunk"]["w"]).max() > 1e-3


@pytest.mark.parametrize("strategy", ["map", "shard"])
def test_strategies_give_the_same_numbers(strategy):
    # One device here; eight of them in test_sharding.
    mesh = Mesh(jax.devices()[:1], ("branch",)) if strategy == "shard" else None
    branches = forkmerge.fork(initial(ADAM), TASKS, mesh=mesh)
    nu = forkmerge.target_plus_each(TASKS)
    run = jax.jit(
        lambda b: forkmerge.train_branches(
            make_step(ADAM), b, nu, batches(), strategy=strategy, mesh=mesh
        )
    )
    got, metrics = run(branches)
    want, reference = trained()
    leaves_close(got, want, rtol=1e-5, atol=1e-6)
    leaves_close(metrics, reference, rtol=1e-5, atol=1e-6)
    assert metrics["losses"].shape == (TASKS, STEPS, TASKS)
    # A branch is a plain training: here the one of the target alone.
    state, step = initial(ADAM), jax.jit(make_step(ADAM))
    for i in range(STEPS):
        batch = jax.tree.map(lambda x, i=i: x[i], batches())
        state, _ = step(state, jnp.array([1.0, 0.0, 0.0]), batch)
    leaves_close(jax.tree.map(lambda x: x[0], got), state, rtol=1e-4, atol=1e-6)


def walk(state, what, batch, data):
    """A counter of everything that the step is given."""
    return state + data * batch + 100 * what, what


@pytest.mark.parametrize("strategy", ["vmap", "map"])
def test_batches_of_a_branch_data_and_drawn_tasks(strategy):
    nu = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    own = jnp.arange(12.0).reshape(4, 3)
    key = jax.random.key(3)

    @jax.jit
    def run(branches, batches, start):
        return forkmerge.train_branches(
            walk,
            branches,
            nu,
            batches,
            data=jnp.array(2.0),
            per_branch=True,
            realisation="sample",
            key=key,
            start_step=start,
            strategy=strategy,
        )

    branches, first = run(jnp.zeros(3), own[:2], 5)
    branches, second = run(branches, own[2:], 7)
    orders = np.asarray(forkmerge.task_orders(key, nu, 4, start_step=5))
    np.testing.assert_array_equal(np.concatenate([first, second], 1), orders)
    expected = 2 * own.sum(0) + 100 * orders.sum(1)
    np.testing.assert_array_equal(branches, expected)


def test_a_fork_copies_counters_keys_and_arrays():
    state = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": 3, "key": jax.random.key(7)}
    found = forkmerge.fork(state, 4)
    assert found["w"].shape == (4, 2, 3)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["n"], [3, 3, 3, 3])
    assert found["key"].shape == (4,)
    assert found["key"][2] == state["key"]
    assert forkmerge.take_branches(found, (3, 1))["w"].shape == (2, 2, 3)


def test_the_losses_fall():
    _, metrics = trained()
    for branch in range(1, TASKS):  # target and one more
        both = metrics["losses"][branch][:, [0, branch]].sum(1)
        assert both[-1] < 0.8 * both[0]
    assert task_losses(
        initial(ADAM).params, jax.tree.map(lambda x: x[0], batches())
    ).shape


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"branch_weights": jnp.ones((2, 2))},
            r"branch_weights has shape \(2, 2\); with 3 branches it must be "
            r"\(3, tasks\)",
        ),
        ({"branch_weights": jnp.ones(3)}, r"shape \(3,\)"),
        ({"branches": {"w": jnp.ones(3), "b": jnp.ones(2)}}, "'w' .*the 2 branches"),
        ({"branches": {"w": jnp.ones(3), "b": 1.0}}, r"leaf 'b' .* has shape \(\)"),
        ({"branches": ()}, "an empty tree"),
        ({"batches": {}}, "hold no array"),
        ({"batches": jnp.ones((0, 2))}, "has 0 steps"),
        ({"batches": {"a": jnp.ones(2), "b": jnp.ones(3)}}, "'b' has 3 steps"),
        ({"batches": jnp.ones((4, 2)), "per_branch": True}, r"\(steps, 3, ...\)"),
        ({"realisation": "sample"}, "needs key="),
        ({"realisation": "mean"}, "'mean' is not one of 'sum', 'sample'"),
        ({"strategy": "pmap"}, "strategy='pmap' is not one of"),
        ({"step": lambda s, w, b: s}, r"must return \(state, metrics\)"),
    ],
)
def test_errors(options, message):
    given = {
        "step": lambda s, w, b: (s, {}),
        "branches": jnp.zeros(3),
        "branch_weights": jnp.ones((3, 2)),
        "batches": jnp.ones(4),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        forkmerge.train_branches(**given)


@pytest.mark.usefixtures("as_users")
def test_more_branches_than_devices():
    count = len(jax.devices()) + 1
    step = lambda s, w, b: (s, {})
    with pytest.raises(
        ValueError, match=rf"{count} branches need as many devices, .* {count - 1};"
    ):
        forkmerge.train_branches(
            step, jnp.zeros(count), jnp.ones((count, 2)), jnp.ones(1), strategy="shard"
        )
    mesh = Mesh(jax.devices()[:1], ("data",))
    with pytest.raises(ValueError, match=r"axes \('data',\); it needs one named"):
        forkmerge.fork(0.0, 2, mesh=mesh)
    for count in (0, True, 1.5):
        with pytest.raises(ValueError, match="num_branches must be a positive"):
            forkmerge.fork(0.0, count)
    with pytest.raises(ValueError, match="empty tree"):
        forkmerge.fork({}, 2)
