"""Set-ups beyond one batch for all tasks, against Jacobians in float64."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from precision import enable_x64

import mtljax

TASKS, EXAMPLES, WIDTH = 4, 8, 6
NAMES = ("seg", "depth", "normal", "edge")
LABELS = {"trunk": "shared", "heads": "own"}
MASK = [True, True, False, True]
SHAPES = [(5, WIDTH), (WIDTH, WIDTH), (WIDTH, TASKS), (EXAMPLES, 5), (EXAMPLES, TASKS)]
SHAPES += [(TASKS, EXAMPLES, 5), (TASKS, EXAMPLES), (TASKS, WIDTH)]


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def problem():
    keys = jax.random.split(jax.random.key(0), 8)
    normal = [
        jax.random.normal(key, shape, jnp.float64)
        for key, shape in zip(
            keys,
            SHAPES,
            strict=True,
        )
    ]
    w, u, heads, x, y, xs, ys, slices = normal
    params = {"trunk": {"w": w, "u": u}, "heads": heads}
    return params, (x, y), (xs, ys), slices


def encode(p, x, y=None):
    return jnp.tanh(jnp.tanh(x @ p["trunk"]["w"]) @ p["trunk"]["u"])


def from_representation(p, z, x, y):
    return ((z @ p["heads"] - y) ** 2).mean(0)


def task_losses(p, x, y):
    return from_representation(p, encode(p, x), x, y)


def named_losses(p, x, y):
    """The same in another order than that of the names."""
    found = dict(zip(NAMES, task_losses(p, x, y), strict=True))
    return {name: found[name] for name in reversed(NAMES)}


def as_mask(mask):
    return None if mask is None else jnp.array(mask)


def run(function, balancer, *, params=None, batch=None, mask=None, **options):
    given, first, _, _ = problem()
    params, batch = given if params is None else params, batch or first
    step = mtljax.value_and_balanced_grad(function, balancer, **options)
    losses, grad, _ = step(params, balancer.init(params), *batch, mask=mask)
    if isinstance(losses, dict):
        losses = jnp.stack([losses[name] for name in losses])
    return losses, grad


def close(found, expected, tolerance=1e-12):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def weighted(rows_of, mask):
    """Weights of MGDA from the Jacobian of a part, by hand."""
    balancer = mtljax.mgda(TASKS)
    params, (x, y), _, _ = problem()
    rows = rows_of(params, x, y)
    flat = np.concatenate(
        [np.asarray(r).reshape(TASKS, -1) for r in jax.tree.leaves(rows)], 1
    )
    weights, _ = balancer.weigh(
        balancer.init(params),
        losses=task_losses(params, x, y),
        gramian=jnp.asarray(flat @ flat.T),
        mask=as_mask(mask),
    )
    jacobian = jax.jacrev(task_losses)(params, x, y)
    present = jnp.ones(TASKS) if mask is None else jnp.array(mask, float)
    grad = {
        "trunk": jax.tree.map(
            lambda r: jnp.tensordot(weights, r, 1), jacobian["trunk"]
        ),
        "heads": jnp.tensordot(present, jacobian["heads"], 1),
    }
    return task_losses(params, x, y), grad


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("micro_batches", [None, 4])
def test_representation_is_mgda_ub(mask, micro_batches):
    def rows_of(params, x, y):
        z = encode(params, x)
        return jax.jacrev(lambda z: from_representation(params, z, x, y))(z)

    found = run(
        mtljax.through(encode, from_representation),
        mtljax.mgda(TASKS),
        mask=as_mask(mask),
        labels=LABELS,
        measure="representation",
        micro_batches=micro_batches,
    )
    close(found, weighted(rows_of, mask))


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("engine", ["auto", "stacked"])
@pytest.mark.parametrize(
    "measure",
    [
        "trunk/u",
        lambda path: path.endswith("u"),
        {"trunk": {"w": False, "u": True}, "heads": False},
    ],
)
def test_weights_from_some_parameters(measure, engine, mask):
    found = run(
        task_losses,
        mtljax.mgda(TASKS),
        mask=as_mask(mask),
        labels=LABELS,
        measure=measure,
        engine=engine,
    )

    def rows_of(params, x, y):
        return jax.jacrev(task_losses)(params, x, y)["trunk"]["u"]

    close(found, weighted(rows_of, mask))


BALANCERS = {
    "losses": mtljax.uncertainty,
    "stacked": mtljax.cagrad,
    "gramian": mtljax.cagrad,
    "coordinates": mtljax.trimmed_mean,
}


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("engine", BALANCERS)
def test_accumulated_equals_the_whole_batch(engine, heads, mask):
    if engine == "coordinates" and heads == "weighted":
        pytest.skip("a method without weights")
    balancer = BALANCERS[engine](TASKS)
    options = {"labels": LABELS, "heads": heads, "mask": as_mask(mask)}
    options["engine"] = "auto" if engine == "coordinates" else engine
    whole = run(task_losses, balancer, **options)
    close(run(task_losses, balancer, micro_batches=8, **options), whole)


def test_accumulated_task_gradients_and_their_auxiliary_outputs():
    params, batch, _, _ = problem()

    def with_aux(p, x, y):
        return task_losses(p, x, y), x.sum()

    options = {"labels": LABELS, "has_aux": True}
    (losses, aux), grads = mtljax.value_and_task_grads(
        with_aux, micro_batches=2, **options
    )(params, *batch)
    (whole, _), expected = mtljax.value_and_task_grads(with_aux, **options)(
        params, *batch
    )
    close((losses, grads), (whole, expected))
    assert aux.shape == (2,)
    np.testing.assert_allclose(aux.sum(), batch[0].sum())


@pytest.mark.parametrize("engine", ["gramian", "stacked", "auto"])
def test_frozen_leaves_are_as_if_they_were_constants(engine):
    params = problem()[0]
    labels = mtljax.label_params(params, own="heads", frozen="trunk/w")
    found = run(task_losses, mtljax.cagrad(TASKS), labels=labels, engine=engine)

    def rest_alone(rest, x, y):
        trunk = {"w": params["trunk"]["w"], "u": rest["u"]}
        return task_losses({"trunk": trunk, "heads": rest["heads"]}, x, y)

    losses, grad = run(
        rest_alone,
        mtljax.cagrad(TASKS),
        params={"u": params["trunk"]["u"], "heads": params["heads"]},
        labels={"u": "shared", "heads": "own"},
        engine="stacked",
    )
    zeros = jnp.zeros_like(params["trunk"]["w"])
    trunk = {"w": zeros, "u": grad["u"]}
    close(found, (losses, {"trunk": trunk, "heads": grad["heads"]}))


@pytest.mark.parametrize("named_mask", [False, True])
@pytest.mark.parametrize("engine", ["gramian", "stacked", "losses"])
def test_names_give_the_same_bits(engine, named_mask):
    method = mtljax.uncertainty if engine == "losses" else mtljax.cagrad
    mask = dict(zip(NAMES, MASK, strict=True)) if named_mask else None
    options = {"labels": LABELS, "engine": engine}
    params, batch, _, _ = problem()
    balancer = method(NAMES)
    step = mtljax.value_and_balanced_grad(named_losses, balancer, **options)
    losses, grad, state = step(params, balancer.init(params), *batch, mask=mask)
    expected, plain, state2 = mtljax.value_and_balanced_grad(
        task_losses, method(TASKS), **options
    )(params, method(TASKS).init(params), *batch, mask=as_mask(mask and MASK))
    assert list(losses) == list(NAMES)
    np.testing.assert_array_equal([losses[name] for name in NAMES], expected)
    jax.tree.map(np.testing.assert_array_equal, (grad, state), (plain, state2))
    weights = mtljax.named(state.task_weights, balancer)
    assert list(weights) == list(NAMES)


@pytest.mark.parametrize("engine", ["gramian", "stacked"])
def test_names_in_the_products_of_two_batches(engine):
    params, (x, y), _, _ = problem()
    batches = (x, y), (x[::-1], 2 * y)
    cross = mtljax.cross_task_gramian(named_losses, labels=LABELS, engine=engine)
    first, second, found = cross(params, *batches)
    plain = mtljax.cross_task_gramian(task_losses, labels=LABELS, engine=engine)
    expected = plain(params, *batches)
    order = list(reversed(NAMES))  # of the dictionary
    for losses, vector in zip((first, second), expected[:2], strict=True):
        assert list(losses) == order
        np.testing.assert_array_equal([losses[name] for name in NAMES], vector)
    np.testing.assert_allclose(found[::-1, ::-1], expected[2], rtol=1e-12)


@pytest.mark.parametrize(
    ("separate", "micro_batches"), [(False, None), (False, 2), (True, None)]
)
def test_names_order_the_stacked_gradients(separate, micro_batches):
    """In a chain, gradients and losses have the order of the balancer's names."""
    parts = {"b": lambda p, x: 10 * (p @ x.T).mean(), "a": lambda p, x: (p @ x.T).sum()}
    joint = lambda p, x: {name: loss(p, x) for name, loss in parts.items()}
    params, x = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)
    balancer = mtljax.linear(("a", "b"), weights=[1.0, 0.0])
    task_losses = mtljax.separate(parts) if separate else joint
    batch = dict.fromkeys(parts, x) if separate else x
    options = {"names": balancer.names, "micro_batches": micro_batches}
    found = mtljax.value_and_task_grads(task_losses, **options)(params, batch)
    losses, grads = jax.jit(lambda: found)()
    update, _ = balancer.update(grads, balancer.init(params), losses=losses)
    step = mtljax.value_and_balanced_grad(
        task_losses, balancer, micro_batches=micro_batches
    )
    _, expected, _ = step(params, balancer.init(params), batch)
    assert list(found[0]) == ["a", "b"]
    np.testing.assert_allclose(update, expected, rtol=1e-12)


