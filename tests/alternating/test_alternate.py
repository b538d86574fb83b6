"""alternate: against plain numpy, and the corners where it is something known."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alternating import problem
from alternating.problem import LABELS, LR, TASKS, XS, start, task_loss
from precision import enable_x64

import mtljax
from mtljax.alternating import Groups, StepOptions, adatask, alternate

KEY = jax.random.key(0)


CONFIGS = [
    # (optimiser, options, mask some tasks)
    ("adam", {}, False),
    ("adam", {"state": "shared"}, True),
    ("momentum", {"groups": 2, "state": "per_task"}, False),  # 3 + 2 tasks
    ("adam", {"groups": Groups(2, loss="mean"), "state": "per_task"}, True),
    ("adam", {"groups": 3}, False),
]
DEEP = [
    ("momentum", {"groups": 2, "schedule": "per_batch"}, True),
    ("momentum", {"groups": Groups(3, loss="mean")}, True),
    ("adam", {"schedule": "per_batch", "order": "fixed"}, False),
    ("adam", {"groups": 2, "state": "per_task", "schedule": "per_batch"}, False),
    ("momentum", {"groups": 4, "state": "shared", "order": "largest_loss_first"}, True),
]


@pytest.mark.parametrize(
    ("kind", "options", "masked"),
    [*CONFIGS, *(pytest.param(*c, marks=pytest.mark.deep) for c in DEEP)],
)
def test_it_is_the_algorithm(kind, options, masked):
    with enable_x64():
        reference_kind, optimizer = problem.OPTIMIZERS[kind]
        alternating = alternate(optimizer, TASKS, key=KEY, labels=LABELS, **options)
        if "groups" in options:
            state_name = options.get("state", "slot")
        else:
            state_name = options.get("state", "per_task")
        mean = getattr(options.get("groups"), "loss", "sum") == "mean"
        reference = problem.Reference(reference_kind, state=state_name, mean=mean)

        @jax.jit
        def step(params, state, x, mask):
            mask = mask if masked else None
            plan = alternating.plan(state)
            return plan, alternating.step(task_loss, params, state, x, mask=mask)

        params = start()
        state = alternating.init(params)
        for number, x in enumerate(XS):
            mask = np.ones(TASKS, bool)
            if masked:
                mask[[number % TASKS, 1]] = False
            plan, (losses, params, state) = step(params, state, x, mask)
            before = reference.theta
            reference.step(plan, x, mask)
            assert (before != reference.theta).any()
            np.testing.assert_allclose(params["theta"], reference.theta, rtol=1e-10)
            np.testing.assert_allclose(params["phi"], reference.phi, rtol=1e-10)
        assert np.isfinite(losses).all()
        assert int(state.batch) == len(XS)


def summed(params, x):
    tasks = range(len(params["phi"]))
    rows = [{**params, "phi": params["phi"][t]} for t in tasks]
    return sum(task_loss(row, t, x) for t, row in zip(tasks, rows, strict=True))


def baseline(optimizer, params, batches, loss=summed):
    """One optimiser on everything, one joint step a batch."""

    @jax.jit
    def step(params, state, x):
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for x in batches:
        params, state = step(params, state, x)
    return params


@pytest.mark.parametrize("group_loss", ["sum", "mean"])
def test_one_group_is_the_joint_step(group_loss):
    optimizer = optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(0.02))
    one = alternate(optimizer, TASKS, groups=Groups(1, loss=group_loss), labels=LABELS)
    factor = 1 / TASKS if group_loss == "mean" else 1
    expected = baseline(
        optimizer, start(), XS, lambda params, x: factor * summed(params, x)
    )
    params, state, _ = problem.run(one, start(), XS)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    assert one.cost == (1, 1, 1)
    assert state.counts.tolist() == [len(XS)] * TASKS


def test_clip_norm_is_that_of_trunk_and_heads_together():
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(LR, momentum=0.9))
    expected = baseline(clipped, start(), XS)
    one = alternate(
        optax.sgd(LR, momentum=0.9),
        TASKS,
        groups=1,
        labels=LABELS,
        options=StepOptions(clip_norm=0.5),
    )
    params, _, _ = problem.run(one, start(), XS)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(LR, weight_decay=0.1),
        optax.chain(
            optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.sgd(LR)
        ),
        optax.inject_hyperparams(optax.lion)(optax.linear_schedule(LR, 0.0, 5)),
    ],
    ids=["adamw", "factored", "injected"],
)
def test_one_task_is_the_optimizer(optimizer):
    params = start(1)
    expected = baseline(optimizer, params, XS)
    options = {"order": "fixed", "labels": LABELS}
    for schedule in ("same_batch", "per_batch"):
        one = alternate(optimizer, 1, schedule=schedule, **options)
        got, _, _ = problem.run(one, params, XS)
        chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_per_task_states_in_one_group_are_adatask():
    one = alternate(optax.adam(LR), TASKS, groups=1, state="per_task", labels=LABELS)
    params, state, losses = problem.run(one, start(), XS)
    labels = {"theta": "shared", "phi": "own"}
    both = optax.partition(
        {"shared": adatask(optax.adam(LR), TASKS), "own": optax.adam(LR)}, labels
    )

    def task_losses(params, x):
        rows = [{**params, "phi": params["phi"][t]} for t in range(TASKS)]
        return jnp.stack([task_loss(row, t, x) for t, row in enumerate(rows)])

    grad_fn = mtljax.value_and_task_grads(task_losses, labels=labels)

    @jax.jit
    def step(params, state, x):
        losses, grads = grad_fn(params, x)
        updates, state = both.update(grads, state, params)
        return losses, optax.apply_updates(params, updates), state

    expected, opt = start(), both.init(start())
    for x, seen in zip(XS, losses, strict=True):
        want, expected, opt = step(expected, opt, x)
        np.testing.assert_allclose(seen, want, rtol=1e-4)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)
    inner = opt.inner_states["shared"].inner_state.tasks
    chex.assert_trees_all_close(inner, state.shared, rtol=1e-4)


def test_as_many_groups_as_tasks_is_the_alternation():
    """The groups of one task are the tasks, whatever the default says of states."""
    options = {"labels": LABELS, "order": "fixed"}
    alone = alternate(optax.adam(LR), TASKS, **options)
    grouped = alternate(optax.adam(LR), TASKS, groups=TASKS, state="slot", **options)
    chex.assert_trees_all_equal(
        problem.run(alone, start(), XS), problem.run(grouped, start(), XS)
    )
    assert alone.cost == grouped.cost == (TASKS, TASKS, TASKS)


def random_quadratics(tasks):
    rng = np.random.default_rng(2)
    roots = rng.normal(size=(tasks, 4, 4))
    return roots @ roots.transpose(0, 2, 1) / 4, rng.normal(size=(tasks, 4))


def test_the_second_order_term_of_alternation():
    """Over all orders: -η Σ g + η²/2 ∇ Σ_{s<t} <g_s, g_t>, up to η³."""
    tasks = 3
    hessians, centres = random_quadratics(tasks)
    orders = jnp.array(list(itertools.permutations(range(tasks))))
    rates = np.array([1e-2, 1e-3, 1e-4])
    theta = np.array([1.0, -0.5, 0.3, 2.0])
    with enable_x64():

        def loss(theta, place, order):
            d = theta - jnp.asarray(centres)[order[place]]
            return d @ jnp.asarray(hessians)[order[place]] @ d / 2

        def displacement(rate, order):
            steps = alternate(optax.sgd(rate), tasks, order="fixed")
            where = jnp.asarray(theta)
            _, new, _ = steps.step(loss, where, steps.init(where), order)
            return new - where

        moved = jax.jit(jax.vmap(jax.vmap(displacement, (None, 0)), (0, None)))(
            rates, orders
        )
    mean = np.asarray(moved, np.float64).mean(1)
    grads = np.einsum("tij,tj->ti", hessians, theta - centres)
    agreement = sum(
        hessians[s] @ grads[t] + hessians[t] @ grads[s]
        for s, t in itertools.combinations(range(tasks), 2)
    )
    first = -rates[:, None] * grads.sum(0)
    second = rates[:, None] ** 2 / 2 * agreement
    residual = np.abs(mean - first - second).max(1)
    np.testing.assert_allclose(residual[:-1] / residual[1:], 1e3, rtol=0.1)
    # Without the term the residual is of second order.
    coarse = np.abs(mean - first).max(1)
    np.testing.assert_allclose(coarse[:-1] / coarse[1:], 1e2, rtol=0.1)


def scaled_runs(state):
    """Parameters after a run with one task's loss times 1e-3, 1 and 1e3."""
    opt = optax.adam(LR, eps=0.0)
    steps = alternate(opt, TASKS, order="fixed", state=state, labels=LABELS)

    def loss(params, task, batch):
        x, factor = batch
        return jnp.where(task == 2, factor, 1.0) * task_loss(params, task, x)

    @jax.jit
    @jax.vmap
    def train(factor):
        def one(carry, x):
            params, state = carry
            _, params, state = steps.step(loss, params, state, (x, factor))
            return (params, state), None

        first = (start(), steps.init(start()))
        return jax.lax.scan(one, first, jnp.asarray(XS))[0][0]

    return jax.tree.map(np.asarray, train(jnp.array([1e-3, 1.0, 1e3])))


