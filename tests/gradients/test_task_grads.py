"""Per-task gradients against ``jax.jacrev``, however they are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients.problem import (
    LABELS,
    batch,
    close,
    jacobian,
    own_gradient,
    params,
    task_losses,
)

import mtljax
from mtljax.gradients.passes import Body, Passes, pick

FIVE = params(tasks=5), batch(tasks=5)
WAYS = ["auto", "unrolled", "vmap", "map", "chunked", 2, 3, 5, 99]  # 2, 3 divide not 5
each_way = pytest.mark.parametrize("strategy", WAYS)


@each_way
def test_equals_jacrev(strategy):
    function = mtljax.value_and_task_grads(task_losses, strategy=strategy)
    losses, grads = jax.jit(function)(*FIVE)
    np.testing.assert_allclose(losses, task_losses(*FIVE), rtol=1e-6)
    close(grads, jacobian(*FIVE))


@each_way
def test_gramian_is_the_jacobian_times_its_transpose(strategy):
    function = mtljax.task_gramian(task_losses, strategy=strategy)
    losses, gramian = jax.jit(function)(*FIVE)
    np.testing.assert_allclose(losses, task_losses(*FIVE), rtol=1e-6)
    close(gramian, jacobian_gramian(jacobian(*FIVE)))


def jacobian_gramian(rows):
    flat = [
        np.asarray(r, np.float64).reshape(len(r), -1) for r in jax.tree.leaves(rows)
    ]
    matrix = np.concatenate(flat, axis=1)
    return matrix @ matrix.T


def test_auto_unrolls_few_tasks_on_the_cpu():
    def auto(tasks, largest=0, ops=100, convolves=False):
        return pick(Passes("auto", 4), tasks, Body(largest, convolves, ops))

    assert auto(17) == ("vmap", 17, 1)
    for asked in (Passes("map", 4), Passes("chunked", 4)):
        assert pick(asked, 30, Body(0, False, 100)) == asked
    if jax.default_backend() == "cpu":
        assert auto(16, largest=1 << 30).strategy == "unrolled"
        assert auto(16, ops=1000).strategy == "vmap"  # a long program
        assert auto(3, convolves=True).strategy == "unrolled"
        assert auto(4, ops=99, convolves=True) == ("map", 1, 1)
        assert auto(17, convolves=True) == ("map", 1, 1)
        assert auto(40, convolves=True) == ("map", 1, 2)


def test_auto_loops_over_passes_that_are_large_together():
    rows = jnp.zeros((8192, 256))  # 33 MB a pass, as the estimate goes

    def losses(p):
        h = jnp.tanh(rows @ p)
        return jnp.stack([(h * t).mean() for t in range(20)])

    def loops(num_rows):
        def small(p):
            return losses(p) if num_rows is None else losses(p)[:num_rows]

        made = jax.make_jaxpr(mtljax.value_and_task_grads(small))(jnp.ones((256, 256)))
        return "scan" in str(made)

    if jax.default_backend() == "cpu":
        assert loops(None)
        assert not loops(16)


def test_has_aux_and_keywords():
    def with_aux(p, batch, *, factor):
        losses = factor * task_losses(p, batch)
        return losses, {"sum": losses.sum()}

    (losses, aux), grads = mtljax.value_and_task_grads(with_aux, has_aux=True)(
        *FIVE, factor=2.0
    )
    np.testing.assert_allclose(losses, 2 * task_losses(*FIVE), rtol=1e-6)
    np.testing.assert_allclose(aux["sum"], losses.sum(), rtol=1e-6)
    close(grads, jax.tree.map(lambda g: 2 * g, jacobian(*FIVE)))
    (_, aux), gramian = mtljax.task_gramian(with_aux, has_aux=True)(*FIVE, factor=2.0)
    assert set(aux) == {"sum"}
    close(gramian, 4 * jacobian_gramian(jacobian(*FIVE)))


def test_a_batch_per_task_of_different_shapes():
    def multi_input(p, batches):
        return jnp.stack(
            [
                jnp.mean((batches["a"] @ p["w"] - 1) ** 2),
                jnp.mean(jnp.abs(batches["b"] @ p["w"])),
            ]
        )

    rng = np.random.default_rng(0)
    batches = {
        "a": jnp.asarray(rng.normal(size=(7, 3)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32),
    }
    p = {"w": jnp.array([1.0, -2.0, 0.5])}
    _, grads = mtljax.value_and_task_grads(multi_input)(p, batches)
    for i in range(2):
        alone = jax.grad(lambda p, i=i: multi_input(p, batches)[i])(p)
        np.testing.assert_allclose(grads["w"][i], alone["w"], rtol=1e-5)


def test_equal_batches_by_vmap_of_grad():
    """The other way to stack, of the design: one loss, a batch per task."""

    def loss(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    xs = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7, 4)), jnp.float32)
    w = jnp.array([1.0, -1.0, 0.5, 2.0])
    rows = jax.vmap(jax.grad(loss), (None, 0))(w, xs)
    losses = mtljax.value_and_task_grads(jax.vmap(loss, (None, 0)))
    close(losses(w, xs)[1], rows)


def test_argnums():
    def losses(a, b, c):
        return jnp.stack([a @ b * c, (a**2).sum() + b.sum()])

    a, b, c = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0]), jnp.float32(2.0)
    expected = jax.jacrev(losses, argnums=(0, 1, 2))(a, b, c)
    one = mtljax.value_and_task_grads(losses, argnums=1)(a, b, c)[1]
    close(one, expected[1])
    two = mtljax.value_and_task_grads(losses, argnums=(2, 0))(a, b, c)[1]
    close(two, (expected[2], expected[0]))


PREFIX = LABELS
TREE = {
    "trunk": {"kernel": "shared", "bias": "shared"},
    "heads": [{"kernel": "own"}] * 5,
}


@pytest.mark.parametrize(
    "labels",
    [
        PREFIX,
        TREE,
        lambda path: "own" if path.startswith("heads/") else "shared",
        mtljax.label_params(FIVE[0], own="heads"),
    ],
    ids=["prefix", "tree", "predicate", "label_params"],
)
@pytest.mark.parametrize("strategy", ["unrolled", "chunked"])
def test_own_leaves_are_not_stacked(labels, strategy):
    function = mtljax.value_and_task_grads(
        task_losses, labels=labels, strategy=strategy
    )
    _, grads = function(*FIVE)
    close(grads["trunk"], jacobian(*FIVE)["trunk"])
    close(grads["heads"], own_gradient(*FIVE))


def test_gramian_of_the_shared_parameters():
    _, gramian = mtljax.task_gramian(task_losses, labels=LABELS)(*FIVE)
    close(gramian, jacobian_gramian(jacobian(*FIVE)["trunk"]))


def test_a_loss_that_overflows_leaves_the_other_rows_alone():
    def losses(p):
        return jnp.stack([p @ p, p.sum() + jnp.nan, p.prod()])

    p = jnp.array([1.0, 2.0, 3.0])
    values, grads = mtljax.value_and_task_grads(losses)(p)
    assert np.isnan(values[1])
    np.testing.assert_allclose(grads[0], 2 * p)
    np.testing.assert_allclose(grads[2], [6, 3, 2])


def marked():
    """A trunk whose derivative holds an operation that nothing else does."""

    @jax.custom_vjp
    def tap(x):
        return x

    tap.defvjp(lambda x: (x, None), lambda _, cotangent: (jnp.sinh(cotangent),))

    def losses(p, batch):
        trunk = {"kernel": tap(p["trunk"]["kernel"]), "bias": p["trunk"]["bias"]}
        return task_losses({**p, "trunk": trunk}, batch)

    return losses


def passes(function, *args):
    """How often a program differentiates the trunk; the body of a loop counts once."""
    return str(jax.make_jaxpr(function)(*args)).count("= sinh")


def test_number_of_backward_passes():
    # One batched pass, or one body of a loop.
    for strategy, expected in (("unrolled", 5), ("vmap", 1), ("map", 1)):
        function = mtljax.value_and_task_grads(marked(), strategy=strategy)
        assert passes(function, *FIVE) == expected, strategy
    for name, expected in (("linear", 1), ("uncertainty", 1), ("pcgrad", 5)):
        balancer = mtljax.get_method(name).build(5, key=jax.random.key(0))
        function = mtljax.value_and_balanced_grad(marked(), balancer)
        state = balancer.init({})
        assert passes(function, FIVE[0], state, FIVE[1]) == expected, name


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda p: p.sum(), r"vector of T scalar losses, not an array of shape \(\)"),
        (lambda p: jnp.stack([p, p]), r"vector .* not an array of shape \(2, 3\)"),
        (lambda p: [p[0], p[1]], "vector of T scalar losses, not a list"),
        (lambda p: (p, p), "returned a tuple; pass has_aux=True"),
        (lambda p: p[:0], "returned no loss at all"),
        (lambda p: p.astype(int), "floating-point losses, not int32"),
    ],
)
def test_errors_about_the_losses(losses, message):
    p = jnp.ones(3)
    with pytest.raises(ValueError, match=message):
        mtljax.value_and_task_grads(losses)(p)
    with pytest.raises(ValueError, match=message):
        mtljax.task_gramian(losses)(p)
    balancer = mtljax.linear(3)
    with pytest.raises(ValueError, match=message):
        mtljax.value_and_balanced_grad(losses, balancer)(p, balancer.init(p))


@pytest.mark.usefixtures("as_users")
def test_other_errors():
    p = jnp.ones(3)
    with pytest.raises(ValueError, match=r"must return a pair \(losses, aux\)"):
        mtljax.value_and_task_grads(lambda p: p, has_aux=True)(p)
    with pytest.raises(ValueError, match="strategy='loop' is not one of 'auto'"):
        mtljax.value_and_task_grads(lambda p: p, strategy="loop")(p)
    with pytest.raises(
        ValueError, match="strategy=0 is the number of tasks in a chunk"
    ):
        mtljax.value_and_task_grads(lambda p: p, strategy=0)(p)
    with pytest.raises(ValueError, match="labels go with a single differentiated"):
        mtljax.value_and_task_grads(lambda p: p, argnums=(0,), labels=LABELS)


@pytest.mark.parametrize("engine", ["losses", "gramian", "stacked"])
def test_shardings_may_name_a_single_device(engine):
    """The sharding of an array that was not placed on a mesh has no partition."""
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)

    def task_losses(params):
        return jnp.square(jnp.eye(2) @ params["w"] - 1).mean(0)

    balancer = mtljax.linear(2) if engine == "losses" else mtljax.mgda(2)
    plain, placed = (
        mtljax.value_and_balanced_grad(
            task_losses, balancer, engine=engine, grad_shardings=wanted
        )(params, balancer.init(params))[1]["w"]
        for wanted in (None, shardings)
    )
    assert (plain == placed).all()
    _, stacked = mtljax.value_and_task_grads(task_losses, grad_shardings=shardings)(
        params
    )
    expected = jax.jacrev(task_losses)(params)["w"]
    np.testing.assert_allclose(stacked["w"], expected, rtol=1e-6)
