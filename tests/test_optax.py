"""Balancers inside the wrappers of optax, against calculations by hand.

The gradients (1, 0) and (-1, 1) conflict, and PCGrad returns (1/2, 3/2) for them. With
the losses 1 and 2, scale_invariant returns (1, 0) + (-1, 1) / 2 = (1/2, 1/2).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import mtljax

pytestmark = pytest.mark.usefixtures("as_users")

T = 2
PARAMS = {"w": jnp.array([3.0, 4.0])}
GRADS = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
BROKEN = {"w": jnp.full((2, 2), jnp.nan)}
LOSSES = jnp.array([1.0, 2.0])
PCGRAD = mtljax.pcgrad(T, key=jax.random.key(0), order="fixed")
SCALED = mtljax.scale_invariant(T)
STEP = np.array([-0.5, -1.5])  # of PCGrad and SGD with rate 1
SCALED_STEP = np.array([-0.5, -0.5])
ZERO = np.zeros(2)
SGD = optax.sgd(1.0)

# With a second parameter, whose gradient is that of a single task.
MORE = {"h": jnp.array([1.0, 1.0]), **PARAMS}
OWN = {"h": jnp.array([2.0, 3.0]), **GRADS}
STACKED = {"h": jnp.array([[2.0, 3.0], [1.0, 1.0]]), **GRADS}
ONLY_W = {"h": False, "w": True}


def check(optimizer, expected, grads=(GRADS, GRADS), params=PARAMS, **kwargs):
    """Compares the update of each step with the expected one, and applies it."""
    state = optimizer.init(params)

    @jax.jit
    def update(grads, state, params, kwargs):
        return optimizer.update(grads, state, params, **kwargs)

    for grad, wanted in zip(grads, expected, strict=True):
        found, state = update(grad, state, params, kwargs)
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted
        )
        params = optax.apply_updates(params, found)


def of_w(*steps):
    return [{"w": step} for step in steps]


def accumulate(**options):
    return optax.MultiSteps(SGD, 2, **options).gradient_transformation()


@pytest.mark.parametrize(
    ("optimizer", "grads", "expected"),
    [
        (accumulate(), (GRADS, GRADS, GRADS), of_w(ZERO, STEP, ZERO)),
        (
            accumulate(should_skip_update_fn=optax.skip_not_finite),
            (GRADS, BROKEN, GRADS),
            of_w(ZERO, ZERO, STEP),
        ),
        (
            optax.apply_if_finite(SGD, 2),
            (GRADS, BROKEN, GRADS),
            of_w(STEP, ZERO, STEP),
        ),
        (optax.flatten(SGD), (GRADS,), of_w(STEP)),
        (
            optax.clip_by_global_norm(1.0),
            (GRADS,),
            of_w(-STEP / np.linalg.norm(STEP)),
        ),
        # z moves by the step, and x is the mean of all z: y = 0.9 x + 0.1 z moves by
        # the step, and then by 0.9 / 2 + 0.1 of it.
        (
            optax.contrib.schedule_free(SGD, 1.0),
            (GRADS, GRADS),
            of_w(STEP, 0.55 * STEP),
        ),
    ],
    ids=["multi_steps", "skip", "finite", "flatten", "clip", "schedule_free"],
)
def test_the_rest_of_a_chain_may_be_wrapped(optimizer, grads, expected):
    check(optax.chain(PCGRAD, optimizer), expected, grads)


def test_the_other_wrappers_pass_stacked_gradients_and_losses():
    chain = optax.chain(SCALED, SGD)
    assert optax.with_extra_args_support(PCGRAD) is PCGRAD
    check(
        optax.contrib.schedule_free(chain, 1.0),
        of_w(SCALED_STEP, 0.55 * SCALED_STEP),
        losses=LOSSES,
    )
    check(
        optax.named_chain(("balancer", SCALED), ("sgd", SGD)),
        of_w(SCALED_STEP),
        (GRADS,),
        losses=LOSSES,
    )
    # The global norm of the stacked gradients is √3.
    before = optax.chain(optax.clip_by_global_norm(1.0), PCGRAD, SGD)
    check(before, of_w(STEP / np.sqrt(3)), (GRADS,))
    pairs = optax.contrib.split_real_and_imaginary(optax.chain(PCGRAD, SGD))
    check(
        pairs,
        of_w(np.array([-0.5 - 1.5j])),
        ({"w": jnp.array([[1.0 + 0j], [-1.0 + 1j]])},),
        {"w": jnp.array([3.0 + 4j])},
    )


def test_lookahead_around_and_after_a_balancer():
    params = optax.LookaheadParams.init_synced(PARAMS)
    # After two fast steps the slow parameters move by half of both, to the point that
    # the fast ones had reached before the second step.
    for chain, step, kwargs in (
        (optax.lookahead(optax.chain(PCGRAD, SGD), 2, 0.5), STEP, {}),
        (
            optax.chain(SCALED, optax.lookahead(SGD, 2, 0.5)),
            SCALED_STEP,
            {"losses": LOSSES},
        ),
    ):
        expected = [
            optax.LookaheadParams({"w": step}, {"w": ZERO}),
            optax.LookaheadParams({"w": ZERO}, {"w": step}),
        ]
        check(chain, expected, params=params, **kwargs)
    alone = optax.lookahead(optax.chain(SCALED, SGD), 2, 0.5)
    with pytest.raises(ValueError, match="scale_invariant reads the task losses"):
        alone.update(GRADS, alone.init(params), params)


@pytest.mark.parametrize("balancer", [PCGRAD, SCALED], ids=["pcgrad", "scaled"])
def test_a_balancer_of_a_part(balancer):
    step = STEP if balancer is PCGRAD else SCALED_STEP
    chain = optax.chain(balancer, SGD)
    expected = [{"h": np.array([-2.0, -3.0]), "w": step}]
    masks = [ONLY_W, lambda _: ONLY_W]
    labels = {"h": "own", "w": "shared"}
    for optimizer in (
        *(optax.chain(optax.masked(balancer, mask), SGD) for mask in masks),
        optax.partition({"shared": chain, "own": SGD}, labels),
        optax.multi_transform({"shared": chain, "own": SGD}, labels),
    ):
        check(optimizer, expected, (OWN,), MORE, losses=LOSSES)


def test_two_balancers_of_two_parts():
    optimizer = optax.partition(
        {"a": optax.chain(PCGRAD, SGD), "b": optax.chain(mtljax.linear(T), SGD)},
        {"h": "b", "w": "a"},
    )
    expected = [{"h": np.array([-3.0, -4.0]), "w": STEP}]
    check(optimizer, expected, (STACKED,), MORE)


def test_freeze_before_and_after_a_balancer():
    frozen = {"h": False, "w": True}
    before = optax.chain(optax.freeze(frozen), PCGRAD, SGD)
    check(before, [{"h": np.array([-3.0, -4.0]), "w": ZERO}], (STACKED,), MORE)
    # All leaves: <g_1, g_2> = 5 - 1 = 4, so that PCGrad sums the gradients.
    after = optax.chain(PCGRAD, SGD, optax.freeze(frozen))
    check(after, [{"h": np.array([-3.0, -4.0]), "w": ZERO}], (STACKED,), MORE)


def test_a_part_without_parameters_is_named():
    optimizer = optax.masked(PCGRAD, {"h": False, "w": False})
    state = optimizer.init(MORE)
    with pytest.raises(ValueError, match="pcgrad: the gradients are an empty tree"):
        optimizer.update(STACKED, state, MORE)


@pytest.mark.parametrize(
    "wrap",
    [
        optax.flatten,
        lambda o: optax.MultiSteps(o, 2),
        lambda o: optax.MultiSteps(o, 2, should_skip_update_fn=optax.skip_not_finite),
    ],
    ids=["flatten", "multi_steps", "skip"],
)
@pytest.mark.parametrize("size", [2, 5])  # one equals the number of tasks
def test_a_wrapper_that_cannot_contain_a_balancer_is_named(wrap, size):
    optimizer = wrap(optax.chain(PCGRAD, SGD))
    params = {"w": jnp.ones(size)}
    state, grads = optimizer.init(params), {"w": jnp.ones((T, size))}
    message = r"stacked gradients .* optax.MultiSteps go"
    if optax.__version__ < "0.2.8":  # MultiSteps first compares its own branches
        message += "|must have equal types|equal output types"
    with (
        jax.numpy_rank_promotion("allow"),  # as users have it
        pytest.raises((ValueError, TypeError), match=message),
    ):
        optimizer.update(grads, state, params)


@pytest.mark.parametrize("name", ["moco", "db_mtl", "famo", "pcgrad"])
def test_parameters_in_the_state_are_found_by_optax(name):
    balancer = mtljax.get_method(name).build(T, key=jax.random.key(0))
    optimizer = optax.chain(balancer, optax.adam(0.1))
    state = optimizer.init(PARAMS)
    same = optax.tree_map_params(optimizer, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    moments = optax.tree_map_params(optimizer, jnp.ones_like, state)[1][0]
    assert moments.mu["w"].tolist() == [1.0, 1.0]