def test_per_task_adam_does_not_see_the_scale_of_a_loss():
    with enable_x64():
        theta = scaled_runs("per_task")["theta"]
        np.testing.assert_allclose(theta, np.stack([theta[1]] * 3), rtol=1e-10)
        theta = scaled_runs("shared")["theta"]
        assert np.abs(theta - theta[1])[[0, 2]].max(1).min() > 0.01


def test_opposed_tasks_of_unequal_strength():
    """One state follows the strong one; two states let neither win."""

    def loss(w, task, batch):
        return w * jnp.array([1.0, -100.0])[task]

    moved = {}
    for state in ("per_task", "shared"):
        steps = alternate(optax.adam(1e-3), 2, order="random", key=KEY, state=state)
        opt = steps.init(jnp.zeros(()))

        def one(carry, _, steps=steps):
            w, opt = carry
            _, w, opt = steps.step(loss, w, opt, None)
            return (w, opt), None

        run = jax.jit(lambda c, one=one: jax.lax.scan(one, c, length=200)[0][0])
        moved[state] = float(run((jnp.zeros(()), opt)))
    assert abs(moved["per_task"]) < 1e-4
    assert 0.26 < moved["shared"] < 0.3  # of 0.4 that 400 steps of 1e-3 can go


def test_seeds_are_a_vmap_axis():
    def train(key):
        steps = alternate(optax.sgd(LR), TASKS, key=key, labels=LABELS)
        state = steps.init(start())
        orders = []
        params = start()
        for x in XS[:2]:
            _, params, state = steps.step(task_loss, params, state, x)
            orders.append(state.order)
        return params, jnp.stack(orders)

    params, orders = jax.jit(jax.vmap(train))(jax.random.split(KEY, 3))
    assert len(np.unique(np.asarray(params["theta"])[:, 0])) == 3
    assert (np.sort(orders, -1) == np.arange(TASKS)).all()


def test_one_program_serves_all_batches_and_partitions():
    traces = []

    def loss(params, task, x):
        traces.append(None)
        return task_loss(params, task, x)

    steps = alternate(optax.sgd(LR), TASKS, groups=2, key=KEY, labels=LABELS)
    run = jax.jit(lambda p, s, x: (steps.plan(s), steps.step(loss, p, s, x)))
    params, state, plans = start(), steps.init(start()), set()
    for x in XS:
        plan, (_, params, state) = run(params, state, x)
        plans.add(np.asarray(plan.members).tobytes())
        if len(plans) == 1:
            first = len(traces)
    assert len(plans) > 3
    assert len(traces) == first
