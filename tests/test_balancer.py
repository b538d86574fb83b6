"""The abstraction itself; what the methods make of it is in test_contract.py."""

import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import enable_x64

import mtljax
from mtljax.balancer import (
    as_mask,
    commit,
    from_grads,
    from_weights,
    rescale,
    weigh_stacked,
)

GRADS = {"w": jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]])}
LOSSES = jnp.array([0.5, 2.0, 1.0])


def test_is_a_pair_to_optax():
    balancer = mtljax.mgda(3)
    init, update = balancer
    assert (init, update) == (balancer.init, balancer.update)
    assert len(balancer) == 2
    assert isinstance(balancer, optax.GradientTransformationExtraArgs)
    assert jax.tree.structure(balancer.init(GRADS)) == jax.tree.structure(init(GRADS))


def test_repr_is_the_call():
    assert repr(mtljax.cagrad(np.int64(3))) == (
        "cagrad(num_tasks=3, c=0.4, rescale='none', scale='native')"
    )
    shown = repr(mtljax.pcgrad(2, key=jax.random.key(0)))
    assert "key=key<fry>[]" in shown
    pair = mtljax.Balancer(lambda p: (), lambda g, s, p=None, **_: (g, s), num_tasks=2)
    assert repr(pair) == "Balancer(balancer, num_tasks=2, needs='grads')"


@pytest.mark.usefixtures("as_users")
def test_a_factory_checks_what_all_factories_take():
    assert mtljax.linear(jnp.int32(2)).num_tasks == 2
    for value in (0, True, np.True_, 2.0, "2", None, np.ones(2, int)):
        with pytest.raises(ValueError, match="num_tasks must be a positive integer"):
            mtljax.linear(value)
    with pytest.raises(ValueError, match=r"One task with a name is \('seg',\)"):
        mtljax.linear("seg")
    with pytest.raises(TypeError, match=r"pcgrad: .*'key'. Pass key=jax.random.key"):
        mtljax.pcgrad(2)
    with pytest.raises(ValueError, match=r"static_args=\('num_tasks',\)"):
        jax.jit(lambda n: mtljax.linear(n).init({}))(3)
    for key in (0, jax.random.split(jax.random.key(0)), jnp.zeros(2)):
        with pytest.raises(ValueError, match=r"pcgrad: key must be one key"):
            mtljax.pcgrad(2, key=key)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        mtljax.pcgrad(2, key=key)


def test_commit_applies_a_step_completely_or_not_at_all():
    old = {"sum": jnp.array([1.0, jnp.inf]), "key": jax.random.key(0), "n": jnp.ones(2)}
    new = {
        "sum": jnp.array([2.0, jnp.inf]),
        "key": jax.random.key(1),
        "n": np.full(2, 1e3),
    }
    update = {"w": jnp.ones(2), "v": jnp.ones(1, jnp.bfloat16)}
    done, state = commit(True, update, new, old)
    chex.assert_trees_all_equal(done, update)
    chex.assert_trees_all_equal_dtypes(state, old)
    np.testing.assert_array_equal(state["sum"], [2.0, jnp.inf])  # inf was there before
    broken = [
        (False, update, new),
        (True, update | {"v": jnp.full(1, jnp.inf, jnp.bfloat16)}, new),
        (True, update, new | {"sum": jnp.array([jnp.inf, jnp.inf])}),
        (True, update, new | {"sum": jnp.array([2.0, jnp.nan])}),
        (True, update, new | {"n": np.full(2, 1e300)}),  # inf in float32
    ]
    for healthy, moved, proposed in broken:
        with np.errstate(over="ignore"):
            done, state = commit(healthy, moved, proposed, old)
        assert all(np.isnan(np.asarray(x, float)).all() for x in jax.tree.leaves(done))
        chex.assert_trees_all_equal_dtypes(done, update)
        chex.assert_trees_all_equal(state, old)


def test_a_bare_pair_of_functions_is_a_balancer_of_gradients():
    balancer = mtljax.Balancer(lambda p: (), lambda g, s, p=None, **_: (g, s))
    assert (balancer.needs, balancer.weigh) == ("grads", None)
    with pytest.raises(ValueError, match="combines gradients without task weights"):
        weigh_stacked(balancer, GRADS, ())


@pytest.mark.parametrize(
    ("scale", "native", "expected"),
    [
        ("native", "free", [2.0, 6.0, 0.0]),
        ("sum", "free", [0.5, 1.5, 0.0]),
        ("mean", "free", [0.25, 0.75, 0.0]),
        ("sum", "sum", [2.0, 6.0, 0.0]),
        ("mean", "sum", [1.0, 3.0, 0.0]),
        ("sum", "mean", [4.0, 12.0, 0.0]),
        ("mean", "mean", [2.0, 6.0, 0.0]),
    ],
)
def test_rescale_with_two_of_three_tasks(scale, native, expected):
    weights = jnp.array([2.0, 6.0, 0.0])
    mask = jnp.array([True, True, False])
    np.testing.assert_allclose(rescale(weights, mask, scale, native), expected)


