"""The balanced gradient is the balancer on stacked gradients, however computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients.problem import (
    LABELS,
    batch,
    close,
    jacobian,
    own_gradient,
    params,
    task_losses,
)
from precision import enable_x64
from registry import CASES

import mtljax

STRATEGIES = ["unrolled", "vmap", "map", 2]
BY_ID = {case.id: case for case in CASES}
PARAMS = params()
BATCHES = [batch(seed) for seed in range(3)]
ALL, SOME = jnp.ones(3, bool), jnp.array([True, False, True])


@functools.cache
def stepper(case_id, strategy, engine="auto", heads="own"):
    """The function under test."""
    balancer = BY_ID[case_id].build(3)
    function = mtljax.value_and_balanced_grad(
        task_losses,
        balancer,
        labels=LABELS,
        strategy=strategy,
        engine=engine,
        heads=heads,
    )
    return balancer, jax.jit(function)


forward = jax.jit(task_losses)


@functools.cache
def chained(case_id):
    """The definition: stack, then update."""
    return jax.jit(BY_ID[case_id].build(3).update)


def compare(case, strategy, dtype=jnp.float32, tolerance=2e-5, **options):
    """Three steps, the second without one of the tasks, and the state after each."""
    balancer, function = stepper(case.id, strategy, **options)
    parameters, batches = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCHES))
    shared_only = mtljax.shared_params(parameters, LABELS)
    state = expected_state = balancer.init(shared_only)
    for i, mask in enumerate([ALL, SOME, ALL]):
        losses, grad, state = function(parameters, state, batches[i], mask=mask)
        rows = mtljax.shared_params(jacobian(parameters, batches[i]), LABELS)
        expected_losses = forward(parameters, batches[i])
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        shared, expected_state = chained(case.id)(
            rows, expected_state, losses=expected_losses, mask=mask
        )
        # Rounding of the rows, amplified by the solver of the method.
        close(grad["trunk"], shared["trunk"], tolerance)
        close(grad["heads"], own_gradient(parameters, batches[i], mask))
        assert jax.tree.structure(state) == jax.tree.structure(expected_state)
        for got, want in zip(
            jax.tree.leaves(state._replace(**ignored(state))),
            jax.tree.leaves(expected_state._replace(**ignored(state))),
            strict=True,
        ):
            if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
                assert (got == want).all()
            else:
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.deep
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_method_and_strategy_to_1e_6_in_float64(case, strategy):
    with enable_x64(True):
        compare(case, strategy, dtype=jnp.float64, tolerance=1e-6)


def ignored(state):
    """The certificate of a solve is made of rounding errors."""
    return {"solver": mtljax.solvers.unsolved()} if hasattr(state, "solver") else {}


# Every case runs with every strategy in deep, see below; here a sample of each kind.
SAMPLE = ("linear", "uncertainty", "famo", "mgda", "pcgrad", "cagrad", "nash_mtl")
SAMPLE += ("excess_mtl", "upgrad", "graddrop")


@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        (case, STRATEGIES[i % 4])
        for i, case in enumerate(CASES)
        if case.name in SAMPLE and not case.options
    ],
    ids=lambda v: getattr(v, "id", v),
)
def test_equals_the_chained_form(case, strategy):
    compare(case, strategy)


PCGRAD = next(c for c in CASES if c.name == "pcgrad")
FAMO = next(c for c in CASES if c.name == "famo")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(strategy):
    compare(PCGRAD, strategy)


@pytest.mark.parametrize("name", ["linear", "uncertainty", "famo"])
def test_stacking_is_not_needed_but_allowed(name):
    case = next(c for c in CASES if c.name == name)
    assert case.build(3).needs == "losses"
    compare(case, "vmap", engine="stacked")


@pytest.mark.parametrize(
    ("case", "engine"),
    [(PCGRAD, "auto"), (FAMO, "auto"), (FAMO, "stacked")],
    ids=lambda v: getattr(v, "id", v),
)
def test_no_mask_is_a_full_mask(case, engine):
    balancer, function = stepper(case.id, "unrolled", engine)
    state = balancer.init(PARAMS)
    for data in BATCHES:
        _, grad, after = function(PARAMS, state, data)
        _, expected, expected_after = function(PARAMS, state, data, mask=ALL)
        close(grad, expected)
        state = after
        weights = after.task_weights, expected_after.task_weights
        np.testing.assert_allclose(*weights, rtol=1e-5)


@pytest.mark.parametrize("case", [PCGRAD, FAMO], ids=lambda c: c.id)
def test_weighted_heads(case):
    balancer, function = stepper(case.id, "unrolled", heads="weighted")
    for mask in (ALL, SOME):
        _, grad, state = function(PARAMS, balancer.init(PARAMS), BATCHES[0], mask=mask)
        weights = state.task_weights
        assert np.ptp(weights) > 1e-3
        close(grad["heads"], own_gradient(PARAMS, BATCHES[0], weights))


def test_without_labels_everything_is_shared():
    balancer = mtljax.linear(3, weights=[1.0, 2.0, 0.5])
    function = mtljax.value_and_balanced_grad(task_losses, balancer)

    def total(p):
        return task_losses(p, BATCHES[0]) @ jnp.array([1.0, 2.0, 0.5])

    _, grad, _ = jax.jit(function)(PARAMS, balancer.init(PARAMS), BATCHES[0])
    close(grad, jax.jit(jax.grad(total))(PARAMS))


def test_has_aux_and_keywords():
    def with_aux(p, batch, *, factor):
        return factor * task_losses(p, batch), "a string is an aux too"

    balancer = mtljax.linear(3)
    function = mtljax.value_and_balanced_grad(with_aux, balancer, has_aux=True)
    (losses, aux), grad, _ = function(
        PARAMS, balancer.init(PARAMS), BATCHES[0], factor=3.0
    )
    assert aux == "a string is an aux too"
    np.testing.assert_allclose(losses, 3 * task_losses(PARAMS, BATCHES[0]), rtol=1e-6)
    expected = jax.grad(lambda p: 3 * task_losses(p, BATCHES[0]).sum())(PARAMS)
    close(grad, expected)


def test_partition_of_optax_gives_the_same():
    """The other spelling of shared and own, on stacked and plain leaves."""
    balancer, function = stepper(FAMO.id, "unrolled")
    opt = optax.partition({"shared": balancer, "own": optax.identity()}, LABELS)
    stacked = mtljax.value_and_task_grads(task_losses, labels=LABELS)

    @jax.jit
    def update(params, state, batch):
        losses, grads = stacked(params, batch)
        return opt.update(grads, state, losses=losses)

    state, expected_state = opt.init(PARAMS), balancer.init(PARAMS)
    for data in BATCHES:
        got, state = update(PARAMS, state, data)
        _, expected, expected_state = function(PARAMS, expected_state, data)
        close(got, expected)
        found = optax.tree_utils.tree_get(state, "task_weights")
        np.testing.assert_allclose(found, expected_state.task_weights, rtol=1e-5)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all shared", "labels"])
def test_any_transformation_of_stacked_gradients(labels):
    """An ``optax.chain`` has neither ``needs`` nor ``weigh``; it gets the rows."""
    opt = optax.chain(mtljax.imtl_g(3, scale="sum"), optax.clip_by_global_norm(0.1))
    function = mtljax.value_and_balanced_grad(task_losses, opt, labels=labels)
    seen = PARAMS if labels is None else mtljax.shared_params(PARAMS, labels)
    _, grad, state = jax.jit(function)(PARAMS, opt.init(seen), BATCHES[0], mask=SOME)
    shared = grad if labels is None else grad["trunk"]
    np.testing.assert_allclose(optax.tree.norm(shared), 0.1, rtol=1e-5)
    np.testing.assert_allclose(state[0].task_weights.sum(), 2, rtol=1e-5)
    rows = jacobian(PARAMS, BATCHES[0])
    rows = rows if labels is None else rows["trunk"]
    mixed = jax.tree.map(lambda r: jnp.tensordot(state[0].task_weights, r, 1), rows)
    factor = 0.1 / optax.tree.norm(mixed)
    close(shared, jax.tree.map(lambda m: factor * m, mixed), 1e-4)


@pytest.mark.parametrize("case", [PCGRAD, FAMO], ids=lambda c: c.id)
def test_an_absent_task_may_have_a_nan_loss(case):
    """In both engines, if its derivative is finite; nothing can mend 0 · NaN."""
    balancer = case.build(3)

    def broken(p, batch, factor):
        losses = task_losses(p, batch)
        return jnp.stack([losses[0], factor * losses[1] + jnp.nan, losses[2]])

    function = mtljax.value_and_balanced_grad(broken, balancer, labels=LABELS)
    function = jax.jit(function)
    state = balancer.init(PARAMS)
    data, mask = BATCHES[0], SOME
    losses, grad, new = function(PARAMS, state, data, 1.0, mask=mask)
    assert np.isnan(losses[1])
    _, whole = stepper(case.id, "unrolled")
    _, expected, expected_new = whole(PARAMS, state, data, mask=mask)
    close(grad, expected)
    np.testing.assert_allclose(
        new.task_weights, expected_new.task_weights, rtol=1e-5, atol=1e-6
    )
    _, poisoned, _ = function(PARAMS, state, data, jnp.nan, mask=mask)
    assert np.isnan(poisoned["trunk"]["bias"]).any()


def test_cost_in_floating_point_operations():
    """Counted in the compiled program, where unused halves of passes are gone."""
    wide = {
        "trunk": {"kernel": jnp.ones((128, 128)), "bias": jnp.ones(128)},
        "heads": [{"kernel": jnp.ones(128)} for _ in range(5)],
    }
    data = jnp.ones((64, 128)), jnp.ones((5, 64))

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    def balanced(balancer):
        function = mtljax.value_and_balanced_grad(
            task_losses, balancer, labels=LABELS, strategy="unrolled"
        )
        return flops(function, wide, balancer.init(wide), data)

    ahead = flops(task_losses, wide, data)
    once = flops(jax.value_and_grad(lambda p, d: task_losses(p, d).sum()), wide, data)
    assert balanced(mtljax.linear(5)) < 1.1 * once
    every = ahead + 5 * (once - ahead)
    stacked = balanced(mtljax.pcgrad(5, key=jax.random.key(0)))
    assert 0.8 * every < stacked < 1.3 * every


@pytest.mark.usefixtures("as_users")
def test_errors():
    state = mtljax.linear(4).init(PARAMS)
    function = mtljax.value_and_balanced_grad(task_losses, mtljax.linear(4))
    with pytest.raises(ValueError, match=r"returns 3 losses, but linear.*num_tasks=4"):
        function(PARAMS, state, BATCHES[0])
    opt = optax.chain(mtljax.linear(3), optax.clip(1.0))
    with pytest.raises(ValueError, match="heads='weighted' needs task weights"):
        mtljax.value_and_balanced_grad(task_losses, opt, heads="weighted")
    with pytest.raises(ValueError, match="heads='none' is not one of 'own'"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3), heads="none")
    with pytest.raises(ValueError, match="engine='fast' is not one of 'auto'"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3), engine="fast")
    with pytest.raises(
        ValueError, match=r"engine='losses' does not support mgda.*gramian"
    ):
        mtljax.value_and_balanced_grad(task_losses, mtljax.mgda(3), engine="losses")
    with pytest.raises(ValueError, match=r"does not support the transformation.*grads"):
        mtljax.value_and_balanced_grad(task_losses, opt, engine="losses")
    function = mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3))
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); it must be \(3,\)"):
        function(PARAMS, state, BATCHES[0], mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="Call the method first"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.linear)
    adam = optax.adam(1e-3)  # keeps the task axis
    function = mtljax.value_and_balanced_grad(lambda p: jnp.stack([p.sum()] * 2), adam)
    with pytest.raises(ValueError, match=r"of shape \(2, 4\) for a parameter.*\(4,\)"):
        function(jnp.ones(4), adam.init(jnp.ones((2, 4))))