def test_wrong_names_are_errors():
    losses = lambda p: {"b": p.sum(), "a": 2 * p.sum()}
    with pytest.raises(ValueError, match=r"tasks are \['a', 'c'\]"):
        mtljax.value_and_task_grads(losses, names=("a", "c"))(jnp.ones(2))
    vector = lambda p: jnp.stack([p.sum(), 2 * p.sum()])
    with pytest.raises(ValueError, match=r"names has 3 entries, but .* returned 2"):
        mtljax.value_and_task_grads(vector, names=("a", "b", "c"))(jnp.ones(2))


def test_names_in_update_and_errors():
    balancer = mtljax.uncertainty(("a", "b"))
    grads = {"w": jnp.ones((2, 3))}
    losses = {"b": jnp.float64(2.0), "a": jnp.float64(1.0)}
    found, _ = balancer.update(grads, balancer.init(grads), losses=losses)
    plain = mtljax.uncertainty(2)
    vector = jnp.array([1.0, 2.0])
    expected, _ = plain.update(grads, plain.init(grads), losses=vector)
    np.testing.assert_array_equal(found["w"], expected["w"])
    assert repr(balancer).startswith("uncertainty(num_tasks=('a', 'b')")
    assert mtljax.smooth_weights(balancer).names == ("a", "b")
    with pytest.raises(ValueError, match=r"tasks are \['a', 'b'\].*names \['a'\]"):
        balancer.update(grads, balancer.init(grads), losses={"a": 1.0})
    with pytest.raises(ValueError, match="the tasks have no names"):
        plain.update(grads, plain.init(grads), losses=losses)
    with pytest.raises(ValueError, match="sequence of distinct names"):
        mtljax.mgda(("a", "a"))
    with pytest.raises(ValueError, match="built without names"):
        mtljax.named(vector, plain)


