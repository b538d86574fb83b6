"""Balancers made of balancers, against the same put together by hand."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients.problem import LABELS, batch, close, jacobian, params, task_losses
from methods.stepping import step
from zoo import J3, LOSSES3

import mtljax

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MATRICES = jnp.asarray(RNG.normal(size=(4, 3, 4)), jnp.float32)
LOSSES = jnp.asarray(RNG.uniform(0.5, 2, size=(4, 3)), jnp.float32)
AFTER = 0.9 * LOSSES + 0.05
MASKS = jnp.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)


@functools.cache
def built(name, num_tasks=3):
    return mtljax.get_method(name).build(num_tasks, key=KEY)


def numbers(state):
    """Leaves to compare; the certificate of a solve is made of rounding errors."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    return {
        str(path): np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for path, x in flat
        if ".solver" not in str(path)
    }


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def close_states(got, expected, rtol=2e-4):
    got, expected = numbers(got), numbers(expected)
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(got[path], value, rtol, 1e-5, err_msg=path)


# --- compose ------------------------------------------------------------------------

FIRST = [n for n in mtljax.METHODS if built(n).needs == "losses"]
# Krum picks one of two nearest neighbours that tie: rounding decides which.
SECOND = [n for n in mtljax.METHODS if built(n).needs == "gramian" and n != "krum"]
USUAL = [("famo", "mgda"), ("scale_invariant", "pcgrad"), ("uncertainty", "nash_mtl")]
USUAL += [("random_loss_weighting", "cagrad"), ("dwa", "gradvac"), ("stch", "upgrad")]
PAIRS = [
    pytest.param(*pair, marks=[] if pair in USUAL else pytest.mark.deep)
    for pair in itertools.product(FIRST, SECOND)
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_compose_is_the_two_by_hand(one, two):
    """Four steps in a scan: with a task absent, with nobody, and FAMO's second look."""
    first, second = built(one), built(two)
    balancer = mtljax.compose(first, second)

    def hand(states, inputs):
        s1, s2 = states
        matrix, losses, after, mask = inputs
        weights, s1 = first.weigh(s1, losses=losses, mask=mask)
        rows = jnp.where(mask[:, None], weights[:, None] * matrix, 0)
        update, s2 = second.update({"w": rows}, s2, losses=losses, mask=mask)
        s1 = mtljax.observe(first, s1, losses=after, mask=mask)
        s2 = mtljax.observe(second, s2, losses=after, mask=mask)
        return (s1, s2), (update, weights * s2.task_weights)

    def composed(state, inputs):
        matrix, losses, after, mask = inputs
        update, state = balancer.update({"w": matrix}, state, losses=losses, mask=mask)
        state = mtljax.observe(balancer, state, losses=after, mask=mask)
        return state, (update, state.task_weights)

    @jax.jit
    def both(inputs):
        state = balancer.init({})
        expected = jax.lax.scan(hand, tuple(state[:2]), inputs)
        return jax.lax.scan(composed, state, inputs), expected

    # What an absent task holds must not matter.
    matrices = MATRICES.at[1, 1].set(jnp.nan)
    losses = LOSSES.at[1, 1].set(jnp.nan)
    (state, got), (states, expected) = both((matrices, losses, AFTER, MASKS))
    scale = np.abs(expected[0]["w"]).max()
    np.testing.assert_allclose(got[0]["w"] / scale, expected[0]["w"] / scale, atol=2e-4)
    assert (got[0]["w"][2] == 0).all()
    for i in (0, 1, 3):
        np.testing.assert_allclose(got[1][i], expected[1][i], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got[1][2], got[1][1])  # nobody: nothing is logged
    close_states(state[:2], states)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "imtl_g"])
def test_log_variants_act_on_the_gradients_of_log_losses(name):
    """LOG_MGDA and its like in FAMO's code."""
    balancer = mtljax.compose(built("scale_invariant"), built(name))
    got = step(balancer, J3)
    expected = step(built(name), J3 / LOSSES3[:, None])
    np.testing.assert_allclose(got.update, expected.update, atol=1e-5)
    np.testing.assert_allclose(got.weights, expected.weights / LOSSES3, atol=1e-5)
    np.testing.assert_allclose(got.weights @ J3, got.update, atol=1e-5)


