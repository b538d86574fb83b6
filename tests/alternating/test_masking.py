"""What takes no part in a step stays as it is, bit by bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alternating import problem
from alternating.problem import LABELS, LR, TASKS, XS, start, task_loss

from mtljax.alternating import alternate, check_owners, indexed

KEY = jax.random.key(0)

# Heads of different shapes, each of one task.
OWNERS = {"trunk": "shared", "heads": {"a": 0, "b": 1, "c": 2}}
PARAMS = {
    "trunk": jnp.array([0.5, -1.0, 2.0]),
    "heads": {"a": jnp.ones(3), "b": {"w": jnp.ones((2, 3)), "v": jnp.ones(2)}},
}
PARAMS["heads"]["c"] = jnp.ones((1, 3))


def three_losses(params, x):
    h, heads = jnp.tanh(x * params["trunk"]), params["heads"]
    return jnp.stack(
        [
            jnp.square(heads["a"] @ h - 1),
            jnp.square(heads["b"]["v"] @ (heads["b"]["w"] @ h) + 2),
            jnp.square(heads["c"] @ h).sum() + jnp.square(heads["c"]).sum(),
        ]
    )


by_index = indexed(three_losses)


def by_switch(params, task, x):
    branches = [lambda p, i=i: three_losses(p, x)[i] for i in range(3)]
    return jax.lax.switch(task, branches, params)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def rows_of(tree, task):
    return [np.asarray(x)[task].tobytes() for x in jax.tree.leaves(tree)]


def test_rows_of_inactive_tasks_do_not_change_nor_do_their_states():
    steps = alternate(
        optax.adamw(LR),
        TASKS,
        schedule="per_batch",
        groups=3,
        state="per_task",
        order="fixed",
        key=KEY,
        labels=LABELS,
    )

    def loss(params, task, xs):
        return problem.task_loss(params, task, xs[task])

    step = jax.jit(lambda p, s, x: steps.step(loss, p, s, x))
    plan_of = jax.jit(steps.plan)
    params, state = start(), steps.init(start())
    for x in np.tile(XS, 2):
        members = np.asarray(plan_of(state).members)
        absent = ~np.isin(np.arange(TASKS), members)
        old_params, old = params, state
        _, params, state = step(params, state, np.where(absent, np.nan, x))
        assert state.active.tolist() == (~absent).tolist()
        assert np.isfinite(params["theta"]).all()
        for task in range(TASKS):
            kept = [
                rows_of(new, task) == rows_of(before, task)
                for new, before in (
                    (params["phi"], old_params["phi"]),
                    (state.rows, old.rows),
                    (state.shared, old.shared),
                )
            ]
            assert kept == [bool(absent[task])] * 3
    assert state.counts.tolist() == [4] * TASKS


@pytest.mark.parametrize(
    "loss", [by_index, pytest.param(by_switch, marks=pytest.mark.deep)]
)
def test_heads_of_any_shape_step_in_turn(loss):
    steps = alternate(
        optax.adam(LR), 3, schedule="per_batch", order="fixed", labels=OWNERS
    )
    step = jax.jit(lambda p, s, x: steps.step(loss, p, s, x))
    params, state = PARAMS, steps.init(PARAMS)
    for number, x in enumerate(XS):
        old_params, old = params, state
        _, params, state = step(params, state, jnp.float32(x))
        changed = [
            bits(params["heads"][name]) != bits(old_params["heads"][name])
            for name in "abc"
        ]
        assert changed == [number % 3 == task for task in range(3)]
        pairs = zip(state.owned, old.owned, strict=True)
        assert [bits(n) != bits(o) for n, o in pairs] == changed
    assert [int(s[0].count) for s in state.owned] == [2, 2, 2]


def test_masked_tasks_are_as_if_they_were_not_there():
    """Task 1 is absent throughout: a run of the other two gives the same numbers."""
    steps = alternate(optax.adam(LR), 3, order="fixed", labels=OWNERS)
    step = jax.jit(lambda p, s, x, mask: steps.step(by_index, p, s, x, mask=mask))
    params, state = PARAMS, steps.init(PARAMS)
    two = alternate(
        optax.adam(LR),
        2,
        labels={"trunk": "shared", "heads": {"a": 0, "c": 1}},
        order="fixed",
    )
    only = {"trunk": PARAMS["trunk"], "heads": {n: PARAMS["heads"][n] for n in "ac"}}

    def two_losses(params, x):
        full = {**params, "heads": {**params["heads"], "b": PARAMS["heads"]["b"]}}
        return three_losses(full, x)[jnp.array([0, 2])]

    want, want_state = only, two.init(only)
    small = jax.jit(lambda p, s, x: two.step(indexed(two_losses), p, s, x))
    for x in XS[:3]:
        losses, params, state = step(params, state, jnp.float32(x), jnp.arange(3) != 1)
        want_losses, want, want_state = small(want, want_state, jnp.float32(x))
        np.testing.assert_allclose(losses[jnp.array([0, 2])], want_losses, rtol=1e-6)
    assert bits(params["heads"]["b"]) == bits(PARAMS["heads"]["b"])
    np.testing.assert_allclose(params["trunk"], want["trunk"], rtol=1e-6)
    np.testing.assert_allclose(params["heads"]["c"], want["heads"]["c"], rtol=1e-6)
    assert state.active.tolist() == [True, False, True]
    _, same, after = step(params, state, jnp.float32(1), jnp.zeros(3, bool))
    assert bits(same) == bits(params)
    assert bits(after.shared) == bits(state.shared)


def test_zero_gradients_drift_by_the_root_of_t_and_masks_do_not():
    """A head whose task steps every fourth batch, under a constant gradient."""
    tasks, active_steps, rate = 4, 100, 1e-3
    batches = tasks * active_steps
    adam = optax.adam(rate)

    def naive(carry, number):
        head, state = carry
        grad = (number % tasks == 0).astype(head.dtype)
        updates, state = adam.update(grad, state)
        return (head + updates, state), None

    first = jnp.zeros(())
    drift = jax.lax.scan(naive, (first, adam.init(first)), jnp.arange(batches))[0][0]
    steps = alternate(
        adam, tasks, schedule="per_batch", order="fixed", labels={"w": "shared", "h": 0}
    )
    params = {"w": jnp.zeros(()), "h": first}

    def masked(carry, _):
        loss = lambda p, task, batch: p["w"] + jnp.where(task == 0, p["h"], 0.0)
        _, *carry = steps.step(loss, *carry, None)
        return tuple(carry), None

    run = jax.jit(lambda c: jax.lax.scan(masked, c, length=batches)[0])
    params, _ = run((params, steps.init(params)))
    assert float(params["h"]) == pytest.approx(-rate * active_steps, rel=1e-3)
    assert float(drift) == pytest.approx(-rate * active_steps * tasks**0.5, rel=0.01)


def test_check_owners():
    check_owners(by_index, OWNERS, PARAMS, 1.0, num_tasks=3)
    wrong = {"trunk": "shared", "heads": {"a": 2, "b": 1, "c": 0}}
    message = "'heads/a' is labelled 2 but the loss of task 0 depends on it too"
    with pytest.raises(ValueError, match=message):
        check_owners(by_index, wrong, PARAMS, 1.0, num_tasks=3)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"trunk": "shared", "heads": {"a": 0, "b": "head", "c": 2}},
            "b/v' is labelled",
        ),
        (
            {"trunk": "shared", "heads": "own"},
            r"'heads/b/v' .* has shape \(2,\).*num_t",
        ),
        ({"trunk": "shared", "heads": 3}, r"labelled 3, but the tasks are 0 to 2"),
        ({"trunk": "shared", "heads": {"a": True, "b": 1, "c": 2}}, "labelled True"),
        (
            {"trunk": 0, "heads": 1},
            "no parameter is shared; the parameters are heads/a",
        ),
        ("own", "labels='own' is not a tree"),
        ({"trunk": "shared"}, r"labels must be a tree.*has the paths trunk, and the"),
        (lambda path: "own" if "trunk" in path else "shared", None),
        (lambda path: 5 if "trunk" in path else "shared", "'trunk' is labelled 5"),
    ],
)
def test_labels_that_fit_nothing(labels, message):
    steps = alternate(optax.sgd(LR), 3, order="fixed", labels=labels)
    if message is None:  # three rows, as it happens
        steps.init(PARAMS)
        return
    with pytest.raises(ValueError, match=message):
        steps.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        steps.step(by_index, PARAMS, None, 1.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 1, "state": "shared"}, {"groups": 1, "state": "per_task"}],
    ids=["alternating", "one step", "side by side"],
)
def test_a_step_that_is_not_finite_is_skipped(options):
    """As if the broken task, or the whole joint step, had been absent."""
    steps = alternate(optax.adam(LR), TASKS, order="fixed", labels=LABELS, **options)

    def broken(params, task, batch):
        x, bad = batch
        return task_loss(params, task, x) + jnp.where(bad & (task == 1), jnp.nan, 0)

    @jax.jit
    def step(params, state, x, bad, mask):
        return steps.step(broken, params, state, (x, bad), mask=mask)

    params, everyone = start(), jnp.ones(TASKS, bool)
    _, params, state = step(params, steps.init(params), XS[0], False, everyone)
    losses, got, new = step(params, state, XS[1], True, everyone)
    assert np.isnan(losses).tolist() == [task == 1 for task in range(TASKS)]
    joint = options.get("state") == "shared"
    mask = everyone & False if joint else everyone.at[1].set(False)
    _, want, want_state = step(params, state, XS[1], False, mask)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(new, want_state)
