"""The rewritten backward pass: the gradients of jax.vjp, with less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.gradients._gramian.cost import forward_work
from mtljax.gradients._rewrite.sweep import rewritten as sweep

KEYS = jax.random.split(jax.random.key(0), 8)
X = jax.random.normal(KEYS[0], (3, 7, 5))
MIX = jax.random.normal(KEYS[1], (7, 7))
PARAMS = {
    "w": jax.random.normal(KEYS[2], (5, 4)),
    "b": jax.random.normal(KEYS[3], (4,)),
    "v": jax.random.normal(KEYS[4], (4, 6)),
    "heads": jax.random.normal(KEYS[5], (5, 2, 3)),
}


def dense(p, x):
    return x @ p["w"] + jnp.expand_dims(p["b"], range(x.ndim - 1))


def _attend(p, x):
    h = jnp.einsum("nli,ihk->nhlk", x, p["heads"])
    scores = jax.nn.softmax(jnp.einsum("nhlk,nhmk->nhlm", h, h))
    return jnp.einsum("nhlm,nhmk->nlhk", scores, h).reshape(*x.shape[:2], -1)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, x), lambda x, ct: (jnp.where(x > 0, ct, ct / 2),))


def convolve(x, kernel, axes=("NWC", "IWO", "NWC"), **options):
    options = {"window_strides": (1,), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=axes, **options)


def pool(x, window, strides, padding=((0, 0),) * 3):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


FUNCTIONS = {
    "a mean over positions": lambda p, x: dense(p, x).mean(1),
    "a sum over all": lambda p, x: dense(p, x).sum(),
    "through two layers": lambda p, x: (dense(p, x) @ p["v"]).mean(1),
    "a residual branch": lambda p, x: (
        (jnp.tanh(dense(p, x)) @ p["v"])[..., :5] + x * p["w"][:, 0][None, None]
    ).mean(1),
    "positions mixed by a product": lambda p, x: jnp.einsum(
        "lm,nmi->nli", MIX, dense(p, x)
    ).mean(1),
    "a batch of products": lambda p, x: jnp.einsum(
        "nli,nio->nlo", x, jnp.broadcast_to(p["w"], (3, 5, 4))
    ).sum(1),
    "attention": _attend,
    "attention, pooled": lambda p, x: _attend(p, x).mean(1),
    "a general dense layer": lambda p, x: jnp.tanh(
        jax.lax.dot_general(x, p["heads"], (((2,), (0,)), ((), ())))
    ),
    "a transpose and a squeeze": lambda p, x: (
        dense(p, x).mean(1, keepdims=True).transpose(2, 1, 0)[:, 0]
    ),
    "positions in one axis": lambda p, x: dense(p, x.reshape(-1, 5)).mean(0),
    "a clip and a choice": lambda p, x: jnp.where(
        x[..., :4] > 0, jnp.clip(dense(p, x), -1, 1), 0
    ).mean(1),
    "integers": lambda p, x: p["w"][jnp.argsort(x[0, :, 0]) % 5].mean(0),
    "a loop": lambda p, x: jax.lax.scan(
        lambda h, y: (jnp.tanh(h + y @ p["w"]), jnp.mean(h, 0)),
        jnp.zeros((3, 4)),
        x.swapaxes(0, 1),
    )[1].mean(0),
    "checkpoint": lambda p, x: jax.checkpoint(lambda x: jnp.tanh(dense(p, x)))(x).sum(
        1
    ),
    "a custom rule": lambda p, x: clipped(dense(p, x)).mean(1),
    "a call": lambda p, x: jax.jit(dense)(p, x).mean((0, 1)),
    "several results": lambda p, x: (dense(p, x).mean(1), {"b": p["b"].sum()}),
    "a convolution": lambda p, x: jnp.tanh(convolve(x, p["heads"])).sum(1),
    "a pooled convolution": lambda p, x: convolve(x, p["heads"]).mean(1),
    "a strided convolution": lambda p, x: convolve(
        x, p["heads"], window_strides=(2,), padding=[(1, 2)], rhs_dilation=(2,)
    ),
    "a transposed convolution": lambda p, x: convolve(
        x, p["heads"], lhs_dilation=(3,), padding=[(2, 1)]
    ),
    "channels first": lambda p, x: convolve(
        jnp.einsum("nwc,cd->ndw", x, p["w"])[:, :, None],
        p["w"].reshape(2, 2, 1, 5),
        ("NCHW", "IOHW", "NCHW"),
        window_strides=(1, 2),
        feature_group_count=2,
    ),
    "a batch of convolutions": lambda p, x: jax.vmap(convolve, (0, None))(
        jnp.stack([x, x**2]), p["heads"]
    ).mean(0),
    "max pooling": lambda p, x: pool(dense(p, x), (1, 2, 1), (1, 2, 1)).sum(1),
    "overlapping windows": lambda p, x: pool(
        dense(p, x), (1, 3, 2), (1, 2, 1), ((0, 0), (1, 1), (0, 1))
    ),
    "half precision": lambda p, x: dense(
        jax.tree.map(lambda y: y.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)
    ).mean(1),
}


def cotangent_of(out):
    leaves, treedef = jax.tree.flatten(out)
    keys = jax.random.split(KEYS[6], len(leaves))
    pairs = zip(keys, leaves, strict=True)
    made = [jax.random.normal(key, x.shape, x.dtype) for key, x in pairs]
    return jax.tree.unflatten(treedef, made)


CONVOLUTIONS = [name for name in FUNCTIONS if "convolution" in name or "chan" in name]


@pytest.mark.parametrize("jitted", [True, pytest.param(False, marks=pytest.mark.deep)])
@pytest.mark.parametrize(
    ("name", "runs"),
    [(name, 1) for name in FUNCTIONS] + [(name, 40) for name in CONVOLUTIONS],
)
def test_equals_vjp(name, runs, jitted):
    def both(p, x):
        out, pull = jax.vjp(FUNCTIONS[name], p, x)
        c = cotangent_of(out)
        return sweep(pull, out, runs)(c), pull(c)

    found, expected = (jax.jit(both) if jitted else both)(PARAMS, X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    tolerance = 0.05 if name == "half precision" else 2e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            tolerance,
            tolerance * np.abs(b.astype(jnp.float32)).max(),
        )


CONSTANT = {
    "both contracted": lambda c: jnp.einsum(
        "nl,lo->no",
        jnp.broadcast_to(c[:, None], (3, 7)),
        jnp.broadcast_to(X[0, 0][None], (7, 5)),
    ),
    "a batch of both": lambda c: jnp.einsum(
        "nl,nlo->no",
        jnp.broadcast_to(c.sum()[None, None], (3, 7)),
        jnp.broadcast_to(MIX[None, :, :5], (3, 7, 5)),
    ),
    "a batch of one": lambda c: jnp.einsum(
        "nl,nlo->no", jnp.broadcast_to(c.sum()[None, None], (3, 7)), X
    ),
    "a sum over constants": lambda c: jnp.broadcast_to(c[:, None, None], (3, 7, 5)).sum(
        (0, 2)
    ),
    "a size of one": lambda c: jnp.broadcast_to(c[:, None], (3, 1)) @ MIX[:1],
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_values(name):
    c = jnp.arange(3.0) + 1
    found, expected = sweep(CONSTANT[name], c)(c), CONSTANT[name](c)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


def products(function, *args):
    """Multiplications of all matrix products, and the axes that they contract."""
    eqns = jax.make_jaxpr(function)(*args).jaxpr.eqns
    dots = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    return (
        sum(forward_work(eqn) for eqn in dots),
        [len(eqn.params["dimension_numbers"][0][0]) for eqn in dots],
    )


def test_a_pooled_layer_costs_one_position():
    def pull(rewritten):
        def run(p, x, c):
            out, back = jax.vjp(lambda p, x: dense(p, x).mean(1), p, x)
            return (sweep(back, out) if rewritten else back)(c)

        return run

    c = jnp.ones((3, 4))
    forward = 3 * 7 * 5 * 4
    before, _ = products(pull(False), PARAMS, X, c)
    after, _ = products(pull(True), PARAMS, X, c)
    assert before == 3 * forward  # and twice as much for weight and input
    assert after == forward + 2 * 3 * 5 * 4


@pytest.mark.parametrize("mean", [jnp.mean, lambda y, _: y.sum(0) / len(y)])
def test_pooled_layers_in_half_precision(mean):
    x = jnp.full((4096, 2), 30, jnp.float16)  # they add up to 122,880: out of range
    w = jnp.ones((2, 3), jnp.float16)

    def run(w, c):
        _, pull = jax.vjp(lambda w: mean(x @ w, 0), w)
        return sweep(pull, c)(c)[0]

    c = jnp.ones(3, jnp.float16)
    assert products(run, w, c)[0] == 4096 * 2 * 3 + 2 * 3
    found = run(w, c)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, jnp.full((2, 3), 30), 2e-3)


def test_a_weight_gradient_contracts_one_axis():
    def run(p, x):
        out, pull = jax.vjp(lambda p: jnp.tanh(dense(p, x)), p)
        return sweep(pull, out)(out)

    _, axes = products(run, PARAMS, X)
    assert max(axes) == 1


def test_convolutions_in_loops_come_as_the_library_of_the_cpu_wants_them():
    """Their axes in order, and the kernels turned round before the loop."""

    def run(kernel, x):
        out, pull = jax.vjp(convolve, x, kernel)
        return jax.lax.map(sweep(pull, out), jnp.stack([out, 2 * out]))

    outside = jax.make_jaxpr(run)(PARAMS["heads"], X).jaxpr.eqns
    (loop,) = (eqn for eqn in outside if eqn.primitive.name == "scan")
    inside = loop.params["jaxpr"].jaxpr.eqns
    convs = [eqn for eqn in inside if eqn.primitive.name == "conv_general_dilated"]
    assert len(convs) == 2
    assert "rev" not in [eqn.primitive.name for eqn in inside]
    if jax.default_backend() == "cpu":
        found = {eqn.params["dimension_numbers"] for eqn in convs}
        assert found == {jax.lax.ConvDimensionNumbers((0, 2, 1), (2, 1, 0), (0, 2, 1))}


@pytest.mark.parametrize("runs", [1, 40])
def test_constants_may_be_numpy_arrays(runs):
    images = np.asarray(X)
    out, pull = jax.vjp(lambda p: convolve(images, p["heads"]), PARAMS)
    found, expected = sweep(pull, out, runs)(out)[0], pull(out)[0]
    np.testing.assert_allclose(found["heads"], expected["heads"], 1e-5, 1e-5)


def names_in(jaxpr):
    """Names of all operations, those of loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            if hasattr(value, "jaxpr"):
                yield from names_in(value.jaxpr)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
