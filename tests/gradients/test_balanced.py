"""The balanced gradient is the balancer on stacked gradients, however computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients.problem import LABELS, batch, close, own_gradient, params, task_losses
from registry import CASES

import mtljax

STRATEGIES = ["unrolled", "vmap", "map", "chunked"]
PARAMS = params()
BATCHES = [batch(seed) for seed in range(3)]
ALL, SOME = np.ones(3, bool), np.array([True, False, True])


@functools.cache
def stepper(case, strategy, engine="auto", heads="own"):
    """The function under test."""
    balancer = case.build(3)
    function = mtljax.value_and_balanced_grad(
        task_losses,
        balancer,
        labels=LABELS,
        strategy=strategy,
        chunk_size=2,
        engine=engine,
        heads=heads,
    )
    return balancer, jax.jit(function)


@functools.cache
def chained(case):
    """The definition: stack, then update. Own leaves are not its business."""
    balancer = case.build(3)
    rows = jax.jit(jax.jacrev(lambda p, b: task_losses(p, b)))
    update = jax.jit(balancer.update)

    def step(params, state, batch, mask):
        shared = mtljax.shared_params(rows(params, batch), LABELS)
        losses = task_losses(params, batch)
        return losses, *update(shared, state, losses=losses, mask=mask)

    return balancer, step


def compare(case, strategy, masks, **options):
    balancer, function = stepper(case, strategy, **options)
    _, reference = chained(case)
    state = expected_state = balancer.init(PARAMS)
    for data, mask in zip(BATCHES, masks, strict=True):
        mask = jnp.asarray(mask)  # noqa: PLW2901
        losses, grad, state = function(PARAMS, state, data, mask=mask)
        expected = reference(PARAMS, expected_state, data, mask)
        expected_losses, shared, expected_state = expected
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
        # Rounding of the rows, amplified by the solver of the method.
        close(grad["trunk"], shared["trunk"], 2e-5)
        close(grad["heads"], own_gradient(PARAMS, data, np.asarray(mask)))
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


def ignored(state):
    """The certificate of a solve is made of rounding errors."""
    return {"solver": mtljax.solvers.unsolved()} if hasattr(state, "solver") else {}


@pytest.mark.parametrize(
    ("case", "strategy"),
    [(case, STRATEGIES[i % 4]) for i, case in enumerate(CASES)],
    ids=lambda v: getattr(v, "id", v),
)
def test_equals_the_chained_form(case, strategy):
    compare(case, strategy, [ALL, SOME, ALL])


PCGRAD = next(c for c in CASES if c.name == "pcgrad")
FAMO = next(c for c in CASES if c.name == "famo")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(strategy):
    compare(PCGRAD, strategy, [ALL, SOME, ALL])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.build(3).needs == "losses"], ids=lambda c: c.id
)
def test_stacking_is_not_needed_but_allowed(case):
    compare(case, "vmap", [ALL, SOME, ALL], engine="stacked")


@pytest.mark.parametrize("case", [PCGRAD, FAMO], ids=lambda c: c.id)
@pytest.mark.parametrize("engine", ["auto", "stacked"])
def test_no_mask_is_a_full_mask(case, engine):
    balancer, function = stepper(case, "unrolled", engine)
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
    balancer, function = stepper(case, "unrolled", heads="weighted")
    for mask in (ALL, SOME):
        _, grad, state = function(
            PARAMS, balancer.init(PARAMS), BATCHES[0], mask=jnp.asarray(mask)
        )
        weights = np.asarray(state.task_weights)
        assert np.abs(weights - weights.mean()).max() > 1e-3
        close(grad["heads"], own_gradient(PARAMS, BATCHES[0], weights))


def test_without_labels_everything_is_shared():
    balancer = mtljax.linear(3, weights=[1.0, 2.0, 0.5])
    function = mtljax.value_and_balanced_grad(task_losses, balancer)

    def total(p):
        return task_losses(p, BATCHES[0]) @ jnp.array([1.0, 2.0, 0.5])

    _, grad, _ = function(PARAMS, balancer.init(PARAMS), BATCHES[0])
    close(grad, jax.grad(total)(PARAMS))


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
    balancer = mtljax.pcgrad(3, key=jax.random.key(0))
    labels = {"trunk": "shared", "heads": "own"}
    opt = optax.partition({"shared": balancer, "own": optax.identity()}, labels)
    losses, grads = mtljax.value_and_task_grads(task_losses, labels=LABELS)(
        PARAMS, BATCHES[0]
    )
    update, _ = opt.update(grads, opt.init(PARAMS), losses=losses)
    function = mtljax.value_and_balanced_grad(task_losses, balancer, labels=LABELS)
    _, grad, _ = function(PARAMS, balancer.init(PARAMS), BATCHES[0])
    close(update, grad)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all shared", "labels"])
def test_any_transformation_of_stacked_gradients(labels):
    """An ``optax.chain`` has neither ``needs`` nor ``weigh``; it gets the rows."""
    opt = optax.chain(mtljax.mgda(3, scale="sum"), optax.clip_by_global_norm(0.1))
    function = mtljax.value_and_balanced_grad(task_losses, opt, labels=labels)
    seen = PARAMS if labels is None else mtljax.shared_params(PARAMS, labels)
    mask = jnp.asarray(SOME)
    _, grad, state = jax.jit(function)(PARAMS, opt.init(seen), BATCHES[0], mask=mask)
    shared = grad if labels is None else grad["trunk"]
    np.testing.assert_allclose(optax.global_norm(shared), 0.1, rtol=1e-5)
    np.testing.assert_allclose(state[0].task_weights.sum(), 2, rtol=1e-5)
    rows = jax.jacrev(task_losses)(PARAMS, BATCHES[0])
    rows = rows if labels is None else rows["trunk"]
    mixed = jax.tree.map(lambda r: jnp.tensordot(state[0].task_weights, r, 1), rows)
    factor = 0.1 / optax.global_norm(mixed)
    close(shared, jax.tree.map(lambda m: factor * m, mixed), 1e-4)


@pytest.mark.parametrize("case", [PCGRAD, FAMO], ids=lambda c: c.id)
def test_an_absent_task_may_have_a_nan_loss(case):
    """In both engines, if its derivative is finite; nothing can mend 0 · NaN."""
    balancer = case.build(3)

    def broken(p, batch, factor):
        losses = task_losses(p, batch)
        return jnp.stack([losses[0], factor * losses[1] + jnp.nan, losses[2]])

    function = mtljax.value_and_balanced_grad(broken, balancer, labels=LABELS)
    state = balancer.init(PARAMS)
    data, mask = BATCHES[0], jnp.asarray(SOME)
    losses, grad, new = function(PARAMS, state, data, 1.0, mask=mask)
    assert np.isnan(losses[1])
    _, whole = stepper(case, "unrolled")
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

    forward = flops(task_losses, wide, data)
    once = flops(jax.value_and_grad(lambda p, d: task_losses(p, d).sum()), wide, data)
    assert balanced(mtljax.linear(5)) < 1.1 * once
    every = forward + 5 * (once - forward)
    stacked = balanced(mtljax.pcgrad(5, key=jax.random.key(0)))
    assert 0.8 * every < stacked < 1.3 * every


@pytest.mark.usefixtures("as_users")
def test_errors():
    state = mtljax.linear(4).init(PARAMS)
    function = mtljax.value_and_balanced_grad(task_losses, mtljax.linear(4))
    with pytest.raises(ValueError, match="returns 3 losses, but linear.*num_tasks=4"):
        function(PARAMS, state, BATCHES[0])
    opt = optax.chain(mtljax.linear(3), optax.clip(1.0))
    with pytest.raises(ValueError, match="heads='weighted' needs task weights"):
        mtljax.value_and_balanced_grad(task_losses, opt, heads="weighted")
    with pytest.raises(ValueError, match="heads='none' is not one of 'own'"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3), heads="none")
    with pytest.raises(ValueError, match="engine='fast' is not one of 'auto'"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3), engine="fast")
    with pytest.raises(ValueError, match="engine='losses' cannot serve mgda.*gramian"):
        mtljax.value_and_balanced_grad(task_losses, mtljax.mgda(3), engine="losses")
    with pytest.raises(ValueError, match="cannot serve the transformation.*grads"):
        mtljax.value_and_balanced_grad(task_losses, opt, engine="losses")
    function = mtljax.value_and_balanced_grad(task_losses, mtljax.linear(3))
    with pytest.raises(ValueError, match=r"mask has shape \(2,\); it must be \(3,\)"):
        function(PARAMS, state, BATCHES[0], mask=jnp.ones(2, bool))
