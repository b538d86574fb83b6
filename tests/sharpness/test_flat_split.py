"""Loss and flat parts balanced apart: against the inner balancer called by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import CASES

import mtljax
from mtljax.sharpness import FlatSplitState, SamGrads, flat_split

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LOSSES = jnp.asarray(RNG.uniform(0.5, 2, size=(3, 3)), jnp.float32)
ALL, SOME = jnp.ones(3, bool), jnp.array([True, False, True])
PARAMS = {"a": jnp.zeros(4), "b": jnp.zeros(2)}


def rows(seed, scale=1.0):
    """Stacked gradients of three tasks that mostly agree."""
    rng = np.random.default_rng(seed)

    def leaf(p):
        common = rng.normal(size=p.shape)
        return scale * (common + 0.7 * rng.normal(size=(3, *p.shape)))

    return jax.tree.map(lambda p: jnp.asarray(leaf(p), jnp.float32), PARAMS)


GRADS = [SamGrads(rows(i), rows(10 + i, 0.1)) for i in range(3)]
ZERO = jax.tree.map(jnp.zeros_like, GRADS[0].flat)


@functools.cache
def built(name, **options):
    return mtljax.get_method(name).build(3, key=KEY, **options)


@functools.cache
def updating(name, mode="split"):
    """One compiled program per method and mode; it always gets losses and a mask."""
    balancer = flat_split(built(name), mode)
    run = jax.jit(balancer.update)

    def update(grads, state, losses=LOSSES[0], mask=ALL):
        return run(grads, state, losses=losses, mask=mask)

    return balancer, update


@functools.cache
def alone(name):
    run = jax.jit(built(name).update)

    def update(grads, state, losses=LOSSES[0], mask=ALL):
        return run(grads, state, losses=losses, mask=mask)

    return update


@functools.cache
def programs(case_id):
    """Of a case; the shared ones where it is a method with its defaults."""
    case = next(c for c in CASES if c.id == case_id)
    if not case.options:
        return updating(case.name)[1], alone(case.name)
    inner = case.build(3)
    return jax.jit(flat_split(inner).update), jax.jit(inner.update)


def add(left, right):
    return jax.tree.map(jnp.add, left, right)


def close(got, expected, tolerance=1e-4):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(got, expected, rtol=0, atol=tolerance * scale + 1e-12)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def finite(state):
    return all(
        is_key(x) or np.isfinite(x).all() for x in jax.tree.leaves(state) if x.size
    )


# --- the paper's mode, with every method --------------------------------------------

SAMPLE = ("linear", "famo", "pcgrad", "imtl_g", "graddrop")
EVERY = [
    pytest.param(
        case,
        id=case.id,
        marks=[] if case.name in SAMPLE and not case.options else pytest.mark.deep,
    )
    for case in CASES
]


@pytest.mark.parametrize("case", EVERY)
def test_it_is_the_balancer_on_both_parts(case):
    """Three steps: with all tasks, without one, without a flat part."""
    inner = case.build(3)
    balancer = flat_split(inner)
    assert balancer.reads_losses == inner.reads_losses
    assert balancer.positive_losses == inner.positive_losses
    state = balancer.init(PARAMS)
    assert isinstance(state, FlatSplitState)
    loss_state, flat_state = state.loss, state.flat
    update, by_hand = programs(case.id)
    tolerance = 1e-3 if case.name in ("sdmgrad", "fairgrad", "nash_mtl") else 2e-4
    for i, mask in enumerate([ALL, SOME, ALL]):
        grads = GRADS[i] if i < 2 else SamGrads(GRADS[i].loss, ZERO)
        side = {"losses": LOSSES[i], "mask": mask}
        got, state = update(grads, state, **side)
        loss, loss_state = by_hand(grads.loss, loss_state, **side)
        expected = loss
        if i < 2:
            flat, flat_state = by_hand(grads.flat, flat_state, **side)
            expected = add(loss, flat)
            close(got, expected, tolerance)
        else:  # exactly the base method, and nothing learned from nothing
            close(got, expected, 1e-5)
        weights = getattr(state.loss, "task_weights", jnp.ones(3))
        want = getattr(loss_state, "task_weights", jnp.ones(3))
        np.testing.assert_allclose(weights, want, rtol=1e-3, atol=1e-4)
        assert finite(state)
    for got, want in zip(
        jax.tree.leaves(state.flat), jax.tree.leaves(flat_state), strict=True
    ):
        if is_key(want):
            assert (got == want).all()


def test_every_registered_method_is_a_case():
    assert {param.values[0].name for param in EVERY} == set(mtljax.METHODS)


def test_the_halves_draw_from_keys_of_their_own():
    """PCGrad's order for g and for h, as in the reference code."""
    balancer, update = updating("random_loss_weighting")
    _, state = update(GRADS[0], balancer.init(PARAMS))
    assert np.abs(state.loss.task_weights - state.flat.task_weights).max() > 1e-3
    # The loss half draws what the method alone draws: ρ = 0 is the base method.
    _, base = alone("random_loss_weighting")(
        GRADS[0].loss, built("random_loss_weighting").init(PARAMS)
    )
    np.testing.assert_array_equal(state.loss.task_weights, base.task_weights)