def one_loss(p, x, y):
    return ((encode(p, x) @ p["heads"] - y) ** 2).mean()


SLICES = {"trunk": None, "heads": 0}


def separate_problem():
    params, _, batches, slices = problem()
    params = {"trunk": params["trunk"], "heads": slices}
    return params, batches, mtljax.separate(one_loss, in_axes=(SLICES, 0, 0))


def all_in_one(p, x, y):
    return jax.vmap(one_loss, (SLICES, 0, 0))(p, x, y)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("heads", ["own", "weighted"])
@pytest.mark.parametrize("method", [mtljax.cagrad, mtljax.uncertainty])
def test_separate_equals_all_in_one(method, heads, mask):
    params, batches, separate = separate_problem()
    options = {"params": params, "batch": batches, "heads": heads}
    options["mask"] = as_mask(mask)
    found = run(separate, method(TASKS), **options)
    close(found, run(all_in_one, method(TASKS), labels=LABELS, **options))


def test_separate_in_the_other_functions():
    params, batches, separate = separate_problem()
    options = {"params": params, "batch": batches}
    found = run(separate, mtljax.trimmed_mean(TASKS), **options)
    expected = run(all_in_one, mtljax.trimmed_mean(TASKS), labels=LABELS, **options)
    close(found, expected)
    for function in (mtljax.value_and_task_grads, mtljax.task_gramian):
        found = function(separate)(params, *batches)
        close(found, function(all_in_one, labels=LABELS)(params, *batches))


def test_separate_losses_of_unequal_shapes():
    base, _, (xs, ys), slices = problem()
    params = {"trunk": base["trunk"], "a": slices[0], "b": slices[1]}
    labels = {"trunk": "shared", "a": "own", "b": "own"}

    def first(p, batch):
        x, y = batch
        return ((encode(p, x) @ p["a"] - y) ** 2).mean(), x.sum()

    def second(p, x):
        return jnp.abs(encode(p, x) @ p["b"]).mean(), x.sum()

    batch = {"b": xs[1][:3], "a": (xs[0], ys[0])}
    separate = mtljax.separate({"a": first, "b": second})

    def together(p, batch):
        return jnp.stack([first(p, batch["a"])[0], second(p, batch["b"])[0]])

    balancer = mtljax.mgda(2)
    options = {"params": params, "batch": (batch,), "labels": labels}
    step = mtljax.value_and_balanced_grad(
        separate, balancer, labels=labels, has_aux=True
    )
    (losses, aux), grad, _ = step(params, balancer.init(params), batch)
    expected, plain = run(together, balancer, **options)
    close(([losses["a"], losses["b"]], grad), (list(expected), plain))
    np.testing.assert_allclose(aux["b"], batch["b"].sum())
    called, aux = separate(params, batch)  # as task_losses, with the names
    assert set(called) == set(aux) == {"a", "b"}
    np.testing.assert_allclose([called["a"], called["b"]], expected, rtol=1e-6)
    np.testing.assert_allclose(aux["a"], xs[0].sum(), rtol=1e-6)
    # A Python boolean: the absent task is not even traced.
    broken = mtljax.separate({"a": first, "b": lambda p, x: 1 / 0})
    step = mtljax.value_and_balanced_grad(broken, balancer, labels=labels, has_aux=True)
    mask = {"a": True, "b": False}
    _, grad, _ = step(params, balancer.init(params), batch, mask=mask)
    masked = run(together, balancer, mask=jnp.array([True, False]), **options)
    close(grad, masked[1])


