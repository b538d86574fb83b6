"""Two passes per task, against float64, closed forms and plain SAM."""

import collections
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients.problem import LABELS, params, task_losses
from sharpness import reference
from sharpness.reference import BATCH, PARAMS

import mtljax
from mtljax.sharpness import Ball, SamGrads, Samo, merge_own, sam_task_grads

KEY = jax.random.key(0)
TRACES = collections.Counter()


@functools.cache
def jitted(rho=0.1, labels=True, **options):
    """One compiled program for equal options."""
    function = sam_task_grads(
        task_losses, rho=rho, labels=LABELS if labels else None, **options
    )

    def counted(*args, **kwargs):
        TRACES[rho, labels, *options.items()] += 1
        return function(*args, **kwargs)

    return jax.jit(counted)


@functools.cache
def value_and_task_grads():
    return jax.jit(mtljax.value_and_task_grads(task_losses, labels=LABELS))


VARIANTS = {
    "separate": ({"rho": 0.1}, {}),
    "two radii": ({"rho": 0.1, "rho_own": 0.4}, {}),
    "joint": ({"rho": 0.3, "norm": "joint"}, {"joint": True}),
    "adaptive": ({"rho": 0.5, "adaptive": True}, {"adaptive": True}),
    "adaptive, joint": (
        {"rho": 0.5, "norm": "joint", "adaptive": True},
        {"adaptive": True, "joint": True},
    ),
}
STRATEGIES = ["unrolled", "vmap", "map", 2]
USUAL = [("two radii", "unrolled"), ("adaptive, joint", 2)]
PAIRS = [
    pytest.param(
        variant,
        strategy,
        marks=[] if (variant, strategy) in USUAL else pytest.mark.deep,
    )
    for variant, strategy in itertools.product(VARIANTS, STRATEGIES)
]


@pytest.mark.parametrize(("variant", "strategy"), PAIRS)
def test_against_float64(variant, strategy):
    options, theirs = VARIANTS[variant]
    losses, grads, own = jitted(Ball(**options), strategy=strategy)(PARAMS, BATCH)
    radii = {k: v for k, v in options.items() if k.startswith("rho")}
    expected = reference.sam(**radii, **theirs)
    reference.close(grads, own, expected)
    np.testing.assert_allclose(losses, task_losses(PARAMS, BATCH), rtol=1e-5)
    assert jax.tree.leaves(grads.loss["heads"]) == []
    assert jax.tree.leaves(own["trunk"]) == []