# --- the ablations ------------------------------------------------------------------


def test_for_a_linear_balancer_split_is_direct():
    """Exactly so in arithmetic; to rounding in float32."""
    balancer = mtljax.linear(3, weights=[1.0, 2.0, 0.5])
    split, direct = flat_split(balancer), flat_split(balancer, "direct")
    got, _ = jax.jit(split.update)(GRADS[0], split.init(PARAMS))
    want, _ = jax.jit(direct.update)(GRADS[0], direct.init(PARAMS))
    close(got, want, 1e-6)
    weighted = jax.tree.map(
        lambda g, h: jnp.tensordot(jnp.array([1.0, 2.0, 0.5]), g + h, 1), *GRADS[0]
    )
    close(got, weighted, 1e-6)


def test_for_the_sum_all_modes_are_one():
    updates = [
        updating("linear", mode) for mode in ("split", "direct", "second", "each")
    ]
    found = [run(GRADS[0], b.init(PARAMS), losses=LOSSES[0])[0] for b, run in updates]
    for other in found[1:]:
        close(other, found[0], 1e-6)


def test_direct_balances_sam_gradients():
    balancer, update = updating("imtl_g", "direct")
    got, state = update(GRADS[0], balancer.init(PARAMS))
    want, base = alone("imtl_g")(add(*GRADS[0]), built("imtl_g").init(PARAMS))
    close(got, want)
    np.testing.assert_allclose(state.loss.task_weights, base.task_weights, atol=1e-4)
    together = SamGrads(add(*GRADS[0]), None)
    close(update(together, balancer.init(PARAMS))[0], want)


@functools.cache
def of_two(name):
    """The method built for two tasks: what the pair modes must agree with."""
    balancer = mtljax.get_method(name).build(2, key=KEY)

    @jax.jit
    def run(one, two):
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), one, two)
        return balancer.update(stacked, balancer.init(PARAMS))[0]

    return run


def pair(name, one, two):
    return of_two(name)(one, two)


# A task of two is a batch of three with one absent, for Gramian and for gradients.
PAIRED = ["imtl_g"]
PAIRED += [pytest.param(n, marks=pytest.mark.deep) for n in ("cagrad", "mgda")]


@pytest.mark.parametrize("name", PAIRED)
def test_second_balances_the_two_halves(name):
    balancer, update = updating(name, "second")
    got, _ = update(GRADS[0], balancer.init(PARAMS))
    start = built(name).init(PARAMS)
    halves = [alone(name)(part, start)[0] for part in GRADS[0]]
    close(got, pair(name, *halves), 1e-3)


@pytest.mark.parametrize("name", PAIRED)
def test_each_balances_the_parts_of_a_task_first(name):
    balancer, update = updating(name, "each")
    got, state = update(GRADS[0], balancer.init(PARAMS))
    mixed = [
        pair(name, *(jax.tree.map(lambda x, i=i: x[i], part) for part in GRADS[0]))
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *mixed)
    want, _ = alone(name)(stacked, built(name).init(PARAMS))
    close(got, want, 1e-3)
    assert jax.tree.leaves(state.pair)[0].shape[0] == 3


