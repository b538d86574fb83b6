"""Partitions, orders, rounds; what a resumed run draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alternating import problem
from alternating.problem import LABELS, LR, TASKS, XS, start

from mtljax.alternating import (
    Groups,
    StepOptions,
    alternate,
    balanced_groups,
)

KEY = jax.random.key(3)


@pytest.mark.parametrize(("tasks", "groups"), [(7, 3), (6, 3), (5, 1), (4, 4)])
def test_a_partition_is_balanced_and_complete(tasks, groups):
    rows = np.asarray(jax.jit(lambda k: balanced_groups(k, tasks, groups))(KEY))
    sizes = (rows < tasks).sum(1)
    assert sizes.max() - sizes.min() <= 1
    assert rows.shape == (groups, sizes.max())
    assert sorted(rows[rows < tasks].tolist()) == list(range(tasks))
    assert (rows[rows >= tasks] == tasks).all()
    if groups in (1, tasks):  # nothing to draw, so no key
        np.testing.assert_array_equal(rows.ravel(), np.arange(tasks))
        balanced_groups(None, tasks, groups)


def test_all_partitions_are_equally_likely():
    draws = jax.vmap(lambda k: balanced_groups(k, 4, 2))(jax.random.split(KEY, 3000))
    draws = np.asarray(draws)
    first = np.where((draws[:, 0] == 0).any(1)[:, None], draws[:, 0], draws[:, 1])
    partner = first.sum(1)  # of task 0
    counts = np.array([(partner == other).sum() for other in (1, 2, 3)])
    # Three partitions; a count has mean 1000 and deviation 26.
    np.testing.assert_allclose(counts, 1000, atol=130)


def plans(batches, state=None, **options):
    """Members of every batch's steps, without training."""
    steps = alternate(optax.sgd(LR), TASKS, key=KEY, **options)
    params = jnp.zeros(1)

    @jax.jit
    def step(state, x):
        plan = steps.plan(state)
        loss = lambda p, task, x: p.sum() + x[task]
        return plan, steps.step(loss, params, state, x)[2]

    state = steps.init(params) if state is None else state
    found = []
    for x in batches:
        plan, state = step(state, x)
        found.append(np.asarray(plan.members))
    return found


FLAT = np.zeros((12, TASKS), np.float32)


def as_sets(plan):
    return sorted(tuple(sorted(row[row < TASKS])) for row in plan)


def planned(**options):
    """The same for random orders, which do not depend on what happened before."""
    steps = alternate(optax.sgd(LR), TASKS, groups=Groups(2, **options), key=KEY)
    state = steps.init(jnp.zeros(1))
    plan = jax.vmap(lambda batch: steps.plan(state._replace(batch=batch)))
    return list(np.asarray(jax.jit(plan)(jnp.arange(12)).members))


def test_regrouping_every_batch_epoch_or_never():
    often = planned()
    assert len({tuple(as_sets(p)) for p in often}) > 4
    epochs = planned(regroup_every=4)
    by_epoch = [{tuple(as_sets(p)) for p in epochs[i : i + 4]} for i in (0, 4, 8)]
    assert [len(partitions) for partitions in by_epoch] == [1, 1, 1]
    assert len(set.union(*by_epoch)) > 1
    # The order of the two groups is still drawn every batch.
    assert len({p.tobytes() for p in epochs}) > len(set.union(*by_epoch))
    never = planned(regroup_every="never")
    assert len({tuple(as_sets(p)) for p in never}) == 1


@pytest.mark.parametrize("order", ["random", "fixed"])
def test_a_round_of_batches_visits_every_task_once(order):
    found = plans(FLAT, groups=3, schedule="per_batch", order=order)
    assert all(plan.shape == (1, 2) for plan in found)
    for start_ in range(0, len(found), 3):
        seen = np.concatenate([p.ravel() for p in found[start_ : start_ + 3]])
        assert sorted(seen[seen < TASKS].tolist()) == list(range(TASKS))


def test_fixed_order_is_round_robin():
    found = plans(FLAT, schedule="per_batch", order="fixed")
    assert [int(p[0, 0]) for p in found] == [t % TASKS for t in range(len(found))]
    same = plans(FLAT[:2], order="fixed")
    assert same[0].ravel().tolist() == same[1].ravel().tolist() == list(range(TASKS))


def test_largest_loss_first():
    losses = np.array([3, 1, 4, 2, 5], np.float32)
    turned = losses[::-1]
    found = plans([losses, turned, losses], order="largest_loss_first")
    assert found[0].ravel().tolist() == list(range(TASKS))  # nothing seen yet
    assert found[1].ravel().tolist() == np.argsort(-losses).tolist()
    assert found[2].ravel().tolist() == np.argsort(-turned).tolist()
    # A round that has begun keeps its order.
    rounds = plans([losses] * 10, order="largest_loss_first", schedule="per_batch")
    firsts = [int(p[0, 0]) for p in rounds]
    assert firsts == [*range(TASKS), *np.argsort(-losses).tolist()]


def to_disk(state):
    """Leaves as plain numpy, keys as their data: what a checkpoint holds."""

    def leaf(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(leaf, state)


def from_disk(saved, like):
    def leaf(x, old):
        is_key = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(x) if is_key else jnp.asarray(x)

    return jax.tree.map(leaf, saved, like)


@pytest.mark.parametrize(
    "schedule", ["same_batch", pytest.param("per_batch", marks=pytest.mark.deep)]
)
def test_resuming_within_an_epoch_gives_the_same_bits(schedule):
    options = {
        "schedule": schedule,
        "groups": Groups(2, regroup_every=4),
        "labels": LABELS,
        "options": StepOptions(moments="bfloat16"),
    }
    batches = np.concatenate([XS, XS[:2]])
    whole = alternate(optax.adam(LR), TASKS, key=KEY, **options)
    params, state, _ = problem.run(whole, start(), batches)
    half, saved, _ = problem.run(whole, start(), batches[:3])
    # The key comes from the state, not from whoever resumes.
    other = alternate(optax.adam(LR), TASKS, key=jax.random.key(99), **options)
    restored = from_disk(to_disk(saved), other.init(half))
    got, resumed, _ = problem.run(other, half, batches[3:], state=restored)
    chex.assert_trees_all_equal(got, params)
    chex.assert_trees_all_equal(to_disk(resumed), to_disk(state))
    # And another key would not have given them.
    fresh, _, _ = problem.run(other, start(), batches)
    assert (fresh["theta"] != params["theta"]).any()