def test_compose_with_linear_changes_nothing():
    got = step(mtljax.compose(built("linear"), built("mgda")), J3)
    np.testing.assert_allclose(got.weights, [0.592593, 0.407407, 0], atol=1e-5)
    doubled = mtljax.compose(built("linear"), mtljax.compose(DOUBLE, built("mgda")))
    np.testing.assert_allclose(step(doubled, J3).update, 2 * got.update, rtol=1e-5)


DOUBLE = mtljax.linear(3, weights=[2.0, 2.0, 2.0])


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_compose_spares_both_states_of_what_is_not_finite(bad):
    """Also the first's, which sees only losses, when it is a gradient that is bad."""
    balancer = mtljax.compose(built("famo"), built("pcgrad"))
    grads, losses = {"w": MATRICES[0]}, LOSSES[0]
    _, state = balancer.update(grads, balancer.init({}), losses=losses)
    if bad == "loss":
        losses = losses.at[1].set(jnp.nan)
    else:
        grads = {"w": MATRICES[0].at[1, 0].set(jnp.inf)}
    update, new = jax.jit(balancer.update)(grads, state, losses=losses)
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(new, state)


def test_compose_reads_what_its_parts_read():
    balancer = mtljax.compose(built("famo"), built("mgda"))
    assert repr(balancer) == (
        "compose(famo(num_tasks=3, learning_rate=0.025, weight_decay=0.001, "
        "min_losses=0.0, scale='native'), mgda(num_tasks=3, normalize='none', "
        "apply_to='raw', scale='native'))"
    )
    assert balancer.reads_losses
    assert balancer.positive_losses
    assert balancer.observe is not None
    balancer = mtljax.compose(built("linear"), built("mgda"))
    assert not balancer.reads_losses
    assert balancer.observe is None
    assert mtljax.compose(built("linear"), built("famo")).needs == "losses"


@pytest.mark.usefixtures("as_users")
def test_compose_errors():
    with pytest.raises(
        ValueError, match=r"first balancer must .* mgda needs the gramian"
    ):
        mtljax.compose(built("mgda"), built("linear"))
    with pytest.raises(
        ValueError, match="linear has num_tasks=3 and mgda has num_tasks=2"
    ):
        mtljax.compose(built("linear"), built("mgda", 2))
    layers = mtljax.per_layer(built("mgda"))
    with pytest.raises(ValueError, match=r"per_layer\(mgda\) has none"):
        mtljax.compose(built("linear"), layers)
    balancer = mtljax.compose(built("scale_invariant"), built("mgda"))
    grads = {"w": MATRICES[0]}
    with pytest.raises(ValueError, match="scale_invariant reads the task losses"):
        balancer.update(grads, balancer.init({}))
    with pytest.raises(ValueError, match=r"of type MGDAState, not ComposeState"):
        balancer.update(grads, built("mgda").init({}), losses=LOSSES[0])


def test_compose_has_the_domain_of_both_parts():
    """A loss outside of it is known under jit only by what comes back."""
    for pair in (("scale_invariant", "mgda"), ("linear", "famo")):
        balancer = mtljax.compose(*map(built, pair))
        state = balancer.init({})
        assert balancer.domain(jnp.array([1.0, 0.0, -1.0])).tolist() == [1, 0, 0]
        for update in (balancer.update, jax.jit(balancer.update)):
            losses = jnp.array([1.0, -1, 1])
            out, new = update({"w": MATRICES[0]}, state, losses=losses)
            assert np.isnan(out["w"]).all()
            chex.assert_trees_all_equal(new, state)


# --- smooth_weights -----------------------------------------------------------------


def test_smoothing_against_a_loop_with_masks_and_nan():
    """The average of a task moves only with the batches that hold it."""
    balancer = mtljax.smooth_weights(built("scale_invariant"), decay=0.7)
    update, state = jax.jit(balancer.update), balancer.init({})
    average = np.full(3, np.nan)
    logged = np.ones(3)
    for i in range(12):
        matrix, losses = RNG.normal(size=(3, 4)), RNG.uniform(0.5, 2, size=3)
        mask = RNG.random(3) < 0.6 if i else np.array([True, False, True])
        if i in (4, 7):
            mask[:] = i == 4
        broken = i in (4, 9)
        mask[0] |= broken
        fed = np.where(mask, losses, np.nan)
        if broken:
            fed[0] = np.inf
        out, state = update(
            {"w": jnp.asarray(matrix, jnp.float32)},
            state,
            losses=jnp.asarray(fed, jnp.float32),
            mask=jnp.asarray(mask),
        )
        if broken:
            assert np.isnan(out["w"]).all()
        else:
            fresh = np.isnan(average)
            mixed = 0.7 * np.where(fresh, 0, average) + 0.3 / losses
            average = np.where(mask, np.where(fresh, 1 / losses, mixed), average)
            weights = np.where(mask, average, 0)
            logged = weights if mask.any() else logged
            np.testing.assert_allclose(out["w"], weights @ matrix, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.task_weights, logged, rtol=1e-5)
        np.testing.assert_array_equal(state.seen, ~np.isnan(average))
        known = np.asarray(state.average)[~np.isnan(average)]
        np.testing.assert_allclose(known, average[~np.isnan(average)], rtol=1e-5)


