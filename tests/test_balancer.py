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
from mtljax.balancer import from_grads, from_weights, rescale, weigh_stacked

GRADS = {"w": jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]])}
LOSSES = jnp.array([0.5, 2.0, 1.0])


def test_is_a_pair_to_optax():
    balancer = mtljax.mgda(3)
    init, update = balancer
    assert (init, update) == (balancer.init, balancer.update)
    assert len(balancer) == 2
    assert isinstance(balancer, optax.GradientTransformationExtraArgs)
    assert jax.tree.structure(balancer.init(GRADS)) == jax.tree.structure(init(GRADS))


def test_repr_is_short():
    assert repr(mtljax.mgda(3)) == "Balancer(mgda, num_tasks=3, needs='gramian')"


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