@pytest.mark.deep
def test_without_split_the_rows_are_sam_gradients():
    _, both, own = jitted()(PARAMS, BATCH)
    _, one, same = jitted(split=False)(PARAMS, BATCH)
    assert one.flat is None
    total = jax.tree.map(jnp.add, both.loss, both.flat)
    chex.assert_trees_all_close(one.loss, total, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(own, same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["map", pytest.param(2, marks=pytest.mark.deep)])
def test_an_absent_task_has_no_rows_and_moves_nothing(strategy):
    """Its loss may be NaN; the others are as if it were not there."""

    def broken(p, data):
        return task_losses(p, data) + jnp.array([0, jnp.nan, 0])

    mask = jnp.array([True, False, True])
    function = sam_task_grads(broken, rho=0.1, labels=LABELS, strategy=strategy)
    losses, grads, own = jax.jit(function)(PARAMS, BATCH, mask=mask)
    assert np.isnan(losses[1])
    expected = reference.sam(0.1)
    for name in ("g", "h"):
        expected[1][name] = [np.zeros_like(x) for x in expected[1][name]]
    expected[1]["own"] = [np.zeros_like(x) for x in expected[1]["own"]]
    reference.close(grads, own, expected)
    for leaf in jax.tree.leaves(grads):
        assert (leaf[1] == 0).all()


def test_permuting_the_tasks_permutes_the_rows():
    order = np.array([2, 0, 1])
    shuffled = {"trunk": PARAMS["trunk"], "heads": [PARAMS["heads"][i] for i in order]}
    _, grads, own = jitted()(PARAMS, BATCH)
    _, moved, moved_own = jitted()(shuffled, (BATCH[0], BATCH[1][order]))
    chex.assert_trees_all_close(
        moved, jax.tree.map(lambda x: x[order], grads), rtol=1e-4, atol=1e-5
    )
    for i, head in zip(order, moved_own["heads"], strict=True):
        chex.assert_trees_all_close(head, own["heads"][i], rtol=1e-4, atol=1e-5)


# --- closed forms -------------------------------------------------------------------

RNG = np.random.default_rng(3)
ROOTS = RNG.normal(size=(3, 5, 5))
HESSIANS = ROOTS + ROOTS.transpose(0, 2, 1)  # indefinite
CENTRES = RNG.normal(size=(3, 5))
POINT = RNG.normal(size=5)


def quadratics(x):
    away = x[None] - jnp.asarray(CENTRES, jnp.float32)
    curved = jnp.asarray(HESSIANS, jnp.float32)
    return 0.5 * jnp.einsum("ti,tij,tj->t", away, curved, away)


@pytest.mark.parametrize(("rho", "adaptive"), [(0.01, False), (1.0, True)])
def test_on_quadratics_the_flat_part_is_the_hessian_times_the_step(rho, adaptive):
    function = sam_task_grads(quadratics, rho=Ball(rho, adaptive=adaptive))
    _, grads, own = jax.jit(function)(jnp.asarray(POINT, jnp.float32))
    for task in range(3):
        g = HESSIANS[task] @ (POINT - CENTRES[task])
        (eps,) = reference.ascent([g], [POINT], rho, adaptive=adaptive)
        flat = HESSIANS[task] @ eps
        np.testing.assert_allclose(grads.loss[task], g, rtol=1e-4, atol=1e-4)
        scale = np.abs(g).max()  # h is a difference of numbers of this size
        np.testing.assert_allclose(grads.flat[task], flat, atol=3e-6 * scale)
    assert jax.tree.leaves(own) == []


def test_one_task_is_sam_as_optax_has_it():
    """Five steps beside optax.contrib.sam, in which every second call is a step."""

    def task_losses(p):
        return (jnp.sin(p["a"]) @ p["b"] + jnp.square(p["a"]).sum())[None]

    start = {"a": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array([1.0, 0.3, -0.7])}
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    theirs = optax.contrib.sam(optax.sgd(0.05), ascent, sync_period=2)
    state, want = theirs.init(start), start
    got = start
    grad = jax.jit(jax.grad(lambda p: task_losses(p)[0]))
    function = jax.jit(sam_task_grads(task_losses, rho=0.1))
    for _ in range(5):
        for _ in range(2):
            updates, state = theirs.update(grad(want), state, want)
            want = optax.apply_updates(want, updates)
        _, grads, _ = function(got)
        step = jax.tree.map(lambda g, h: -0.05 * (g + h)[0], *grads)
        got = optax.apply_updates(got, step)
        chex.assert_trees_all_close(got, want, rtol=1e-5)


# --- no ball ------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["local", "samo"])
def test_a_radius_of_zero_is_no_second_pass(perturb):
    calls = []

    def counted(p, data):
        calls.append(0)
        return task_losses(p, data)

    function = sam_task_grads(counted, rho=0.0, labels=LABELS, perturb=perturb)
    losses, grads, own = jax.jit(function)(PARAMS, BATCH, sam_key=KEY)
    assert len(calls) == 1
    expected_losses, expected = value_and_task_grads()(PARAMS, BATCH)
    np.testing.assert_array_equal(losses, expected_losses)
    chex.assert_trees_all_equal(merge_own(grads.loss, own), expected)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads.flat))


@pytest.mark.deep
def test_a_traced_radius_of_zero_gives_exactly_zero_flat_parts():
    @jax.jit
    @jax.vmap
    def run(rho):
        return sam_task_grads(task_losses, rho=rho, labels=LABELS)(PARAMS, BATCH)

    _, grads, own = run(jnp.array([0.0, 0.1]))
    first = jax.tree.map(lambda x: x[0], (grads, own))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(first[0].flat))
    second = jax.tree.map(lambda x: x[1], (grads, own))
    reference.close(second[0], second[1], reference.sam(0.1))