@pytest.mark.parametrize("name", ["mgda", "famo", "pcgrad"])
def test_no_decay_is_the_inner_method(name):
    inner = built(name)
    balancer = mtljax.smooth_weights(inner, decay=0.0)

    @jax.jit
    def run(inputs):
        def one(states, inputs):
            matrix, losses, after, mask = inputs
            outs = []
            new = []
            for b, old in zip((balancer, inner), states, strict=True):
                out, state = b.update({"w": matrix}, old, losses=losses, mask=mask)
                new.append(mtljax.observe(b, state, losses=after, mask=mask))
                outs.append(out["w"])
            return tuple(new), outs

        return jax.lax.scan(one, (balancer.init({}), inner.init({})), inputs)

    (state, expected_state), (got, expected) = run((MATRICES, LOSSES, AFTER, MASKS))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    close_states(state.inner, expected_state)
    np.testing.assert_allclose(state.task_weights, expected_state.task_weights)


def test_smoothing_around_a_composition_and_inside_one():
    """Both orders exist, and FAMO's second look reaches the innermost state."""
    smooth = mtljax.smooth_weights
    outside = smooth(mtljax.compose(built("famo"), built("mgda")), decay=0.5)
    inside = mtljax.compose(smooth(built("famo"), decay=0.5), built("mgda"))
    for balancer in (outside, inside):
        state = balancer.init({})
        grads = {"w": MATRICES[0]}
        _, state = balancer.update(grads, state, losses=LOSSES[0])
        before = optax.tree_utils.tree_get(state, "learned").value
        state = mtljax.observe(balancer, state, losses=AFTER[0])
        after = optax.tree_utils.tree_get(state, "learned").value
        assert np.abs(before - after).max() > 0.01


@pytest.mark.usefixtures("as_users")
def test_smoothing_errors():
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(
            ValueError, match=rf"decay must be .* at least 0 and below 1, not {decay}"
        ):
            mtljax.smooth_weights(built("mgda"), decay=decay)
    with pytest.raises(ValueError, match=r"per_layer\(mgda\) has none"):
        mtljax.smooth_weights(mtljax.per_layer(built("mgda")))


# --- per_layer ----------------------------------------------------------------------

TREE = {
    "norm": jnp.zeros(5),
    "dense": {"bias": jnp.zeros(4), "kernel": jnp.zeros((2, 3))},
}


def stacked(seed, num_tasks=3):
    rng = np.random.default_rng(seed)

    def leaf(p):
        return jnp.asarray(rng.normal(size=(num_tasks, *p.shape)), jnp.float32)

    return jax.tree.map(leaf, TREE)


def first_name(path):
    return path.split("/")[0]


@pytest.mark.parametrize("name", ["mgda", "famo", "nash_mtl"])
@pytest.mark.parametrize("group", [None, first_name], ids=["leaf", "predicate"])
def test_per_layer_is_a_run_of_its_own_for_every_group(name, group):
    inner = built(name)
    balancer = mtljax.per_layer(inner, group=group)
    state = balancer.init(TREE)
    names = (
        ["dense/bias", "dense/kernel", "norm"] if group is None else ["dense", "norm"]
    )
    assert sorted(state.groups) == names

    def parts(tree):
        if group is None:
            return {
                "dense/bias": tree["dense"]["bias"],
                "dense/kernel": tree["dense"]["kernel"],
                "norm": tree["norm"],
            }
        return tree

    update = jax.jit(balancer.update)
    alone = {name: inner.init(part) for name, part in parts(TREE).items()}
    for i in range(3):
        grads, mask = stacked(i), MASKS[(0, 1, 3)[i]]
        given = {"losses": LOSSES[i], "mask": mask}
        got, state = update(grads, state, **given)
        state = mtljax.observe(balancer, state, losses=AFTER[i], mask=mask)
        for group_name, part in parts(grads).items():
            expected, new = inner.update(part, alone[group_name], **given)
            new = mtljax.observe(inner, new, losses=AFTER[i], mask=mask)
            alone[group_name] = new
            close(parts(got)[group_name], expected, 1e-4)
            close_states(state.groups[group_name], new)