@pytest.mark.deep
def test_a_method_of_gradients_takes_the_pair_modes():
    """GradDrop keeps every entry whose signs agree."""
    same = jax.tree.map(jnp.abs, GRADS[0])
    for mode in ("second", "each"):
        balancer = flat_split(built("graddrop"), mode)
        got, _ = jax.jit(balancer.update)(same, balancer.init(PARAMS))
        close(got, jax.tree.map(lambda g, h: (g + h).sum(0), *same), 1e-5)


@pytest.mark.parametrize("mode", ["split", "direct", "second", "each"])
def test_without_flat_parts_every_mode_is_the_base_method(mode):
    name = "imtl_g"
    balancer, update = updating(name, mode)
    start = balancer.init(PARAMS)
    got, state = update(SamGrads(GRADS[0].loss, ZERO), start)
    want, _ = alone(name)(GRADS[0].loss, built(name).init(PARAMS))
    close(got, want, 1e-6)
    chex.assert_trees_all_equal(state.flat, start.flat)
    chex.assert_trees_all_equal(state.pair, start.pair)


# --- safety -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pcgrad", pytest.param("nash_mtl", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("where", ["loss", "flat"])
def test_what_is_not_finite_spares_both_states(name, where):
    balancer, update = updating(name)
    start = balancer.init(PARAMS)
    bad = getattr(GRADS[0], where)
    bad = {**bad, "b": bad["b"].at[1, 0].set(jnp.nan)}
    grads = GRADS[0]._replace(**{where: bad})
    got, state = update(grads, start, losses=LOSSES[0], mask=ALL)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(got))
    chex.assert_trees_all_equal(state, start)
    # An absent task may hold anything.
    got, _ = update(grads, start, losses=LOSSES[0], mask=SOME)
    chex.assert_tree_all_finite(got)


def test_nobody_present_changes_nothing():
    balancer, update = updating("pcgrad")
    start = balancer.init(PARAMS)
    got, state = update(GRADS[0], start, losses=LOSSES[0], mask=jnp.zeros(3, bool))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(got))
    chex.assert_trees_all_equal(state, start)


def test_dtypes_of_the_parameters_come_back():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS[0].loss)
    balancer, update = updating("linear")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    got, state = update(SamGrads(half, GRADS[0].flat), balancer.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params)
    assert state.flat.task_weights.dtype == jnp.float32


def test_permuting_the_tasks_changes_nothing():
    order = np.array([2, 0, 1])
    balancer, update = updating("imtl_g")
    got, _ = update(GRADS[0], balancer.init(PARAMS))
    shuffled = jax.tree.map(lambda x: x[order], GRADS[0])
    again, _ = update(shuffled, balancer.init(PARAMS))
    close(again, got, 1e-3)


# --- in company ---------------------------------------------------------------------


@pytest.mark.deep
def test_in_a_chain_with_adam_and_scan():
    opt = optax.chain(flat_split(built("mgda")), optax.adam(1e-2))

    def step(carry, grads):
        params, state = carry
        updates, state = opt.update(grads, state, params, losses=LOSSES[0])
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)
    (params, _), _ = jax.jit(
        lambda: jax.lax.scan(step, (PARAMS, opt.init(PARAMS)), stacked)
    )()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    assert np.abs(params["a"]).min() > 1e-3


def test_observe_reaches_both_halves():
    balancer, update = updating("famo")
    _, state = update(GRADS[0], balancer.init(PARAMS), losses=LOSSES[0], mask=ALL)

    @jax.jit
    def look(state):
        both = mtljax.observe(balancer, state, losses=0.9 * LOSSES[0])
        one = mtljax.observe(built("famo"), state.loss, losses=0.9 * LOSSES[0])
        return both, one

    seen, by_hand = look(state)
    chex.assert_trees_all_close(seen.loss, by_hand)
    chex.assert_trees_all_close(seen.flat.logits, seen.loss.logits)
    assert np.abs(seen.loss.logits - state.loss.logits).max() > 1e-4
    direct = flat_split(built("famo"), "direct")
    state = direct.init(PARAMS)
    assert mtljax.observe(direct, state, losses=LOSSES[0]).flat == ()
    assert flat_split(built("mgda")).observe is None


