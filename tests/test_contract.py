"""Every method keeps one contract; a method is done when it passes this file."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import (
    DIM,
    LOSSES,
    PARAMS,
    TRACES,
    built,
    flat,
    parametrize,
    run,
    tree,
    wide,
)
from registry import CASES, CLASSICS, Case
from zoo import J3, ZOO

import mtljax

ALL = np.ones(3, bool)

each = parametrize(CASES)
# Tests that compile programs of their own: beyond the classics they run in deep.
each_compiling = parametrize(
    CASES, [c for c in CASES if c.options or c.name not in CLASSICS]
)


@each_compiling
def test_update_is_shaped_like_the_parameters_in_their_dtype(case: Case):
    dtype = jnp.bfloat16
    grads = tree(J3, dtype)
    params = jax.tree.map(lambda g: g[0], grads)
    balancer = case.build(3)
    state = balancer.init(params)
    update, new = jax.jit(balancer.update)(
        grads, state, params, losses=LOSSES.astype(dtype)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(update, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite(update)


@each_compiling
def test_chains_with_adam_in_a_scan_and_ignores_unknown_side_inputs(case: Case):
    balancer = case.build(3)
    opt = optax.chain(balancer, optax.adam(1e-2))
    params = {"w": jnp.array([1.0, -2.0, 3.0, 0.5])}
    targets = jnp.asarray(J3, jnp.float32)

    def task_losses(p):
        return ((p["w"][None] - targets) ** 2).mean(1) + 0.1

    def step(carry, _):
        params, state = carry
        losses, grads = mtljax.value_and_task_grads(task_losses)(params)
        updates, state = opt.update(grads, state, params, losses=losses, tag=7)
        return (optax.apply_updates(params, updates), state), losses

    (_, state), losses = jax.jit(
        lambda: jax.lax.scan(step, (params, opt.init(params)), length=30)
    )()
    weights = optax.tree_utils.tree_get(state, "task_weights", jnp.ones(3))
    assert weights.shape == (3,)
    assert jnp.isfinite(weights).all()
    assert losses[-1].max() < losses[0].max()


@each_compiling
def test_vmap_over_seeds_is_the_loop(case: Case):
    keys = jax.random.split(jax.random.key(3), 4)
    matrices = np.random.default_rng(0).normal(size=(4, 3, DIM))
    mask = jnp.ones(3, bool)

    def update(key, grads):
        balancer = case.build(3, key)
        state = balancer.init(PARAMS)
        return balancer.update(grads, state, losses=LOSSES, mask=mask)

    grads = jax.tree.map(lambda *g: jnp.stack(g), *map(tree, matrices))
    together, state = jax.jit(jax.vmap(update))(keys, grads)
    for i in range(4):
        start = case.build(3, keys[i]).init(PARAMS)  # the key lives in the state
        alone, alone_state = run(case, matrices[i], state=start)
        found = flat(jax.tree.map(lambda g, i=i: g[i], together))
        np.testing.assert_allclose(found, alone, rtol=2e-4, atol=2e-5)
        if hasattr(state, "task_weights"):
            np.testing.assert_allclose(
                state.task_weights[i], alone_state.task_weights, rtol=2e-4, atol=2e-5
            )


@each
def test_every_matrix_of_the_zoo_gives_a_finite_update(case: Case):
    for name, matrix in ZOO.items():
        update, state = run(case, matrix)
        assert np.isfinite(update).all(), name
        for leaf in jax.tree.leaves(state):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                assert jnp.isfinite(leaf).all(), name
        if name == "zero":
            assert (update == 0).all()


@each
@pytest.mark.usefixtures("as_users")
def test_wrong_task_axis_names_the_leaf_and_the_numbers(case: Case):
    balancer = case.build(3)
    grads = {"ok": jnp.ones((3, 2)), "trunk": {"bad": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match=r"'trunk/bad'.*\(4, 2\).*num_tasks=3"):
        balancer.update(grads, balancer.init(PARAMS), losses=LOSSES)
    with pytest.raises(ValueError, match=f"{case.name}.*integer"):
        case.build(0)


@each
def test_compiles_once(case: Case):
    state = case.build(3).init(PARAMS)
    types = jax.tree.map(jax.typeof, state)  # weak types included
    for seed in range(3):
        matrix = np.random.default_rng(seed).normal(size=(3, DIM))
        _, state = run(case, matrix, state=state)
        assert jax.tree.map(jax.typeof, state) == types
        traces = traces if seed else TRACES[case.id, 3]
    assert TRACES[case.id, 3] == traces > 0


@each
def test_docstring_has_the_sections(case: Case):
    doc = mtljax.METHODS[case.name].factory.__doc__
    assert doc
    for section in ("Args:", "Returns:", "Examples:", "References:", "backward"):
        assert section in doc, section


@each_compiling
def test_a_masked_task_is_a_dropped_task(case: Case):
    kept = case.options.get("update_every", 1) > 1
    if kept or not case.deterministic or case.min_tasks > 2:
        pytest.skip("keeps its solution, draws numbers, or needs three tasks")
    rng = np.random.default_rng(2)
    big_state, small_state = built(case.id)[0].init(PARAMS), None
    present = np.array([0, 2])
    mask = np.array([True, False, True])
    untouched = jax.tree.map(lambda x: x[1], _per_task(big_state, 3))
    for _ in range(6):
        matrix = rng.normal(size=(3, DIM))
        losses = rng.uniform(0.5, 2, size=3)
        gone, lost = matrix.copy(), losses.copy()
        gone[1], lost[1] = np.nan, np.nan  # what an absent task holds does not matter
        masked, big_state = run(case, gone, lost, big_state, mask)
        dropped, small_state = run(case, matrix[present], losses[present], small_state)
        np.testing.assert_allclose(masked, dropped, rtol=2e-4, atol=1e-5)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[1], _per_task(big_state, 3)), untouched
    )


def _per_task(state, num_tasks):
    """The leaves of a state that have one entry per task, but for the log."""
    leaves = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if leaf.ndim and leaf.shape[0] == num_tasks and "task_weights" not in str(path)
    ]
    return leaves


@each
def test_an_empty_batch_changes_nothing(case: Case):
    state = built(case.id)[0].init(PARAMS)
    update, new = run(case, J3, state=state, mask=~ALL)
    assert (update == 0).all()
    chex.assert_trees_all_equal(new, state)


@each
def test_a_step_with_non_finite_input_is_not_applied(case: Case):
    balancer, _ = built(case.id)
    state = balancer.init(PARAMS)
    bad = J3.copy()
    bad[1, 0] = np.inf
    inputs = [(bad, LOSSES), (J3, LOSSES.at[1].set(jnp.nan))]
    for matrix, losses in inputs:  # also the losses of a method that reads none
        update, new = run(case, matrix, losses, state)
        assert np.isnan(update).all()
        chex.assert_trees_all_equal(new, state)


def test_apply_if_finite_skips_a_step_downstream():
    balancer = mtljax.cagrad(3)
    opt = optax.chain(balancer, optax.apply_if_finite(optax.sgd(1.0), 5))
    bad = wide(J3)
    bad[1, 0] = np.inf
    skipped, _ = jax.jit(opt.update)(tree(bad), opt.init(PARAMS), losses=LOSSES)
    assert (flat(skipped) == 0).all()


def test_every_registered_method_has_a_case():
    assert {case.name for case in CASES} == set(mtljax.METHODS)


DEFAULTS = [case for case in CASES if not case.options]


@pytest.mark.usefixtures("as_users")
@parametrize([c for c in DEFAULTS if c.scalable])
@pytest.mark.parametrize("scale", ["sum"])  # the arithmetic: tests/test_balancer.py
def test_scale_is_what_it_says(case: Case, scale):
    for mask, present in ((ALL, 3), (np.array([True, False, True]), 2)):
        scaled, state = run(case, np.eye(3), mask=mask, scale=scale)
        plain, _ = run(case, np.eye(3), mask=mask)
        if case.name not in (
            "cagrad",
            "cosmos",
            "gcs",
        ):  # their weights have other sums
            wanted = present if scale == "sum" else 1
            np.testing.assert_allclose(state.task_weights.sum(), wanted, rtol=1e-5)
        ratio = np.linalg.norm(scaled) / np.linalg.norm(plain)
        np.testing.assert_allclose(scaled, ratio * plain, rtol=1e-5)
    with pytest.raises(ValueError, match="scale='big' is not one of"):
        case.build(3, scale="big")


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize("name", mtljax.METHODS)
def test_losses_that_a_method_reads_are_checked(name):
    balancer = mtljax.get_method(name).build(3, key=jax.random.key(0))
    grads = {"w": jnp.eye(3)}
    state = balancer.init({"w": jnp.zeros(3)})
    if balancer.reads_losses:
        with pytest.raises(ValueError, match=f"{name} reads the task losses"):
            balancer.update(grads, state)
        with pytest.raises(ValueError, match=r"shape \(2,\); it must be \(3,\)"):
            balancer.update(grads, state, losses=jnp.ones(2))
    if balancer.positive_losses:
        outside = jnp.array([1.0, -1.0, 1.0])
        update, same = balancer.update(grads, state, losses=outside)
        assert np.isnan(update["w"]).all()
        chex.assert_trees_all_equal(same, state)
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        balancer.update(grads, state, losses=jnp.ones(3), mask=jnp.ones(2))
