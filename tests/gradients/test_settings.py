"""Settings of JAX that users choose, and losses of another dtype than parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from mtljax import sharpness
from mtljax.balancer import from_weights

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

TASKS = 3
PARAMS = {"a": jnp.full((4, 3), 0.2, jnp.bfloat16), "b": jnp.ones(3)}
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
MASK = jax.ShapeDtypeStruct((TASKS,), jnp.bool_)
LABELS = {"a": "shared", "b": "own"}


def losses(params, x):
    h = jnp.tanh(x @ params["a"].astype(x.dtype) + params["b"][None])
    return ((h - jnp.arange(3.0)[None]) ** 2).mean(0)


def one(params, x):
    return losses(params, x).mean()


def heads(params, z, x):
    del x
    return ((z - jnp.arange(3.0)[None]) ** 2).mean(0) * params["b"]


THROUGH = mtljax.through(lambda p, x: jnp.tanh(x @ p["a"].astype(x.dtype)), heads)


@pytest.fixture
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("name", mtljax.METHODS)
def test_methods_with_strict_promotion(strict, name):
    balancer = mtljax.get_method(name).build(TASKS, key=jax.random.key(0, impl="rbg"))
    rows = jax.eval_shape(lambda: jax.tree.map(lambda p: jnp.stack([p] * 3), PARAMS))
    state = jax.eval_shape(balancer.init, PARAMS)
    vector = jax.ShapeDtypeStruct((TASKS,), jnp.float32)

    def update(rows, state, losses, mask):
        return balancer.update(rows, state, losses=losses, mask=mask)

    found, _ = jax.eval_shape(update, rows, state, vector, MASK)
    assert [x.dtype for x in jax.tree.leaves(found)] == [jnp.bfloat16, jnp.float32]
    if balancer.observe is not None:
        jax.eval_shape(lambda s, v: balancer.observe(s, losses=v), state, vector)


@pytest.mark.parametrize("backward", ["jax", "rewritten"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("igb_v1", {"engine": "losses"}),
        ("mgda", {"engine": "gramian"}),
        ("mgda", {"engine": "gramian", "labels": LABELS, "heads": "weighted"}),
        ("mgda", {"engine": "stacked", "micro_batches": 2}),
        ("graddrop", {"engine": "stacked", "labels": LABELS}),
    ],
)
def test_engines_with_strict_promotion(strict, method, options, backward):
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    function = mtljax.value_and_balanced_grad(
        losses, balancer, backward=backward, **options
    )
    state = balancer.init(PARAMS)
    jax.eval_shape(lambda p, m: function(p, state, X, mask=m), PARAMS, MASK)


def test_other_functions_with_strict_promotion(strict):
    mgda = mtljax.mgda(TASKS)
    reused = mtljax.reuse(mtljax.smooth_weights(mgda), every=2)
    separate = mtljax.separate(one)
    many = jnp.stack([X] * TASKS)
    trace = jax.eval_shape
    trace(mtljax.value_and_task_grads(losses), PARAMS, X)
    trace(mtljax.task_gramian(losses, engine="gramian"), PARAMS, X)
    trace(mtljax.cross_task_gramian(losses), PARAMS, (X,), (X,))
    balanced = mtljax.value_and_balanced_grad
    trace(balanced(separate, mgda), PARAMS, mgda.init(PARAMS), many)
    trace(balanced(losses, reused), PARAMS, reused.init(PARAMS), X)
    measured = balanced(THROUGH, mgda, measure="representation", labels=LABELS)
    trace(measured, PARAMS, mgda.init(PARAMS), X)
    flat = sharpness.value_and_flat_grad(losses, mgda, rho=0.05)
    trace(flat, PARAMS, flat.init(PARAMS), X)
    present = jnp.ones((4, TASKS), bool)
    for dtype in (jnp.bfloat16, jnp.float32):
        mtljax.masked_task_means(jnp.ones((4, TASKS), dtype), present)


@pytest.mark.parametrize(
    ("method", "engine"),
    [("uncertainty", "losses"), ("mgda", "gramian"), ("mgda", "stacked")],
)
def test_a_good_step_makes_no_nan(method, engine):
    """Outside jit, jax_debug_nans checks the result of every operation."""
    balancer = mtljax.get_method(method).build(TASKS)
    function = mtljax.value_and_balanced_grad(losses, balancer, engine=engine)
    params = {"a": PARAMS["a"].astype(jnp.float32), "b": PARAMS["b"]}
    with jax.debug_nans(True):
        _, grad, _ = function(params, balancer.init(params), X)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grad))


def constant(weights):
    """A balancer that reads the Gramian and returns these weights."""

    def weigh(state, *, losses, gramian, mask):
        del losses, mask
        return jnp.asarray(weights, gramian.dtype), state

    state = mtljax.linear(len(weights)).init({})
    return from_weights(
        "constant",
        len(weights),
        init=lambda: state,
        weigh=weigh,
        needs="gramian",
        native="free",
    )


def one_head(dtype):
    """All tasks read one head, after operations of their own."""

    def task_losses(p, x):
        h = jnp.tanh(x @ p["w"])
        parts = [jnp.sin(h * (i + 1.0)) @ p["v"] - i for i in range(TASKS)]
        return jnp.stack([jnp.mean(part**2) for part in parts]).astype(dtype)

    return task_losses


@pytest.mark.parametrize("backward", ["jax", "rewritten"])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(jnp.bfloat16, 2e-2), (jnp.float16, 5e-3), (jnp.float64, 1e-5)],
)
def test_a_common_head_and_losses_of_another_dtype(dtype, limit, backward):
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(6, 6)) * 0.4, "v": rng.normal(size=6) * 0.4}
    x, weights = rng.normal(size=(4, 6)), [0.5, 2.0, 1.0]
    with enable_x64(True):
        total = jax.grad(lambda p: one_head(jnp.float64)(p, x) @ jnp.array(weights))
        expected = jax.jit(total)(jax.tree.map(jnp.float64, params))
        params, x = jax.tree.map(jnp.float32, params), jnp.float32(x)
        balancer = constant(weights)
        function = mtljax.value_and_balanced_grad(
            one_head(dtype), balancer, engine="gramian", backward=backward
        )
        found, grad, _ = jax.jit(function)(params, balancer.init(params), x)
    assert found.dtype == dtype
    for name, wanted in expected.items():
        assert grad[name].dtype == jnp.float32
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(grad[name], wanted, atol=limit * scale, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"engine": "gramian"}, {"engine": "stacked"}, {"measure": "representation"}],
)
def test_weights_beyond_the_range_of_float16(options):
    """The losses are float16, their gradients small, and the weights above 65504."""

    def encode(p, x):
        return x @ p["w"]

    def of_z(p, z, x):
        del p, x
        return (z.sum(0) * 1e-3).astype(jnp.float16)

    task_losses = mtljax.through(encode, of_z)
    params, x = {"w": jnp.ones((2, 2))}, jnp.array([[1.0, 2.0]])
    weights = [1e5, 3e5]
    balancer = constant(weights)
    function = mtljax.value_and_balanced_grad(task_losses, balancer, **options)
    _, grad, _ = jax.jit(function)(params, balancer.init(params), x)
    expected = 1e-3 * np.outer(x[0], weights)
    np.testing.assert_allclose(grad["w"], expected, rtol=5e-3)