def test_rescale_survives_weights_that_cancel():
    weights = rescale(jnp.array([1.0, -1.0]), jnp.ones(2, bool), "mean", "free")
    assert np.isfinite(weights).all()


class Counting(typing.NamedTuple):
    seen: jax.Array
    task_weights: jax.Array


def counting(weights=(1.0, 2.0, 3.0), **options):
    """A rule that counts what it is given, for the promises of the builder."""

    def init():
        return Counting(jnp.zeros(3), jnp.zeros(3))

    def weigh(state, *, losses, gramian, mask):
        del gramian
        seen = jnp.where(mask, state.seen + losses, state.seen)
        return jnp.asarray(weights), state._replace(seen=seen)

    options = {"needs": "losses", "native": "free", "reads_losses": True} | options
    return from_weights("counting", 3, init=init, weigh=weigh, **options)


def test_builder_masks_weights_whatever_the_rule_says():
    balancer = counting()
    mask = jnp.array([True, False, True])
    losses = LOSSES.at[1].set(jnp.nan)
    state = balancer.init(GRADS)
    update, state = balancer.update(GRADS, state, losses=losses, mask=mask)
    np.testing.assert_allclose(update["w"], [1.0, 17.0])
    np.testing.assert_allclose(state.task_weights, [1, 0, 3])
    np.testing.assert_allclose(state.seen, [0.5, 0, 1])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_builder_spares_the_state_of_a_bad_loss(bad):
    balancer = counting()
    state = balancer.init(GRADS)
    losses = LOSSES.at[1].set(bad)
    update, after = balancer.update(GRADS, state, losses=losses)
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(after, state)


def test_builder_keeps_the_dtypes_of_the_state():
    balancer = counting(weights=np.ones(3))
    state = balancer.init(GRADS)
    with enable_x64(True):
        losses = jnp.asarray(np.asarray(LOSSES), jnp.float64)
        grads = {"w": jnp.asarray(np.asarray(GRADS["w"]), jnp.float64)}
        update, after = balancer.update(grads, state, losses=losses)
        assert update["w"].dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


class Empty(typing.NamedTuple):
    task_weights: jax.Array


def preferring():
    """A rule that is told what it should answer."""

    def weigh(state, *, losses, gramian, mask, preference):
        del losses, gramian, mask
        return jnp.ones(3) if preference is None else preference, state

    return from_weights(
        "preferring",
        3,
        init=lambda: Empty(jnp.ones(3)),
        weigh=weigh,
        needs="losses",
        native="free",
        side_inputs=("preference",),
    )


def test_side_inputs_reach_the_rule_by_every_way():
    balancer = preferring()
    state = balancer.init(GRADS)
    preference = jnp.array([0.0, 2.0, 1.0])
    update, _ = balancer.update(GRADS, state, preference=preference, unknown=1)
    np.testing.assert_allclose(update["w"], [6.0, 3.0])
    update, _ = balancer.update(GRADS, state)
    np.testing.assert_allclose(update["w"], [4.0, 6.0])
    opt = optax.chain(balancer, optax.identity())
    update, _ = opt.update(GRADS, opt.init(GRADS), preference=preference)
    np.testing.assert_allclose(update["w"], [6.0, 3.0])
    for engine in ("losses", "stacked"):
        function = mtljax.value_and_balanced_grad(
            lambda p: GRADS["w"] @ p["w"], balancer, engine=engine
        )
        params = {"w": jnp.ones(2)}
        _, grad, _ = function(params, state, side={"preference": preference})
        np.testing.assert_allclose(grad["w"], [6.0, 3.0])


def largest():
    """Per coordinate, the largest entry; counts the steps."""

    def combine(state, grads, *, losses, mask):
        del losses
        update = jax.tree.map(lambda g: g.max(0), grads)
        return update, Counting(state.seen + mask, state.task_weights)

    def init(params):
        del params
        return Counting(jnp.zeros(3), jnp.ones(3))

    return from_grads("largest", 3, init=init, combine=combine)


def test_a_rule_on_the_gradients_keeps_the_same_policies():
    balancer = largest()
    assert (balancer.needs, balancer.weigh) == ("grads", None)
    state = balancer.init(GRADS)
    update, after = balancer.update(GRADS, state)
    np.testing.assert_array_equal(update["w"], [3.0, 5.0])
    np.testing.assert_array_equal(after.seen, [1, 1, 1])
    bad = {"w": GRADS["w"].at[1].set(jnp.nan)}
    update, after = balancer.update(bad, state)
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(after, state)
    mask = jnp.array([True, False, True])
    update, after = balancer.update(bad, state, mask=mask)
    np.testing.assert_array_equal(update["w"], [1.0, 5.0])
    np.testing.assert_array_equal(after.seen, [1, 0, 1])
    update, after = balancer.update(GRADS, state, mask=jnp.zeros(3, bool))
    np.testing.assert_array_equal(update["w"], [0.0, 0.0])
    chex.assert_trees_all_equal(after, state)