def test_a_task_at_its_minimum_is_left_alone():
    def task_losses(x):
        return jnp.stack([jnp.square(x).sum(), jnp.square(x - 1).sum() ** 2])

    _, grads, _ = sam_task_grads(task_losses, rho=0.1)(jnp.zeros(3))
    assert (grads.loss[0] == 0).all()
    assert (grads.flat[0] == 0).all()
    assert np.isfinite(grads.flat).all()
    assert np.abs(grads.flat[1]).min() > 0


@pytest.mark.parametrize(
    "strategy", ["vmap", pytest.param("unrolled", marks=pytest.mark.deep)]
)
def test_a_flag_leaves_the_second_pass_out(strategy):
    plain = value_and_task_grads()

    @jax.jit
    def flagged(active):
        function = sam_task_grads(
            task_losses, rho=0.1, labels=LABELS, strategy=strategy
        )
        return function(PARAMS, BATCH, sam_active=active)

    losses, grads, own = flagged(True)
    reference.close(grads, own, reference.sam(0.1))
    losses, grads, own = flagged(False)
    expected_losses, expected = plain(PARAMS, BATCH)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    whole = merge_own(grads.loss, own)
    chex.assert_trees_all_close(whole, expected, rtol=1e-5, atol=1e-6)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads.flat))
    assert "cond" in str(jax.make_jaxpr(flagged)(True))


# --- what both passes see -----------------------------------------------------------


def with_norm(p, stats, x):
    """A network with batch normalisation: batch statistics inside, averages in aux."""
    h = x @ p["trunk"]["kernel"] + p["trunk"]["bias"][None]
    mean, var = h.mean(0), h.var(0)
    h = jnp.tanh((h - mean[None]) / jnp.sqrt(var[None] + 1e-5))
    losses = jnp.stack([jnp.mean((h @ q["kernel"] - 1) ** 2) for q in p["heads"]])
    return losses, {
        "mean": 0.9 * stats["mean"] + 0.1 * mean,
        "calls": stats["calls"] + 1,
    }


@pytest.mark.deep
def test_running_averages_are_those_of_the_first_pass():
    stats = {"mean": jnp.zeros(6), "calls": jnp.zeros(())}
    function = sam_task_grads(with_norm, rho=0.5, labels=LABELS, has_aux=True)
    (losses, aux), grads, _ = jax.jit(function)(PARAMS, stats, BATCH[0])
    expected_losses, expected = with_norm(PARAMS, stats, BATCH[0])
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(aux, expected, rtol=1e-5)
    assert aux["calls"] == 1
    # The second pass normalised by its own batch: reference without the averages.
    want = reference.sam(0.5, function=normed_losses, data=BATCH[0])
    for leaf, i in zip(jax.tree.leaves(grads.flat["trunk"]), (0, 1), strict=True):
        expected_rows = np.stack([task["h"][i] for task in want])
        scale = np.abs(want[0]["h"][1]).max()
        np.testing.assert_allclose(leaf, expected_rows, atol=1e-4 * scale)


def normed_losses(p, x):
    return with_norm(p, {"mean": 0.0, "calls": 0}, x)[0]


def test_both_passes_drop_the_same_units_and_aux_is_that_of_the_first():
    """With another mask in the second pass h would not shrink with the radius."""

    def dropped(x, key):
        keep = jax.random.bernoulli(key, 0.5, (5,))
        losses = quadratics(jnp.where(keep, x, 0))
        return losses, {"x": x, "keep": keep}

    @jax.jit
    @jax.vmap
    def run(rho):
        function = sam_task_grads(dropped, rho=rho, has_aux=True)
        return function(point, KEY)

    point = jnp.asarray(POINT, jnp.float32)
    (_, aux), grads, _ = run(jnp.array([1e-2, 1e-1]))
    sizes = jnp.linalg.norm(grads.flat, axis=(1, 2))
    np.testing.assert_allclose(sizes[1] / sizes[0], 10, rtol=1e-2)
    assert 0 < aux["keep"][0].sum() < 5
    np.testing.assert_array_equal(aux["x"], np.stack([point, point]))