@pytest.mark.deep
def test_around_wrappers():
    """per_layer, compose and smooth_weights are balancers like the others."""
    for inner in (
        mtljax.per_layer(built("mgda")),
        mtljax.compose(built("scale_invariant"), built("mgda")),
        mtljax.smooth_weights(built("mgda")),
    ):
        balancer = flat_split(inner)
        got, _ = jax.jit(balancer.update)(
            GRADS[0], balancer.init(PARAMS), losses=LOSSES[0]
        )
        run = jax.jit(inner.update)
        start = inner.init(PARAMS)
        parts = [run(part, start, losses=LOSSES[0])[0] for part in GRADS[0]]
        close(got, add(*parts), 1e-4)


@pytest.mark.deep
def test_any_transformation_of_stacked_gradients():
    chain = optax.chain(built("mgda"), optax.scale(2.0))
    balancer = flat_split(chain)
    got, _ = jax.jit(balancer.update)(GRADS[0], balancer.init(PARAMS))
    plain, update = updating("mgda")
    want, _ = update(GRADS[0], plain.init(PARAMS))
    close(got, jax.tree.map(lambda x: 2 * x, want), 1e-4)


@pytest.mark.deep
def test_preference_reaches_both_calls_and_the_cross_gramian_one():
    balancer = flat_split(built("upgrad"))
    given = {"preference": jnp.array([0.8, 0.1, 0.1])}
    got, _ = balancer.update(GRADS[0], balancer.init(PARAMS), **given)
    inner = built("upgrad")
    parts = [inner.update(p, inner.init(PARAMS), **given)[0] for p in GRADS[0]]
    close(got, add(*parts), 1e-4)
    balancer, inner = flat_split(built("modo")), built("modo")
    cross = mtljax.stack.cross_gramian(rows(5), rows(6))
    got, _ = balancer.update(GRADS[0], balancer.init(PARAMS), cross_gramian=cross)
    loss, _ = inner.update(GRADS[0].loss, inner.init(PARAMS), cross_gramian=cross)
    flat, _ = inner.update(GRADS[0].flat, inner.init(PARAMS))
    close(got, add(loss, flat), 1e-4)


# --- errors -------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users")
def test_errors_when_built():
    with pytest.raises(ValueError, match="flat_split: mode='both' is not one of"):
        flat_split(built("mgda"), "both")
    chain = optax.chain(built("mgda"), optax.scale(2.0))
    for mode in ("second", "each"):
        with pytest.raises(ValueError, match=r"takes a mtljax\.Balancer"):
            flat_split(chain, mode)
        with pytest.raises(ValueError, match="have no losses, but famo reads losses"):
            flat_split(built("famo"), mode)
        with pytest.raises(ValueError, match="krum needs at least 3"):
            flat_split(built("krum"), mode)
        with pytest.raises(ValueError, match="mgda was built with num_tasks=1"):
            flat_split(mtljax.mgda(1), mode)


@pytest.mark.usefixtures("as_users")
def test_errors_when_used():
    balancer, _ = updating("mgda")
    state = balancer.init(PARAMS)
    with pytest.raises(ValueError, match=r"takes SamGrads\(loss, flat\).* not a dict"):
        balancer.update(GRADS[0].loss, state)
    with pytest.raises(ValueError, match=r"mode='split' needs the flat part"):
        balancer.update(SamGrads(GRADS[0].loss, None), state)
    with pytest.raises(ValueError, match="of different structure"):
        balancer.update(SamGrads(GRADS[0].loss, {"a": ZERO["a"]}), state)
    with pytest.raises(ValueError, match=r"mgda: gradient 'a' has shape \(2, 4\)"):
        balancer.update(jax.tree.map(lambda x: x[:2], GRADS[0]), state)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        balancer.update(GRADS[0], state, mask=jnp.ones(2))
    reading = flat_split(built("famo"))
    with pytest.raises(ValueError, match="famo reads the task losses"):
        reading.update(GRADS[0], reading.init(PARAMS))