def test_per_layer_differs_from_the_whole():
    inner = built("mgda")
    balancer = mtljax.per_layer(inner)
    layered, _ = balancer.update(stacked(0), balancer.init(TREE))
    whole, _ = inner.update(stacked(0), inner.init(TREE))
    assert np.abs(layered["norm"] - whole["norm"]).max() > 0.01
    together = mtljax.per_layer(inner, group=lambda path: "all")
    one, _ = together.update(stacked(0), together.init(TREE))
    close(one, whole, 1e-4)


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)])
def test_groups_draw_from_keys_of_their_own(key):
    balancer = mtljax.per_layer(mtljax.random_loss_weighting(3, key=key))
    state = balancer.init(TREE)
    seen = set()
    for _ in range(2):
        _, state = balancer.update(stacked(0), state)
        for inner in state.groups.values():
            seen.add(tuple(np.round(np.asarray(inner.task_weights), 6).tolist()))
    assert len(seen) == 6


def test_the_state_of_a_group_is_made_for_its_leaves():
    """A method that keeps a copy of the gradients."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros((3, *p.shape)), params)

    def update(grads, state, params=None, **extra):
        state = jax.tree.map(jnp.add, state, grads)
        return jax.tree.map(lambda x: x.sum(0), state), state

    inner = mtljax.Balancer(init, update, name="summing", num_tasks=3)
    balancer = mtljax.per_layer(inner, group=first_name)
    state, total = balancer.init(TREE), 0
    for i in range(3):
        total = jax.tree.map(lambda t, g: t + g, stacked(i), total) if i else stacked(0)
        got, state = jax.jit(balancer.update)(stacked(i), state)
        close(got, jax.tree.map(lambda x: x.sum(0), total))


def test_per_layer_in_a_scan_with_adam():
    balancer = mtljax.per_layer(built("pcgrad"))
    opt = optax.chain(balancer, optax.adam(1e-2))

    def one(carry, i):
        values, state = carry
        grads = jax.tree.map(lambda g: g * (1 + i), stacked(0))
        update, state = opt.update(grads, state, values, losses=LOSSES[0])
        return (optax.apply_updates(values, update), state), update

    (values, _), _ = jax.jit(
        lambda: jax.lax.scan(one, (TREE, opt.init(TREE)), jnp.arange(3.0))
    )()
    chex.assert_trees_all_equal_shapes_and_dtypes(values, TREE)
    chex.assert_tree_all_finite(values)


def test_per_layer_spares_every_state_of_what_is_not_finite():
    balancer = mtljax.per_layer(built("pcgrad"))
    state, grads = balancer.init(TREE), stacked(0)
    grads["norm"] = grads["norm"].at[1, 0].set(jnp.nan)
    update, new = jax.jit(balancer.update)(grads, state)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(update))
    chex.assert_trees_all_equal(new, state)
    mask = MASKS[1]
    update, new = jax.jit(balancer.update)(grads, state, mask=mask)
    chex.assert_tree_all_finite(update)
    nobody, new = jax.jit(balancer.update)(grads, state, mask=jnp.zeros(3, bool))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nobody))
    chex.assert_trees_all_equal(new, state)


@pytest.mark.usefixtures("as_users")
def test_per_layer_errors():
    balancer = mtljax.per_layer(built("mgda"))
    with pytest.raises(ValueError, match=r"groups \['dense/bias', .*shared_params"):
        balancer.update(stacked(0), balancer.init({"norm": jnp.zeros(5)}))
    with pytest.raises(ValueError, match=r"per_layer\(mgda\): gradient 'norm'"):
        balancer.update({"norm": jnp.zeros((2, 2))}, balancer.init(TREE))


# --- with the gradient transformation -----------------------------------------------


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all shared", "labels"])
@pytest.mark.parametrize("kind", ["compose", "smooth", "per_layer", "both"])
def test_value_and_balanced_grad(kind, labels):
    wrapped = {
        "compose": lambda: mtljax.compose(built("famo"), built("mgda")),
        "smooth": lambda: mtljax.smooth_weights(built("famo"), decay=0.5),
        "per_layer": lambda: mtljax.per_layer(built("mgda")),
        "both": lambda: mtljax.per_layer(
            mtljax.compose(
                built("scale_invariant"), mtljax.smooth_weights(built("mgda"))
            )
        ),
    }
    balancer = wrapped[kind]()
    values = params()
    function = mtljax.value_and_balanced_grad(task_losses, balancer, labels=labels)
    seen = values if labels is None else mtljax.shared_params(values, labels)
    state = expected_state = balancer.init(seen)
    function, update = jax.jit(function), jax.jit(balancer.update)
    for i, mask in enumerate(MASKS[:2]):
        losses, grad, state = function(values, state, batch(i), mask=mask)
        rows = jacobian(values, batch(i))
        rows = rows if labels is None else mtljax.shared_params(rows, labels)
        expected, expected_state = update(
            rows, expected_state, losses=losses, mask=mask
        )
        got = grad if labels is None else mtljax.shared_params(grad, labels)
        close(got, expected, 1e-4)
        close_states(state, expected_state, 1e-3)


def test_weighted_heads_of_a_composition():
    balancer = mtljax.compose(built("scale_invariant"), built("mgda"))
    function = mtljax.value_and_balanced_grad(
        task_losses, balancer, labels=LABELS, heads="weighted"
    )
    values = params()
    _, grad, state = jax.jit(function)(values, balancer.init({}), batch())
    rows = jacobian(values, batch())["heads"]
    expected = jax.tree.map(lambda r: jnp.tensordot(state.task_weights, r, 1), rows)
    close(grad["heads"], expected, 1e-4)


# --- inject_hyperparams -------------------------------------------------------------


def schedule(count):
    return 0.4 / (1 + count)


def test_a_schedule_gives_the_steps_of_balancers_with_its_values():
    """Also in a chain, and without a step of the schedule for what is not applied."""
    balancer = mtljax.inject_hyperparams(mtljax.cagrad)(3, c=schedule)
    assert (balancer.needs, balancer.num_tasks) == ("gramian", 3)
    chained = optax.chain(balancer, optax.scale(-1.0))
    update, state = jax.jit(chained.update), chained.init({})
    for count, matrix in enumerate(MATRICES):
        given = {"losses": LOSSES[count]}
        bad, kept = update({"w": matrix.at[0, 0].set(jnp.nan)}, state, **given)
        assert np.isnan(bad["w"]).all()
        chex.assert_trees_all_equal(kept, state)
        out, state = update({"w": matrix}, kept, **given)
        alone = mtljax.cagrad(3, c=schedule(count))
        expected, _ = alone.update({"w": matrix}, alone.init({}))
        np.testing.assert_allclose(-out["w"], expected["w"], rtol=1e-4, atol=1e-5)
        assert int(state[0].step) == count + 1


def test_a_value_in_the_state_may_be_replaced():
    balancer = mtljax.inject_hyperparams(mtljax.cagrad)(3, c=0.4)
    state = balancer.init({})
    state.hyperparams["c"] = jnp.float32(0.9)
    got, _ = balancer.update({"w": MATRICES[0]}, state)
    alone = mtljax.cagrad(3, c=0.9)
    expected, _ = alone.update({"w": MATRICES[0]}, alone.init({}))
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-5)


def test_injected_balancers_take_the_engine_of_the_method():
    balancer = mtljax.inject_hyperparams(mtljax.famo)(3, learning_rate=schedule)
    assert (balancer.needs, balancer.reads_losses) == ("losses", True)

    def losses_of(p):
        return (MATRICES[0] @ p["w"]) ** 2 + 1

    given = {"w": jnp.ones(4)}
    function = jax.jit(mtljax.value_and_balanced_grad(losses_of, balancer))
    losses, _, state = function(given, balancer.init(given))
    state = mtljax.observe(balancer, state, losses=0.5 * losses)
    assert not state.inner.pending.any()


@pytest.mark.usefixtures("as_users")
def test_injection_errors():
    inject = mtljax.inject_hyperparams
    with pytest.raises(ValueError, match=r"cagrad: c must be .* at least 0"):
        inject(mtljax.cagrad)(3, c=-1.0)
    with pytest.raises(ValueError, match="cagrad has no argument 'd'"):
        inject(mtljax.cagrad, static_args=("d",))
    balancer = inject(mtljax.cagrad)(3, c=schedule)
    with pytest.raises(ValueError, match="of type CAGradState, not InjectState"):
        balancer.update({"w": MATRICES[0]}, mtljax.cagrad(3).init({}))