@pytest.mark.deep
def test_the_difference_is_taken_in_float32():
    """Parameters and gradients in half precision, the flat part not."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, BATCH))
    losses, grads, own = jitted(rho=0.5)(*half)
    assert losses.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(grads.loss)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(grads.flat)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype("bfloat16")}
    expected = reference.sam(0.5)
    want = np.stack([task["h"][1] for task in expected])
    # Rounding of the two gradients, no more.
    size = max(np.abs(task["g"][1]).max() for task in expected)
    got = grads.flat["trunk"]["kernel"]
    assert np.abs(got - want).max() < 0.1 * size
    # Not a multiple of the spacing of bfloat16 at the size of h.
    assert (got != got.astype(jnp.bfloat16).astype(jnp.float32)).any()


# --- one point for all tasks, and SAMO ----------------------------------------------


@functools.cache
def point_rows():
    """Jacobian and reference directions at the start."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    return wide, reference.jacobian64(task_losses, wide, BATCH)


def moved(wide, eps, deltas):
    trunk = jax.tree.map(lambda w, e: w + e, wide["trunk"], eps)
    heads = [
        {"kernel": h["kernel"] + d} for h, d in zip(wide["heads"], deltas, strict=True)
    ]
    return {"trunk": trunk, "heads": heads}


@pytest.mark.parametrize(
    "norm", ["separate", pytest.param("joint", marks=pytest.mark.deep)]
)
def test_one_step_along_the_mean_gradient(norm):
    run = jitted(Ball(0.2, norm=norm), perturb="global")
    _, grads, own = run(PARAMS, BATCH)
    wide, rows = point_rows()
    mean = jax.tree.map(lambda g: g.mean(0), rows["trunk"])
    qs = [rows["heads"][i]["kernel"][i] for i in range(3)]
    size = reference.norm(jax.tree.leaves(mean))
    if norm == "joint":
        qs = [q / 3 for q in qs]
        size = reference.norm([*jax.tree.leaves(mean), *qs])
        deltas = [0.2 * q / size for q in qs]
    else:
        deltas = [0.2 * q / np.linalg.norm(q) for q in qs]
    eps = jax.tree.map(lambda g: 0.2 * g / size, mean)
    again = reference.jacobian64(task_losses, moved(wide, eps, deltas), BATCH)
    flat = jax.tree.map(lambda a, b: a - b, again["trunk"], rows["trunk"])
    chex.assert_trees_all_close(grads.flat["trunk"], flat, rtol=1e-3, atol=1e-4)
    for i, head in enumerate(own["heads"]):
        want = again["heads"][i]["kernel"][i]
        np.testing.assert_allclose(head["kernel"], want, rtol=1e-4, atol=1e-5)