@pytest.mark.parametrize("shared", [True, False])
def test_separate_accepts_parameters_in_tuples(shared):
    """The update of ``(w, v)`` is that of the same parameters in a dict."""
    head = jnp.ones(3) if shared else jnp.ones((3, 3))
    x = jnp.arange(24.0).reshape(3, 2, 4) / 24
    params = {"v": head, "w": jnp.ones((4, 3))}
    axes = {"v": None if shared else 0, "w": None}

    def loss(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - 1) ** 2)

    def step(function, params, axes):
        balancer = mtljax.linear(3)
        function = mtljax.separate(function, in_axes=(axes, 0))
        step = mtljax.value_and_balanced_grad(function, balancer)
        return step(params, balancer.init(params), x)[1]

    expected = step(loss, params, axes)
    found = step(
        lambda p, x: loss({"v": p[0], "w": p[1]}, x),
        (params["v"], params["w"]),
        (axes["v"], axes["w"]),
    )
    for a, b in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_errors_of_separate():
    params, batches, separate = separate_problem()
    with pytest.raises(ValueError, match="must have an entry for params and for each"):
        mtljax.value_and_task_grads(separate)(params, batches[0])
    with pytest.raises(ValueError, match="dict of losses is empty"):
        mtljax.separate({})
    labels = {"trunk": "own", "heads": "shared"}
    with pytest.raises(ValueError, match="slice per task by in_axes"):
        mtljax.value_and_task_grads(separate, labels=labels)(params, *batches)
    with pytest.raises(ValueError, match=r"micro_batches does not support"):
        mtljax.value_and_task_grads(separate, micro_batches=2)(params, *batches)
    with pytest.raises(ValueError, match=r"measure does not support"):
        mtljax.value_and_balanced_grad(separate, mtljax.mgda(4), measure="trunk")


def test_errors_of_measure_and_micro_batches():
    params, batch, _, _ = problem()
    mgda = mtljax.mgda(TASKS)

    def call(balancer, **options):
        step = mtljax.value_and_balanced_grad(task_losses, balancer, **options)
        return step(params, balancer.init(params), *batch)

    with pytest.raises(ValueError, match="but uncertainty needs the losses"):
        call(mtljax.uncertainty(TASKS), measure="trunk")
    with pytest.raises(ValueError, match=r"needs task_losses=mtljax.through"):
        call(mgda, measure="representation")
    with pytest.raises(ValueError, match="selects no parameter"):
        call(mgda, measure="encoder")
    with pytest.raises(ValueError, match="labelled 'own'"):
        call(mgda, measure="heads", labels=LABELS)
    with pytest.raises(ValueError, match="micro_batches=3 must divide"):
        call(mgda, micro_batches=3)
    swapped = mtljax.through(
        lambda p, x, y: x @ p["trunk"]["w"] + p["heads"].sum(),
        lambda p, z, x, y: z.mean(0)[:TASKS],
    )
    step = mtljax.value_and_balanced_grad(
        swapped, mgda, labels=LABELS, measure="representation"
    )
    with pytest.raises(ValueError, match="encode reads a parameter"):
        step(params, mgda.init(params), *batch)


def train(balancer, engine, masks):
    params, batch, _, _ = problem()
    step = jax.jit(
        mtljax.value_and_balanced_grad(
            task_losses, balancer, labels=LABELS, engine=engine
        )
    )
    state, weights = balancer.init(params), []
    for mask in masks:
        _, grad, state = step(params, state, *batch, mask=mask)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grad)
        weights.append(state.task_weights)
    return np.array(weights), params