@pytest.mark.usefixtures("as_users")
def test_weigh_checks_the_gramian():
    balancer = mtljax.mgda(3)
    state = balancer.init(GRADS)
    for gramian in (None, jnp.eye(2)):
        with pytest.raises(ValueError, match=r"reads the Gramian.*\(3, 3\), not"):
            balancer.weigh(state, losses=None, gramian=gramian, mask=None)


def test_weigh_agrees_with_update():
    balancer = mtljax.imtl_g(3)
    gramian = GRADS["w"] @ GRADS["w"].T
    weights, _ = balancer.weigh(balancer.init({}), gramian=gramian)
    update, state = balancer.update(GRADS, balancer.init({}))
    np.testing.assert_allclose(weights, state.task_weights, rtol=1e-5)
    np.testing.assert_allclose(weights @ GRADS["w"], update["w"], rtol=1e-5)


AFTER = jnp.array([0.4, 1.9, 1.05])


def chains(balancer):
    sgd = optax.sgd(0.1)
    labels = {"w": "shared", "v": "own"}
    partition = optax.partition({"shared": balancer, "own": optax.identity()}, labels)
    return [
        balancer,
        optax.chain(balancer, sgd),
        optax.chain(optax.chain(optax.identity(), balancer), sgd),
        optax.chain(partition, sgd),
    ]


@pytest.mark.parametrize("depth", range(4))
def test_observe_finds_the_state_in_a_chain(depth):
    balancer = mtljax.famo(3)
    opt = chains(balancer)[depth]
    params = {"w": jnp.zeros(2), "v": jnp.zeros(1)}
    grads = GRADS | ({"v": jnp.zeros(1)} if depth == 3 else {"v": jnp.zeros((3, 1))})
    state = opt.init(params)
    _, state = opt.update(grads, state, params, losses=LOSSES)
    after = mtljax.observe(balancer, state, losses=AFTER)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    learned = optax.tree_utils.tree_get(after, "learned").value
    np.testing.assert_allclose(learned, [-0.025, 0.025, 0.025], atol=1e-6)


def test_observe_leaves_other_methods_alone():
    balancer = mtljax.linear(3)
    state = balancer.init(GRADS)
    assert mtljax.observe(balancer, state, losses=AFTER) is state


def test_observe_says_when_the_state_is_not_there():
    state = optax.sgd(0.1).init(GRADS)
    with pytest.raises(ValueError, match=r"no FAMOState in the given state.*famo"):
        mtljax.observe(mtljax.famo(3), state, losses=AFTER)


@pytest.mark.usefixtures("as_users")
def test_a_mask_is_boolean_or_integer():
    for mask in ([True, False, True], np.array([1, 0, 1]), jnp.array([1, 0, 1])):
        assert as_mask("mine", 3, mask).tolist() == [True, False, True]
    for mask in (jnp.ones(3), np.array([0.5, 1, 1]), jnp.ones(3, jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"mine: mask has dtype .*float"):
            as_mask("mine", 3, mask)
        with pytest.raises(ValueError, match=r"mine: mask has dtype .*float"):
            jax.eval_shape(lambda m: as_mask("mine", 3, m), mask)


@pytest.mark.parametrize("domain", ["positive", "above"])
def test_a_loss_outside_of_the_domain_is_a_step_that_is_not_applied(domain):
    positive = {"positive_losses": True}
    above = {"domain": lambda losses: losses > 0.25}
    balancer = counting(**(positive if domain == "positive" else above))
    state = balancer.init(GRADS)
    outside = 0.0 if domain == "positive" else 0.25
    for update in (balancer.update, jax.jit(balancer.update)):
        found, after = update(GRADS, state, losses=LOSSES.at[1].set(outside))
        assert np.isnan(found["w"]).all()
        chex.assert_trees_all_equal(after, state)
        mask = jnp.array([True, False, True])
        found, _ = update(GRADS, state, losses=LOSSES.at[1].set(outside), mask=mask)
        assert np.isfinite(found["w"]).all()


def test_a_finite_gradient_whose_gramian_overflows_is_not_applied():
    balancer = mtljax.mgda(3)
    state = balancer.init(GRADS)
    grads = {"w": GRADS["w"].at[0].multiply(1e20)}
    update, after = balancer.update(grads, state)
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(after, state)


@pytest.mark.usefixtures("as_users")
def test_unstacked_gradients_are_found_by_the_parameters():
    params = {"w": jnp.zeros(3)}
    for balancer in (mtljax.linear(3), mtljax.mgda(3), mtljax.krum(3), largest()):
        state = balancer.init(params)
        with pytest.raises(
            ValueError, match=r"its parameter has shape \(3,\); stacked"
        ):
            balancer.update(params, state, params)


def test_arguments_that_are_no_arrays_do_not_prevent_an_eager_call():
    balancer = mtljax.linear(3)
    state = balancer.init(GRADS)
    update, _ = balancer.update(GRADS, state, losses=[0.5, 2.0, 1.0], tag="a")
    np.testing.assert_allclose(update["w"], GRADS["w"].sum(0))