@pytest.mark.deep
@pytest.mark.parametrize("norm", ["separate", "joint"])
def test_without_split_one_point_is_enough(norm):
    options = {"rho": Ball(0.2, norm=norm), "perturb": "global"}
    _, both, own = jitted(**options)(PARAMS, BATCH)
    _, one, same = jitted(**options, split=False)(PARAMS, BATCH)
    total = jax.tree.map(jnp.add, both.loss, both.flat)
    chex.assert_trees_all_close(one.loss, total, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(own, same, rtol=1e-5, atol=1e-6)


def test_samo_leans_on_the_sign_of_an_exact_derivative():
    run = jitted(rho=0.2, perturb=Samo(0.3))
    _, grads, own = run(PARAMS, BATCH, sam_key=KEY)
    wide, rows = point_rows()
    leaves, treedef = jax.tree.flatten(wide["trunk"])
    # Drawn as the library draws: the derivative and all that follows are our own.
    noise = [
        np.asarray(jax.random.normal(jax.random.fold_in(KEY, i), x.shape), np.float64)
        for i, x in enumerate(leaves)
    ]
    jac = jax.tree.leaves(rows["trunk"])
    signs = set()
    for task in range(3):
        slope = sum((g[task] * z).sum() for g, z in zip(jac, noise, strict=True))
        signs.add(np.sign(slope))
        mean = [g.mean(0) for g in jac]
        lean = [
            0.3 * m + 0.7 * np.sign(slope) * z * np.linalg.norm(m) / np.linalg.norm(z)
            for m, z in zip(mean, noise, strict=True)
        ]
        eps = [0.2 * u / reference.norm(lean) for u in lean]
        q = rows["heads"][task]["kernel"][task]
        deltas = [np.zeros(6)] * 3
        deltas[task] = 0.2 * q / np.linalg.norm(q)
        point = moved(wide, jax.tree.unflatten(treedef, eps), deltas)
        again = reference.jacobian64(task_losses, point, BATCH)
        for got, sam, g in zip(
            jax.tree.leaves(grads.flat["trunk"]),
            jax.tree.leaves(again["trunk"]),
            jac,
            strict=True,
        ):
            np.testing.assert_allclose(got[task], sam[task] - g[task], atol=2e-4)
        want = again["heads"][task]["kernel"][task]
        np.testing.assert_allclose(own["heads"][task]["kernel"], want, atol=1e-4)
    assert len(signs) == 2  # or the test would not see them


@pytest.mark.deep
def test_spsa_takes_finite_differences_with_noise_of_its_own_for_every_task():
    """With one task and the same z it is the exact form, but for the sign's error."""

    def one(p, data):
        return task_losses(p, data)[:1]

    calls = []

    def counted(p, data):
        calls.append(0)
        return task_losses(p, data)

    spsa = Samo(0.3, compat="spsa")
    exact = sam_task_grads(one, rho=0.2, perturb=Samo(0.3))
    sampled = sam_task_grads(one, rho=0.2, perturb=spsa)
    key = jax.random.fold_in(KEY, 0)  # the key of task 0
    want = jax.jit(exact)(PARAMS, BATCH, sam_key=key)
    got = jax.jit(sampled)(PARAMS, BATCH, sam_key=KEY)
    chex.assert_trees_all_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    function = sam_task_grads(counted, rho=0.2, perturb=spsa)
    jax.eval_shape(function, PARAMS, BATCH, sam_key=KEY)
    assert len(calls) == 1 + 3 * 2 + 3  # first pass, 2 T differences, T second passes


# --- cost ---------------------------------------------------------------------------


def evaluations(perturb, strategy="unrolled", split=True):
    """Calls of the losses while tracing: forward passes of the program."""
    calls = []

    def counted(p, data):
        calls.append(0)
        return task_losses(p, data)

    function = sam_task_grads(
        counted,
        rho=0.1,
        labels=LABELS,
        perturb=perturb,
        strategy=strategy,
        split=split,
    )
    jax.eval_shape(function, PARAMS, BATCH, sam_key=KEY)
    return len(calls)


def test_forward_passes():
    assert evaluations("local") == 1 + 3
    assert evaluations("local", "vmap") == 1 + 1
    assert evaluations("global") == 2
    assert evaluations("samo") == 1 + 1 + 3


@pytest.mark.deep
def test_gradient_evaluations_in_floating_point_operations():
    """Counted in the compiled program, in units of a plain forward and backward."""
    size = 128
    wide = {
        "trunk": {"kernel": jnp.ones((size, size)), "bias": jnp.ones(size)},
        "heads": [{"kernel": jnp.ones(size)} for _ in range(3)],
    }
    deep = {"first": jnp.ones((size, size)), **wide}
    labels = {"first": "shared", **LABELS}
    data = jnp.ones((64, size)), jnp.ones((3, 64))

    def losses(p, batch):
        return task_losses(p, (jnp.tanh(batch[0] @ p["first"]), batch[1]))

    def flops(function, *args, **kwargs):
        lowered = jax.jit(function).lower(*args, **kwargs)
        return lowered.compile().cost_analysis()["flops"]

    forward = flops(losses, deep, data)
    both = flops(jax.value_and_grad(lambda p, b: losses(p, b).sum()), deep, data)
    backward = both - forward

    def cost(**options):
        function = sam_task_grads(
            losses, rho=0.1, labels=labels, strategy="unrolled", **options
        )
        return flops(function, deep, data, sam_key=KEY)

    def passes(forwards, backwards):
        return forwards * forward + backwards * backward

    assert cost() == pytest.approx(passes(4, 6), rel=0.1)
    assert cost(perturb="global") == pytest.approx(passes(2, 7), rel=0.1)
    direct = cost(perturb="global", split=False)
    assert direct == pytest.approx(passes(2, 4), rel=0.1)


def test_compiles_once():
    for seed in range(3):
        _, grads, _ = jitted()(params(seed), BATCH)
        chex.assert_tree_all_finite(grads)
        traces = traces if seed else TRACES[0.1, True]
    assert TRACES[0.1, True] == traces > 0


# --- own parameters and errors ------------------------------------------------------


def test_merge_own_fills_the_holes():
    _, grads, own = jitted()(PARAMS, BATCH)
    update = jax.tree.map(lambda x: x.sum(0), grads.loss)
    whole = merge_own(update, own)
    chex.assert_trees_all_equal_shapes(whole, PARAMS)
    np.testing.assert_array_equal(
        whole["heads"][2]["kernel"], own["heads"][2]["kernel"]
    )


def test_parts_are_a_pytree():
    grads = SamGrads({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
    assert len(jax.tree.leaves(jax.tree.map(jnp.abs, grads))) == 2


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "sam_task_grads: rho must be a finite number >= 0, not -1.0"),
        ({"rho": float("nan")}, "rho must be a finite number >= 0, not nan"),
        ({"rho": Ball(0.1, -2), "labels": LABELS}, "rho_own must be a finite"),
        ({"rho": 0.1, "perturb": "lokal"}, "perturb='lokal' is not one of 'local'"),
        ({"rho": 0.1, "strategy": "pmap"}, "strategy='pmap' is not one of"),
        ({"rho": 0.1, "perturb": lambda: Samo(1.5)}, "alpha of Samo .* at most 1"),
        ({"rho": 0.1, "perturb": lambda: Samo(step=0.0)}, "step of Samo .* above 0"),
        ({"rho": 0.1, "perturb": lambda: Samo(compat="x")}, "compat='x' is not one of"),
        ({"rho": 0.1, "strategy": 0}, "must be at least 1"),
        (
            {"rho": 0.1, "axis_name": mtljax.gradients.Mapped("d", "scatter")},
            "computed from averaged gradients, so use exchange='all'",
        ),
    ],
)
def test_bad_options(options, message):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        sam_task_grads(task_losses, **options)


@pytest.mark.usefixtures("as_users")
def test_bad_inputs():
    function = sam_task_grads(task_losses, rho=0.1, perturb="samo")
    with pytest.raises(ValueError, match="draws random directions; pass sam_key="):
        function(PARAMS, BATCH)
    for labels, message in (
        ({"trunk": "shared", "heads": "mine"}, "'heads/0/kernel' is labelled 'mine'"),
        (lambda path: "shared", "labels mark no parameter as 'own'"),
        (lambda path: "own", "labels mark no parameter as 'shared'"),
    ):
        with pytest.raises(ValueError, match=message):
            sam_task_grads(task_losses, rho=0.1, labels=labels)(PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"must return a vector of T scalar losses"):
        sam_task_grads(lambda p: p.sum(), rho=0.1)(jnp.ones(2))
    with pytest.raises(ValueError, match="pass has_aux=True"):
        sam_task_grads(lambda p: (p, 0), rho=0.1)(jnp.ones(2))
    with pytest.raises(ValueError, match=r"mask has shape \(2,\)"):
        sam_task_grads(task_losses, rho=0.1)(PARAMS, BATCH, mask=jnp.ones(2))
