"""The whole step is its parts put together, and costs what it says."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients.problem import LABELS, batch, close, params, task_losses

import mtljax
from mtljax.sharpness import (
    Ball,
    SamSchedule,
    flat_gramians,
    flat_split,
    merge_own,
    sam_task_grads,
    surrogate_sharpness,
    value_and_flat_grad,
)

KEY = jax.random.key(0)
PARAMS = params()
BATCHES = [batch(seed) for seed in range(4)]
ALL, SOME = jnp.ones(3, bool), jnp.array([True, False, True])
SHARED = mtljax.shared_params(PARAMS, LABELS)


@functools.cache
def built(name):
    return mtljax.get_method(name).build(3, key=KEY)


@functools.cache
def stepper(name="imtl_g", rho=0.1, **options):
    """The function under test and its compiled form."""
    if options.get("perturb") == "samo":
        options["key"] = KEY
    function = value_and_flat_grad(
        task_losses, built(name), rho=rho, labels=LABELS, **options
    )
    return function, jax.jit(function)


@functools.cache
def by_hand(name="imtl_g", mode="split", **options):
    balancer = flat_split(built(name), mode)

    @jax.jit
    def run(state, data, mask, key, active):
        function = sam_task_grads(task_losses, rho=0.1, labels=LABELS, **options)
        losses, grads, own = function(
            PARAMS, data, mask=mask, sam_key=key, sam_active=active
        )
        update, state = balancer.update(grads, state, losses=losses, mask=mask)
        return losses, merge_own(update, own), state, grads

    return balancer, run


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cagrad", {}),
        ("pcgrad", {"mode": "direct"}),
        ("famo", {"mode": "split"}),
        ("mgda", {"mode": "each"}),
    ],
)
@pytest.mark.deep  # by default the schedules below compare with the same parts
def test_it_is_its_parts(name, options):
    function, run = stepper(name, **options)
    balancer, parts = by_hand(name, options.get("mode", "split"))
    state, expected_state = function.init(PARAMS), balancer.init(SHARED)
    for data, mask in zip(BATCHES, (ALL, SOME, ALL), strict=False):
        losses, grad, state = run(PARAMS, state, data, mask=mask)
        want, expected, expected_state, _ = parts(expected_state, data, mask, KEY, True)
        np.testing.assert_allclose(losses, want, rtol=1e-5)
        close(grad, expected, 1e-4)
        weights = state.balancer.loss.task_weights
        np.testing.assert_allclose(
            weights, expected_state.loss.task_weights, rtol=1e-3, atol=1e-4
        )
    assert state.step == 3


def test_losses_by_name():
    names = ("c", "a", "b")

    def named(params, data):
        found = dict(zip(names, task_losses(params, data), strict=True))
        return {name: found[name] for name in sorted(names)}

    balancer = mtljax.imtl_g(names)
    function = value_and_flat_grad(named, balancer, rho=0.1, labels=LABELS)
    mask = dict(zip(names, SOME.tolist(), strict=True))
    plain, run = stepper()
    state, data = plain.init(PARAMS), BATCHES[0]
    expected = run(PARAMS, state, data, mask=SOME)
    losses, grad, new = jax.jit(lambda *args: function(*args, mask=mask))(
        PARAMS, function.init(PARAMS), data
    )
    assert set(losses) == set(names)
    np.testing.assert_allclose([losses[n] for n in names], expected[0], rtol=1e-6)
    close((grad, new), expected[1:])
    losses, gaps = surrogate_sharpness(named, [0.1], labels=LABELS)(PARAMS, data)
    _, wanted = surrogate_sharpness(task_losses, [0.1], labels=LABELS)(PARAMS, data)
    order = [names.index(name) for name in losses]
    np.testing.assert_allclose(gaps, wanted[:, order], rtol=1e-4)
    losses, grads, _ = sam_task_grads(named, rho=0.1, labels=LABELS)(PARAMS, data)
    assert list(losses) == sorted(names)
    assert grads.loss["trunk"]["bias"].shape == (3, 6)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("linear", "split"),
        pytest.param("pcgrad", "split", marks=pytest.mark.deep),
        pytest.param("nash_mtl", "split", marks=pytest.mark.deep),
        pytest.param("mgda", "each", marks=pytest.mark.deep),
    ],
)
def test_a_radius_of_zero_is_the_base_method_to_the_bit(name, mode):
    function, run = stepper(name, rho=0.0, mode=mode)
    base = jax.jit(
        mtljax.value_and_balanced_grad(task_losses, built(name), labels=LABELS)
    )
    state, expected_state = function.init(PARAMS), built(name).init(SHARED)
    for data, mask in zip(BATCHES[:2], (ALL, SOME), strict=True):
        losses, grad, state = run(PARAMS, state, data, mask=mask)
        want, expected, expected_state = base(PARAMS, expected_state, data, mask=mask)
        np.testing.assert_array_equal(losses, want)
        chex.assert_trees_all_equal(grad, expected)
        chex.assert_trees_all_equal(state.balancer.loss, expected_state)


@pytest.mark.deep
def test_samo_draws_anew_in_every_step():
    function, run = stepper("mgda", mode="direct", perturb="samo")
    _, parts = by_hand("mgda", "direct", perturb="samo", split=False)
    state = function.init(PARAMS)
    seen = []
    for _ in range(2):
        draw = jax.random.split(state.key)[1]
        _, grad, new = run(PARAMS, state, BATCHES[0], mask=ALL)
        expected = parts(state.balancer, BATCHES[0], ALL, draw, True)[1]
        close(grad, expected, 1e-4)
        seen.append(grad["trunk"]["bias"])
        state = new
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


METHODS = [
    pytest.param(name, marks=[] if name in ("moco", "pcgrad") else pytest.mark.deep)
    for name in mtljax.METHODS
]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_step_that_a_scan_can_carry(name):
    """Traced only: shapes and dtypes of gradient and state, with labels and masks."""
    for mode in ("split", "direct"):
        function = value_and_flat_grad(
            task_losses, built(name), rho=0.1, mode=mode, labels=LABELS, strategy="map"
        )
        state = function.init(PARAMS)
        _, grad, new = jax.eval_shape(
            lambda s, f=function: f(PARAMS, s, BATCHES[0], mask=SOME), state
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(grad, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


# --- when ---------------------------------------------------------------------------


def plain_and_sam():
    balancer, parts = by_hand()

    def run(data, active):
        return parts(balancer.init(SHARED), data, ALL, KEY, active)

    return run


def test_sam_in_some_steps_only():
    """Every second step from the first on: 1, 3, 5, ..."""
    function, run = stepper("imtl_g", schedule=SamSchedule(2, 1))
    state, reference = function.init(PARAMS), plain_and_sam()
    for step in range(4):
        _, grad, state = run(PARAMS, state, BATCHES[step], mask=ALL)
        close(grad, reference(BATCHES[step], step in (1, 3))[1], 1e-4)
    # One program for all, which chooses at run time.
    assert "cond[" in str(jax.make_jaxpr(function)(PARAMS, state, BATCHES[0]))


@pytest.mark.deep
def test_flat_parts_are_used_again_in_between():
    function, run = stepper("imtl_g", schedule=SamSchedule(2, 1, "reuse"))
    state, reference = function.init(PARAMS), plain_and_sam()
    balancer = flat_split(built("imtl_g"))
    kept = None
    for step in range(4):
        data = BATCHES[step]
        _, grad, state = run(PARAMS, state, data, mask=ALL)
        _, expected, _, grads = reference(data, step in (1, 3))
        if step == 2:
            _, plain, _, grads = reference(data, False)
            update, _ = balancer.update(
                grads._replace(flat=kept[0]), balancer.init(SHARED)
            )
            own = jax.tree.map(jnp.add, plain["heads"], kept[1])
            close(grad["trunk"], update["trunk"], 1e-4)
            close(grad["heads"], own, 1e-4)
        else:
            close(grad, expected, 1e-4)
        if step == 1:
            plain = reference(data, False)[1]
            kept = (
                grads.flat,
                jax.tree.map(jnp.subtract, expected["heads"], plain["heads"]),
            )
            close(state.kept.own["heads"], kept[1], 1e-3)
    assert jax.tree.leaves(state.kept.shared["heads"]) == []


@pytest.mark.deep
def test_a_task_absent_from_the_step_with_sam_keeps_its_flat_part():
    function, run = stepper("imtl_g", schedule=SamSchedule(2, between="reuse"))
    state = function.init(PARAMS)
    kept = []
    for step, mask in enumerate([ALL, ALL, SOME, ALL]):
        _, _, state = run(PARAMS, state, BATCHES[step], mask=mask)
        kept.append(state.kept.shared["trunk"]["kernel"])
    np.testing.assert_array_equal(kept[2][1], kept[0][1])
    assert np.abs(kept[2][0] - kept[0][0]).max() > 1e-5


def test_one_program_in_a_scan_with_adam():
    function = value_and_flat_grad(
        task_losses,
        built("imtl_g"),
        rho=0.1,
        labels=LABELS,
        schedule=SamSchedule(2),
        gramians=True,
    )
    counted = chex.assert_max_traces(function.__call__, n=1)
    opt = optax.adam(1e-2)

    @jax.jit
    def step(carry, data):
        values, opt_state, state = carry
        losses, grad, state = counted(values, state, data)
        updates, opt_state = opt.update(grad, opt_state, values)
        return (optax.apply_updates(values, updates), opt_state, state), losses

    carry = PARAMS, opt.init(PARAMS), function.init(PARAMS)
    first = step(carry, BATCHES[0])[1].sum()
    for _ in range(31):
        carry, losses = step(carry, BATCHES[0])
    assert losses.sum() < 0.8 * first
    products = carry[2].gramians
    assert (products.loss.diagonal() > 0).all()
    # The last was step 30, which had SAM: its flat part is not zero.
    assert (products.flat.diagonal() > 0).all()


# --- what it costs ------------------------------------------------------------------


def forward_passes(balancer, **options):
    calls = []

    def counted(p, data):
        calls.append(0)
        return task_losses(p, data)

    function = value_and_flat_grad(counted, balancer, labels=LABELS, **options)
    jax.eval_shape(function, PARAMS, function.init(PARAMS), BATCHES[0])
    return len(calls)


def test_forward_passes():
    one = {"rho": 0.1, "mode": "direct", "perturb": "global"}
    assert forward_passes(built("mgda"), rho=0.1) == 1 + 3
    assert forward_passes(built("mgda"), **one) == 2
    assert forward_passes(built("linear"), **one) == 2


@pytest.mark.deep
def test_one_weighted_pass_where_the_losses_are_all_it_reads():
    """SAM of the mean loss, for RLW too: two forward and two backward passes."""
    options = {"rho": Ball(0.1, norm="joint"), "mode": "direct", "perturb": "global"}
    function, run = stepper("linear", **options)
    data = BATCHES[0]
    for mask in (ALL, SOME):
        _, grad, _ = run(PARAMS, function.init(PARAMS), data, mask=mask)
        weights = mask / mask.sum()

        def mean(p, weights=weights):
            return task_losses(p, data) @ weights

        g = jax.grad(mean)(PARAMS)
        scale = 0.1 / optax.tree.norm(g)
        there = jax.tree.map(lambda w, x, s=scale: w + s * x, PARAMS, g)
        number = mask.sum()
        expected = jax.tree.map(lambda x, n=number: n * x, jax.grad(mean)(there))
        close(grad, expected, 1e-4)


@pytest.mark.deep
def test_gramians_are_those_of_the_parts():
    function, run = stepper("mgda", mode="direct", gramians=True)
    _, parts = by_hand("mgda", "direct")
    _, grad, state = run(PARAMS, function.init(PARAMS), BATCHES[0], mask=ALL)
    _, expected, _, grads = parts(state.balancer, BATCHES[0], ALL, KEY, True)
    chex.assert_trees_all_close(state.gramians, flat_gramians(grads), rtol=1e-3)
    close(grad, expected, 1e-4)


@pytest.mark.deep
def test_aux_is_that_of_the_first_pass_and_losses_need_no_labels():
    def with_aux(p, data):
        losses = task_losses(p, data)
        return losses, losses.sum()

    function = value_and_flat_grad(with_aux, built("linear"), rho=0.3, has_aux=True)
    (losses, aux), grad, _ = jax.jit(function)(
        PARAMS, function.init(PARAMS), BATCHES[0]
    )
    np.testing.assert_allclose(aux, task_losses(PARAMS, BATCHES[0]).sum(), rtol=1e-5)
    np.testing.assert_allclose(losses.sum(), aux, rtol=1e-5)
    chex.assert_trees_all_equal_shapes(grad, PARAMS)


def test_observe_finds_the_balancer_in_the_state():
    function, run = stepper("famo", rho=0.0)
    after = jnp.array([0.5, 1.0, 2.0])

    @jax.jit
    def look(state):
        whole = mtljax.observe(function.balancer, state, losses=after)
        return whole, mtljax.observe(built("famo"), state, losses=after)

    _, _, state = run(PARAMS, function.init(PARAMS), BATCHES[0], mask=ALL)
    seen, by_inner = look(state)
    assert np.abs(seen.balancer.loss.logits - state.balancer.loss.logits).max() > 1e-4
    chex.assert_trees_all_close(seen, by_inner)


# --- errors -------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1}, "value_and_flat_grad: rho must be a finite number >= 0"),
        ({"schedule": lambda: SamSchedule(0)}, "every must be an integer >= 1, not 0"),
        (
            {"schedule": lambda: SamSchedule(True)},
            "every must be an integer >= 1, not T",
        ),
        ({"schedule": lambda: SamSchedule(start=-1)}, "start must be an integer >= 0"),
        (
            {"schedule": lambda: SamSchedule(between="again")},
            "between='again' is not one of 'plain', 'reuse'",
        ),
        ({"schedule": lambda: SamSchedule(between="reuse")}, "every=1 leaves none"),
        ({"perturb": "samo"}, "draws random directions; pass key="),
        ({"mode": "twice"}, "mode='twice' is not one of 'split'"),
    ],
)
def test_bad_options(options, message):
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(ValueError, match=message):
        value_and_flat_grad(task_losses, built("mgda"), **{"rho": 0.1, **options})


@pytest.mark.usefixtures("as_users")
def test_bad_inputs():
    function = value_and_flat_grad(task_losses, mtljax.mgda(2), rho=0.1)
    with pytest.raises(ValueError, match="returns 3 losses, but mgda was built with"):
        function(PARAMS, function.init(PARAMS), BATCHES[0])
    chain = optax.chain(built("mgda"), optax.scale(2.0))
    with pytest.raises(ValueError, match="which knows T"):
        value_and_flat_grad(task_losses, chain, rho=0.1, gramians=True)