def test_patches_and_maxima_are_found_once_for_all_passes():
    def run(kernel, x):
        def pooled(kernel):
            return pool(convolve(x, kernel), (1, 2, 1), (1, 2, 1))

        out, pull = jax.vjp(pooled, kernel)
        return jax.lax.map(sweep(pull, out, 40), jnp.stack([out, 2 * out]))

    outside = jax.make_jaxpr(run)(PARAMS["heads"], X).jaxpr
    (loop,) = (eqn for eqn in outside.eqns if eqn.primitive.name == "scan")
    inside = set(names_in(loop.params["jaxpr"].jaxpr))
    assert "dot_general" in inside
    assert not inside & {"conv_general_dilated", "select_and_scatter_add", "ge"}


@pytest.mark.parametrize("seed", range(12))
def test_max_pooling_equals_that_of_jax(seed):
    """Exactly, also where maxima are equal, infinite or not numbers."""
    rng = np.random.default_rng(seed)
    for _ in range(5):
        axes = int(rng.integers(1, 4))
        window = tuple(map(int, rng.integers(1, 4, axes)))
        strides = (
            window if rng.random() < 0.7 else tuple(map(int, rng.integers(1, 4, axes)))
        )
        padding = [(int(rng.integers(n)), int(rng.integers(n))) for n in window]
        if rng.random() < 0.5:
            padding = [(0, 0)] * axes
        x = rng.integers(-2, 3, np.array(window) + rng.integers(0, 6, axes)) * 1.0
        x[rng.random(x.shape) < rng.choice([0, 0.5])] = -np.inf
        x[rng.random(x.shape) < rng.choice([0, 0.2])] = np.nan
        x = jnp.asarray(x, jnp.float32)
        one = functools.partial(pool, window=window, strides=strides, padding=padding)
        out, pull = jax.vjp(one, x)
        c = jnp.asarray(rng.integers(1, 9, out.shape), out.dtype)
        np.testing.assert_array_equal(sweep(pull, out)(c)[0], pull(c)[0])