def test_reuse_saves_passes_as_the_last_wrapper_only():
    """Inside another wrapper the weights are equal, and no step is cheaper."""

    def losses(params):
        return jnp.stack([jnp.sum(jnp.tanh(k * params) ** 2) for k in (1.0, 2.0)])

    def branches(balancer):
        step = mtljax.value_and_balanced_grad(losses, balancer)
        params = jnp.arange(3.0)
        program = jax.make_jaxpr(step)(params, balancer.init(params)).jaxpr
        return sum(equation.primitive.name == "cond" for equation in program.eqns)

    smooth, inner = mtljax.smooth_weights, mtljax.mgda(2)
    assert branches(mtljax.reuse(smooth(inner), every=2)) == 1
    assert branches(smooth(mtljax.reuse(inner, every=2))) == 0


@pytest.mark.parametrize("engine", ["gramian", "stacked"])
def test_reuse_computes_weights_every_third_step(engine):
    masks = [jnp.ones(TASKS, bool)] * 7
    found, params = train(mtljax.reuse(mtljax.mgda(TASKS), every=3), engine, masks)
    for step in range(7):
        np.testing.assert_array_equal(found[step], found[step - step % 3])
    assert not np.allclose(found[0], found[3])
    # The first three steps by hand.
    fresh, _ = train(mtljax.mgda(TASKS), engine, masks[:1])
    np.testing.assert_allclose(found[0], fresh[0], rtol=1e-6)
    del params


def test_reuse_meets_a_task_that_was_absent():
    everyone = jnp.ones(TASKS, bool)
    masks = [jnp.array(MASK), everyone, jnp.array(MASK)]
    found, _ = train(mtljax.reuse(mtljax.mgda(TASKS), every=5), "gramian", masks)
    assert found[0][2] == 0
    assert found[1][2] != found[0][2]  # computed again
    assert found[2][2] == 0
    np.testing.assert_allclose(found[2].sum(), found[1].sum(), rtol=1e-6)


def test_reuse_skips_a_bad_step_and_computes_again():
    balancer = mtljax.reuse(mtljax.mgda(2), every=2)
    grads = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
    state = balancer.init(grads)
    bad = {"w": grads["w"].at[0, 0].set(jnp.nan)}
    update, same = balancer.update(bad, state)
    assert np.isnan(update["w"]).all()
    jax.tree.map(np.testing.assert_array_equal, state, same)
    assert mtljax.reuse(balancer, every=1) is balancer
    with pytest.raises(ValueError, match="every must be a positive integer"):
        mtljax.reuse(balancer, every=0)
    with pytest.raises(ValueError, match="requires a balancer with task weights"):
        mtljax.reuse(mtljax.trimmed_mean(3), every=2)


def products(jaxpr):
    """Number of matrix products in a program, also in the programs inside it."""
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "dot_general"
        for value in jax.tree.leaves(dict(eqn.params)):
            inner = getattr(value, "jaxpr", value)
            found += products(inner) if hasattr(inner, "eqns") else 0
    return found