def test_only_what_a_part_needs_is_run():
    def run(p, x):
        out, pull = jax.vjp(dense, p, x)
        return sweep(pull, out)(out, lambda results: results[1])

    work, _ = products(run, PARAMS, X)
    assert work == 2 * 3 * 7 * 5 * 4  # forward, and the cotangent of x


def test_prints_in_a_derivative_are_kept(capfd):
    @jax.custom_vjp
    def noisy(x):
        return x

    def backward(_, ct):
        jax.debug.print("cotangent {}", ct.sum())
        return (ct,)

    noisy.defvjp(lambda x: (x, None), backward)
    out, pull = jax.vjp(noisy, jnp.arange(2.0))
    sweep(pull, out)(out)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("cotangent 1.0") == 1


def test_checkpoint_stays_whole():
    def run(p, x):
        out, pull = jax.vjp(lambda p: jax.checkpoint(dense)(p, x), p)
        return sweep(pull, out)(out)

    names = [eqn.primitive.name for eqn in jax.make_jaxpr(run)(PARAMS, X).eqns]
    assert any("checkpoint" in name or "remat" in name for name in names)


def test_layers_keep_their_names():
    def layer(p, x):
        with jax.named_scope("first_layer"):
            return jnp.tanh(dense(p, x))

    def run(p, x):
        out, pull = jax.vjp(lambda p: layer(p, x), p)
        return sweep(pull, out)(out)

    eqns = jax.make_jaxpr(run)(PARAMS, X).eqns
    dots = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    names = [str(eqn.source_info.name_stack) for eqn in dots]
    assert len(names) == 2
    assert all("first_layer" in name for name in names)


def test_under_vmap_and_grad():
    def size(p, x):
        out, pull = jax.vjp(FUNCTIONS["through two layers"], p, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(sweep(pull, out)(out)))

    def expected(p, x):
        out, pull = jax.vjp(FUNCTIONS["through two layers"], p, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(pull(out)))

    many = jnp.stack([X, 2 * X])
    found, wanted = (
        jax.vmap(jax.grad(f), (None, 0))(PARAMS, many) for f in (size, expected)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, 1e-4, 1e-4 * np.abs(b).max())


def test_integers_have_the_derivative_of_jax():
    out, pull = jax.vjp(lambda w, n: w * n, jnp.ones(2), jnp.arange(2))
    found, expected = sweep(pull, out)(out), pull(out)
    assert found[1].dtype == expected[1].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(found[0], expected[0])