def test_a_step_with_reused_weights_is_one_of_constant_weights():
    params, batch, _, _ = problem()

    def traced(balancer):
        step = mtljax.value_and_balanced_grad(task_losses, balancer, labels=LABELS)
        return jax.make_jaxpr(step)(params, balancer.init(params), *batch).jaxpr

    jaxpr = traced(mtljax.reuse(mtljax.mgda(TASKS), every=2))
    (cond,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    reused, computed = cond.params["branches"]
    assert products(reused.jaxpr) == products(traced(mtljax.linear(TASKS)))
    assert products(reused.jaxpr) < products(computed.jaxpr)
    assert products(jaxpr) == products(reused.jaxpr) + products(computed.jaxpr)


def test_reuse_with_names_and_a_mask_of_names():
    params, batch, _, _ = problem()
    balancer = mtljax.reuse(mtljax.mgda(TASKS), every=2)
    # The names are known from the losses only.
    step = mtljax.value_and_balanced_grad(named_losses, balancer, labels=LABELS)
    mask = dict(zip(NAMES, MASK, strict=True))
    state = balancer.init(params)
    losses, grad, state = step(params, state, *batch, mask=mask)
    _, wanted = run(named_losses, mtljax.mgda(TASKS), mask=mask, labels=LABELS)
    assert list(losses) == list(reversed(NAMES))
    close(grad, wanted)
    _, grad, state = step(params, state, *batch, mask=mask)
    close(grad, wanted)
    assert not state.seen[1]  # "normal", the second in the order of the losses


def test_masked_task_means():
    labels = jnp.array([[1.0, jnp.nan, 0.0], [0.0, jnp.nan, jnp.nan]])

    def losses_of(w):
        present = ~jnp.isnan(labels)
        values = (w - jnp.where(present, labels, 0)) ** 2
        return mtljax.masked_task_means(values, present)

    losses, mask = losses_of(jnp.float64(0.5))
    np.testing.assert_allclose(losses, [0.25, 0.0, 0.25])
    assert mask.tolist() == [True, False, True]
    grad = jax.jacrev(lambda w: losses_of(w)[0])(jnp.float64(0.5))
    np.testing.assert_allclose(grad, [0.0, 0.0, 1.0], atol=1e-12)
    by_name = mtljax.masked_task_means(
        {"a": labels[:, 0]}, {"a": jnp.array([True, False])}
    )
    assert float(by_name[0]["a"]) == 1.0
    with pytest.raises(ValueError, match="must be equal"):
        mtljax.masked_task_means(labels, jnp.ones((3, 2), bool))


def test_skip_absent_is_an_optimizer_per_task():
    params = {"trunk": jnp.ones(2), "heads": [jnp.ones(1), jnp.ones(1)]}
    grads = jax.tree.map(lambda p: 0.5 * p, params)

    def owner(path):
        return int(path.split("/")[1]) if path.startswith("heads") else None

    optimizer = mtljax.skip_absent(optax.adam(0.1), owner)
    state = optimizer.init(params)
    step = jax.jit(functools.partial(optimizer.update))
    _, state = step(grads, state, params, mask=jnp.array([True, True]))
    before = state.tasks[1]
    updates, state = step(grads, state, params, mask=jnp.array([True, False]))
    np.testing.assert_array_equal(updates["heads"][1], 0)
    jax.tree.map(np.testing.assert_array_equal, state.tasks[1], before)
    # The present task and the trunk move as with a plain optimizer.
    plain = optax.adam(0.1)
    old = plain.init(params)
    _, old = plain.update(grads, old, params)
    expected, _ = plain.update(grads, old, params)
    close(
        (updates["trunk"], updates["heads"][0]),
        (expected["trunk"], expected["heads"][0]),
    )


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize("kind", [lambda a, b: (a, b), Pair, lambda a, b: [a, b]])
def test_skip_absent_with_tuples_of_heads_and_with_frozen_leaves(kind):
    """A tuple was read as a mark, and a hole of ``optax.partition`` too."""
    heads = kind({"w": jnp.ones(1)}, {"w": jnp.ones(1)})
    params = {"embedding": jnp.ones(3), "heads": heads, "trunk": jnp.ones(2)}
    tasks = {"0": 0, "first": 0, "1": 1, "second": 1}

    def owner(path):
        return tasks[path.split("/")[1]] if path.startswith("heads") else None

    skipping = mtljax.skip_absent(optax.adam(0.1), owner)
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    mask = jnp.array([True, False])
    expected, _ = skipping.update(grads, skipping.init(params), params, mask=mask)
    np.testing.assert_array_equal(expected["heads"][1]["w"], 0)
    close(expected["heads"][0]["w"], jnp.array([-0.1]), 1e-6)

    trained = {"embedding": "frozen", "heads": "rest", "trunk": "rest"}
    partitioned = optax.partition(
        {"rest": skipping, "frozen": optax.set_to_zero()}, trained
    )
    flags = {name: label == "rest" for name, label in trained.items()}
    for optimizer in partitioned, optax.masked(skipping, flags):
        found, _ = optimizer.update(grads, optimizer.init(params), params, mask=mask)
        for name in ("heads", "trunk"):
            jax.tree.map(np.testing.assert_array_equal, found[name], expected[name])
    updates, _ = partitioned.update(grads, partitioned.init(params), params, mask=mask)
    np.testing.assert_array_equal(updates["embedding"], 0)


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def many_heads(kind, tasks=24, examples=32, width=16):
    """A trunk with linear heads in one product, or with hidden layers of their own."""
    shapes = {
        "trunk": (width, width),
        "heads": (width, tasks),
        "x": (examples, width),
        "y": (examples, tasks),
        "hidden": (tasks, width, width),
    }
    keys = jax.random.split(jax.random.key(1), len(shapes))
    trunk, heads, x, y, hidden = (
        jax.random.normal(key, shape, jnp.float64)
        for key, shape in zip(keys, shapes.values(), strict=True)
    )
    params = {"trunk": trunk, "heads": {"out": heads, "hidden": hidden}}

    def together(p, z, x, y):
        del x
        return ((z @ p["heads"]["out"] - y) ** 2).mean(0)

    def apart(p, z, x, y):
        del x
        layers = zip(p["heads"]["hidden"], p["heads"]["out"].T, y.T, strict=True)
        return jnp.stack(
            [((jnp.tanh(z @ h) @ v - t) ** 2).mean() for h, v, t in layers]
        )

    def batched(p, z, x, y):
        del x
        inside = jnp.tanh(jnp.einsum("nd,tdh->nth", z, p["heads"]["hidden"]))
        return ((jnp.einsum("nth,ht->nt", inside, p["heads"]["out"]) - y) ** 2).mean(0)

    losses = {"together": together, "apart": apart, "batched": batched}[kind]
    return params, (x, y), lambda p, x, y: jnp.tanh(x @ p["trunk"]), losses


@pytest.mark.parametrize("kind", ["together", "apart", "batched"])
def test_many_tasks_measured_at_a_representation(kind):
    params, batch, encode, losses = many_heads(kind)
    tasks = batch[1].shape[1]
    mask = jnp.arange(tasks) % 5 > 0
    balancer = mtljax.mgda(tasks)
    step = mtljax.value_and_balanced_grad(
        mtljax.through(encode, losses),
        balancer,
        labels={"trunk": "shared", "heads": "own"},
        measure="representation",
    )
    _, grad, state = jax.jit(step)(params, balancer.init(params), *batch, mask=mask)
    z = encode(params, *batch)
    rows = jax.jacrev(lambda z: losses(params, z, *batch))(z).reshape(tasks, -1)
    weights, _ = balancer.weigh(
        balancer.init(params), losses=None, gramian=rows @ rows.T, mask=mask
    )
    np.testing.assert_allclose(state.task_weights, weights, rtol=1e-6, atol=1e-9)

    def weighted(trunk):
        of_trunk = {**params, "trunk": trunk}
        values = losses(params, encode(of_trunk, *batch), *batch)
        return values @ weights

    wanted = jax.grad(weighted)(params["trunk"])
    np.testing.assert_allclose(grad["trunk"], wanted, rtol=1e-8, atol=1e-9)


def test_flops_of_a_representation():
    params, batch, encode, losses = many_heads("together", 40, 128, 128)
    tasks = batch[1].shape[1]
    task_losses = mtljax.through(encode, losses)

    def step(balancer, **options):
        labels = {"trunk": "shared", "heads": "own"}
        function = mtljax.value_and_balanced_grad(
            task_losses, balancer, labels=labels, **options
        )
        return flops(function, params, balancer.init(params), *batch)

    def heads(params, z, *batch):
        pull = jax.vjp(lambda z: losses(params, z, *batch), z)[1]
        return jax.vmap(pull)(jnp.eye(tasks))

    z = encode(params, *batch)
    bound = step(mtljax.linear(tasks)) + flops(heads, params, z, *batch)
    # Without a solver, whose iterations are not part of the passes.
    measured = step(mtljax.imtl_g(tasks), measure="representation")
    assert measured < 1.1 * bound


def test_effects_of_the_heads_run_once():
    params, batch, encode, losses = many_heads("together")
    seen = []

    def printing(p, z, x, y):
        jax.debug.callback(lambda: seen.append(1))
        return losses(p, z, x, y)

    balancer = mtljax.mgda(batch[1].shape[1])
    step = mtljax.value_and_balanced_grad(
        mtljax.through(encode, printing), balancer, measure="representation"
    )
    jax.block_until_ready(jax.jit(step)(params, balancer.init(params), *batch))
    jax.effects_barrier()
    assert len(seen) == 1


def test_separate_costs_one_pass_per_task():
    tasks = 10
    keys = jax.random.split(jax.random.key(1), 3)
    params = [jax.random.normal(k, (16, 16)) for k in keys[:2]]
    x = jax.random.normal(keys[2], (tasks, 32, 16))

    def one(p, x):
        return (jnp.tanh(x @ p[0]) @ p[1]).mean() ** 2

    balancer = mtljax.mgda(tasks)
    step = mtljax.value_and_balanced_grad(mtljax.separate(one), balancer)

    def by_hand(p, state, x):
        losses, rows = jax.vmap(jax.value_and_grad(one), (None, 0))(p, x)
        return losses, *balancer.update(rows, state)

    arguments = params, balancer.init(params), x
    assert flops(step, *arguments) < 1.2 * flops(by_hand, *arguments)


def test_frozen_layers_cost_no_backward_pass():
    keys = jax.random.split(jax.random.key(1), 4)
    params = {
        "frozen": jax.random.normal(keys[0], (64, 64)),
        "trunk": jax.random.normal(keys[1], (64, 64)),
        "heads": jax.random.normal(keys[2], (64, 3)),
    }
    x = jax.random.normal(keys[3], (256, 64))
    labels = {"frozen": "frozen", "trunk": "shared", "heads": "own"}

    def losses(p, x):
        return (jnp.tanh(jnp.tanh(x @ p["frozen"]) @ p["trunk"]) @ p["heads"]).mean(
            0
        ) ** 2

    def constant(rest, h):
        return (jnp.tanh(h @ rest["trunk"]) @ rest["heads"]).mean(0) ** 2

    balancer = mtljax.mgda(3)
    state = balancer.init(params)
    for engine in ("gramian", "stacked"):
        step = mtljax.value_and_balanced_grad(
            losses, balancer, labels=labels, engine=engine
        )
        rest = {name: params[name] for name in ("trunk", "heads")}
        of_rest = mtljax.value_and_balanced_grad(
            constant,
            balancer,
            labels={"trunk": "shared", "heads": "own"},
            engine=engine,
        )
        forward = 2 * 256 * 64 * 64
        more = flops(step, params, state, x) - flops(of_rest, rest, state, x)
        assert more < 1.2 * forward


def test_separate_follows_the_order_of_the_balancer():
    losses = {
        "z": lambda p, x: ((p - x) ** 2).sum(),
        "a": lambda p, x: ((p + x) ** 2).sum() * 9,
        "m": lambda p, x: (p * x).sum(),
    }
    batch = {name: jnp.arange(2.0) + i for i, name in enumerate(losses)}
    balancer = mtljax.scale_invariant(("m", "z", "a"))
    p = jnp.ones(2)
    step = mtljax.value_and_balanced_grad(mtljax.separate(losses), balancer)
    found, _, state = jax.jit(step)(p, balancer.init(p), batch)
    weights = mtljax.named(state.task_weights, balancer)
    for name, loss in found.items():
        np.testing.assert_allclose(loss, losses[name](p, batch[name]))
        np.testing.assert_allclose(weights[name], 1 / loss, rtol=1e-6)
    with pytest.raises(ValueError, match="separate was given losses for"):
        mtljax.value_and_balanced_grad(mtljax.separate(losses), mtljax.mgda(("a", "b")))


def test_means_in_half_precision():
    for value, count in ((100.0, 1000), (0.1, 70_000), (1.0, 300_000)):
        values = jnp.full((count, 1), value, jnp.float16)
        found, _ = mtljax.masked_task_means(values, jnp.ones((count, 1), bool))
        assert found.dtype == jnp.float16
        np.testing.assert_allclose(found[0], value, rtol=2e-3)


def test_frozen_integers_and_names_of_scheduled_balancers():
    params = {"w": jnp.ones(3), "step": jnp.array(3)}
    labels = mtljax.label_params(params, frozen="step")
    balancer = mtljax.inject_hyperparams(mtljax.cagrad)(("a", "b"), c=lambda _: 0.5)
    assert balancer.names == ("a", "b")

    def losses(p):
        return {"b": (p["w"] ** 2).sum(), "a": p["w"].sum()}

    step = mtljax.value_and_balanced_grad(losses, balancer, labels=labels)
    _, grad, _ = step(params, balancer.init(params))
    assert int(grad["step"]) == 0
    assert np.isfinite(grad["w"]).all()


def test_a_state_of_another_balancer_raises_one_sentence():
    """``reuse`` reads its state before the inner balancer can check it."""
    params = {"w": jnp.ones(2)}
    balancer = mtljax.reuse(mtljax.famo(2), every=2)
    step = mtljax.value_and_balanced_grad(lambda p: p["w"] ** 2, balancer)
    other = mtljax.mgda(2).init(params)
    wrong = mtljax.reuse(mtljax.famo(3), every=2).init(params)
    losses = jnp.ones(2)
    with pytest.raises(ValueError, match="of type MGDAState, not ReuseState"):
        step(params, other)
    with pytest.raises(ValueError, match="of type MGDAState, not ReuseState"):
        balancer.observe(other, losses=losses)
    with pytest.raises(ValueError, match=r"'kept' of the state has shape \(3,\)"):
        step(params, wrong)
    with pytest.raises(ValueError, match=r"'kept' of the state has shape \(3,\)"):
        balancer.update({"w": jnp.ones((2, 2))}, wrong, losses=losses)
    injected = mtljax.inject_hyperparams(mtljax.cagrad)(2, c=0.1)
    decaying = mtljax.inject_hyperparams(mtljax.gradient_norm_weighting)(2, decay=0.5)
    with pytest.raises(ValueError, match=r"hyper-parameters \['decay'\], but \['c'\]"):
        injected.update({"w": jnp.ones((2, 2))}, decaying.init(params))
    skipping = mtljax.skip_absent(optax.sgd(0.1), lambda _: 1)
    with pytest.raises(ValueError, match="state is a MGDAState"):
        skipping.update(params, other, params)
    shared = mtljax.skip_absent(optax.sgd(0.1), lambda _: None).init(params)
    with pytest.raises(ValueError, match=r"returned tasks \[1\]"):
        skipping.update(params, shared, params)


def test_errors_of_owners_and_of_composed_names():
    params = {"w": jnp.ones(2)}
    mask = jnp.ones(2, bool)
    far = mtljax.skip_absent(optax.sgd(0.1), lambda _: 5)
    with pytest.raises(ValueError, match="owner returned task 5"):
        far.update(params, far.init(params), mask=mask)
    with pytest.raises(ValueError, match="negative"):
        mtljax.skip_absent(optax.sgd(0.1), lambda _: -1).init(params)
    with pytest.raises(ValueError, match="in the same order"):
        mtljax.compose(mtljax.uncertainty(("a", "b")), mtljax.cagrad(("b", "a")))
