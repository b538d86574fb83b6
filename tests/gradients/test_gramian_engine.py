"""The Gramian engine against the Jacobian in float64, on one small model a rule."""

import re
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from gradients.problem import close
from registry import CASES

import mtljax
from mtljax import stack
from mtljax.balancer import from_weights
from mtljax.gradients import gramian as engine
from mtljax.gradients._gramian import contract, evaluate, plan
from mtljax.gradients.linearized import Options
from mtljax.gradients.passes import Passes

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

HEADS = {"trunk": "shared", "heads": "own"}


class Model(NamedTuple):
    """A function of parameters, and the leaves whose gradients are never formed."""

    task_losses: Any
    params: Any
    factored: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()  # those that are a row of one of these
    labels: Any = None
    has_aux: bool = False


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0])


def three(width, seed=90):
    return [normal(seed + i, width) for i in range(3)]


def regressions(h, heads):
    """One loss per head, from features ``[n, d]``."""
    outs = [jnp.tanh(h @ w) for w in heads]
    return jnp.stack([jnp.mean((o - 0.3 * i) ** 2) for i, o in enumerate(outs)])


def mlp():
    """Dense layers with biases, own heads."""
    x = normal(0, 4, 12)

    def losses(p):
        h = x
        for layer in p["trunk"]:
            h = jnp.tanh(h @ layer["w"] + layer["b"][None])
        return regressions(h, p["heads"])

    trunk = [{"w": normal(i, 12, 12), "b": normal(i, 12)} for i in range(2)]
    params = {"trunk": trunk, "heads": three(12)}
    weights, biases = (tuple(f"trunk/{i}/{name}" for i in range(2)) for name in "wb")
    return Model(losses, params, weights, biases, HEADS)


def biases():
    """Added to every kind of product, along several axes, repeated early or late."""
    x = normal(0, 2, 2, 2, 8)

    def conv(x, w, layout):
        layout = layout.split()
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", (1, 1), (1, 1), layout
        )

    def losses(p):
        h = conv(x, p["last"]["w"], "NHWC HWIO NHWC") + p["last"]["b"][None, None, None]
        h = jnp.tanh(h).transpose(0, 3, 1, 2)
        h = conv(h, p["first"]["w"], "NCHW OIHW NCHW") + p["first"]["b"][None]
        h = jnp.tanh(h).mean(2).reshape(2, 2, 5, 2)
        repeated = jnp.broadcast_to(p["groups"]["b"], (2, 2, 8, 2))
        h = jnp.tanh(repeated + jnp.einsum("ngct,gco->ngot", h, p["groups"]["w"]))
        h = (
            jnp.einsum("ngot,gohk->nthk", h, p["axes"]["w"])
            + p["axes"]["b"][None, None]
        )
        h = h.mean(1).reshape(2, 9)
        for _ in range(2):
            h = jnp.tanh(h @ p["twice"]["w"] + p["twice"]["b"].reshape(1, 9))
        return regressions(h, p["heads"])

    shapes = {"last": (3, 3, 8, 9), "first": (10, 9, 1, 2), "groups": (2, 5, 8)}
    shapes |= {"axes": (2, 8, 3, 3), "twice": (9, 9)}
    biases = {"last": (9,), "first": (10, 1, 1), "groups": (2, 8, 1), "axes": (3, 3)}
    biases |= {"twice": (9,)}
    params: dict[str, Any] = {
        name: {"w": normal(i, *shapes[name]), "b": normal(i + 9, *biases[name])}
        for i, name in enumerate(shapes)
    }
    factored, added = (tuple(f"{name}/{kind}" for name in shapes) for kind in "wb")
    return Model(losses, params | {"heads": three(9)}, factored, added)


def no_biases():
    """What is added to a product, but not as a row of its matrix."""
    x = normal(0, 3, 9)

    def losses(p):
        h = jnp.tanh(x @ p["w0"] + p["along positions"][:, None])
        h = jnp.tanh(h @ p["w1"] + p["everywhere"])
        h = jnp.tanh(h @ p["w2"] + p["read again"][None]) * p["read again"][None]
        product = h @ p["w3"]
        h = jnp.tanh(product + p["product read again"][None]) - product
        h = jnp.tanh(h @ p["w4"] + p["two products"][None])
        h = jnp.tanh(h @ p["w5"] + p["two products"][None])
        h = jnp.tanh(h @ p["w6"] + p["once of two"][None]) @ p["w6"]
        h = jnp.tanh(h @ p["w7"] + p["scalar"])
        product = h @ p["w8"]
        h = jnp.tanh(product + p["handed over"][None])
        h = jnp.tanh(h @ p["w9"] + p["in a head"][None])
        return regressions(h, p["heads"]) + jnp.stack(
            [(product**2).mean(), product[0, 0], (p["in a head"] ** 2).mean()]
        )

    names = ("read again", "product read again", "two products", "once of two")
    params = {name: normal(i, 9) for i, name in enumerate((*names, "handed over"))}
    params |= {"along positions": normal(6, 3), "everywhere": normal(7, 3, 9)}
    params |= {"scalar": normal(8, 1)[0], "in a head": normal(9, 9)}
    weights = tuple(f"w{i}" for i in range(10))
    params |= {name: normal(20 + i, 9, 9) for i, name in enumerate(weights)}
    return Model(losses, params | {"heads": three(9)}, weights)


def attention():
    """Several axes contracted or free; the scale and bias of a LayerNorm."""
    x = normal(0, 2, 3, 16)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p["scale"][None, None] + p["bias"][None, None]

    def losses(p):
        h = norm(x, p["norm"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
        a = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        h = x + jnp.einsum("bhts,bshk,hkd->btd", a, v, p["o"])
        return regressions(h.mean(1), p["heads"])

    params = {name: normal(ord(name), 16, 2, 8) for name in "qkv"}
    params |= {"o": normal(4, 2, 8, 16), "heads": three(16)}
    params["norm"] = {"scale": 1 + 0.1 * normal(5, 16), "bias": normal(6, 16)}
    return Model(losses, params, ("k", "o", "q", "v"))


def orientations():
    """A batch axis in the weights; weights on the left; weights reshaped and turned."""
    x = normal(0, 3, 2, 10)

    def losses(p):
        h = jnp.tanh(jnp.einsum("geo,nge->ngo", p["grouped"], x))
        h = jnp.tanh(jnp.einsum("oge,nge->on", p["left"], h))
        h = jnp.tanh(-p["turned"].reshape(11, 8) @ h)
        return regressions(h.T, p["heads"])

    params = {"grouped": normal(1, 2, 10, 9), "left": normal(2, 8, 2, 9)}
    params |= {"turned": normal(3, 88), "heads": three(11)}
    return Model(losses, params, ("grouped", "left", "turned"))


def convolutions():
    """Padding, strides, holes in the kernel and in the input, both layouts; a pool."""
    x = normal(0, 2, 4, 4, 8)

    def conv(x, w, **options):
        options = {"window_strides": (1, 1), "padding": "SAME"} | options
        numbers = options.pop("layout", ("NHWC", "HWIO", "NHWC"))
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    def losses(p):
        h = jnp.tanh(conv(x, p["same"]))
        h = jnp.tanh(conv(h, p["strided"], window_strides=(2, 1), padding="VALID"))
        h = h.transpose(0, 3, 1, 2)
        holes = {"rhs_dilation": (1, 2), "lhs_dilation": (2, 1)}
        holes |= {"padding": ((1, 0), (2, -1)), "layout": ("NCHW", "OIHW", "NCHW")}
        h = jnp.tanh(conv(h, p["holes"], **holes))
        h = jax.lax.reduce_window(
            h, -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "VALID"
        )
        h = conv(h, p["grouped"], feature_group_count=2, layout=holes["layout"])
        return regressions(h.mean((2, 3)), p["heads"])

    params = {"same": normal(1, 3, 3, 8, 20), "strided": normal(2, 3, 2, 20, 8)}
    params |= {"holes": normal(3, 14, 8, 2, 2), "grouped": normal(4, 4, 7, 1, 1)}
    params["heads"] = three(4)
    return Model(losses, params, ("same", "strided", "holes"))


def lookups():
    """Rows read repeatedly, once, never, and from outside of the table."""
    ids = jnp.array([[3, 3, 17, -1], [40, 3, 41, 0]])

    def losses(p):
        h = jnp.take(p["filled"], ids, axis=0, mode="fill", fill_value=0.5)
        h = h + jnp.take(p["clipped"], ids, axis=0, mode="clip")
        h = h + p["plain"][ids % 30] + p["few"][ids % 5]
        h = h + p["columns"][:, ids % 30].transpose(1, 2, 0)
        return regressions(jnp.tanh(h).mean(1), p["heads"])

    params = {name: normal(i, 40, 6) for i, name in enumerate(("filled", "clipped"))}
    params |= {"plain": normal(5, 30, 6), "few": normal(6, 5, 6), "heads": three(6)}
    params["columns"] = normal(7, 6, 30)
    return Model(losses, params, ("clipped", "filled", "plain"))


def recurrent(scanned):
    """Five steps of one cell: a loop, or five uses of the same weights."""
    x = normal(0, 5, 2, 24)

    def losses(p):
        def cell(h, x):
            h = jnp.tanh(x @ p["in"] + h @ p["h"] + p["b"][None])
            return h, h

        h = jnp.zeros_like(p["h"][:2])
        if scanned:
            h, _ = jax.lax.scan(cell, h, jnp.asarray(x))
        else:
            for step in x:
                h, _ = cell(h, step)
        return regressions(h, p["heads"])

    params = {"in": normal(1, 24, 24), "h": normal(2, 24, 24), "b": normal(3, 24)}
    params["heads"] = three(24)
    return Model(losses, params, () if scanned else ("h", "in"))


def calls():
    """Bodies that are inlined (jit, remat), and bodies with rules of their own."""
    x = normal(0, 3, 9)

    @jax.custom_vjp
    def doubled(w):
        return w

    doubled.defvjp(lambda w: (w, None), lambda _, g: (2 * g,))

    @jax.jit
    def layer(p, h):
        return jnp.tanh(h @ p)

    def losses(p):
        h = layer(p["second"], jax.checkpoint(layer)(p["first"], x))
        h = layer(p["first"], h) @ doubled(p["custom"])
        h = jax.lax.cond(h.sum() > 0, lambda h, w: h @ w, lambda h, w: h, h, p["cond"])
        h = h * jax.nn.relu(p["clipped"])[None]
        return regressions(h, p["heads"])

    names = ("first", "second", "custom", "cond")
    params = {name: normal(i, 9, 9) for i, name in enumerate(names)}
    params |= {"clipped": normal(7, 9), "heads": three(9)}
    return Model(losses, params, ("first", "second"))


def tied():
    """Weights used in two layouts, twice in one product, or beside a product."""
    x = normal(0, 3, 10)

    def losses(p):
        h = jnp.tanh(x @ p["there_and_back"]) @ p["there_and_back"].T
        h = h @ (p["squared"] @ p["squared"]) + (p["free"] ** 2).sum()
        h = jnp.tanh(h) @ p["free"] + jnp.tanh(h @ p["siamese"]) - x @ p["siamese"]
        h = h @ (p["left"] @ p["right"])
        return regressions(h, p["heads"])

    names = ("there_and_back", "squared", "free", "siamese", "left", "right")
    params = {name: normal(i, 10, 10) for i, name in enumerate(names)}
    return Model(losses, params | {"heads": three(10)}, ("siamese",))


def normalised():
    """Scalars of the trunk, which conditions choose and all tasks share."""
    x = normal(0, 4, 8)

    def losses(p):
        norm = jnp.sqrt(jnp.sum(p["w"] ** 2))
        w = p["w"] / jnp.where(norm > 1e-3, norm, 1.0)
        h = jnp.tanh(x @ w)
        return regressions(h * jax.nn.logsumexp(h), p["heads"])

    return Model(losses, {"w": normal(1, 8, 8), "heads": three(8)})


def several_batches():
    """A forward pass per task, of different shapes: no trunk at all."""
    batches = [normal(i, n, 6) for i, n in enumerate((2, 3, 5))]

    def losses(p):
        hs = [jnp.tanh(x @ p["w"] + p["b"][None]) for x in batches]
        return jnp.array(
            [(h @ w).mean() ** 2 for h, w in zip(hs, p["heads"], strict=True)]
        )

    return Model(losses, {"w": normal(5, 6, 6), "b": normal(6, 6), "heads": three(6)})


def activations():
    """The trunk ends with several of them, read by heads, losses and the user."""
    x = normal(0, 3, 8)

    def losses(p):
        h = jax.nn.relu(jnp.tanh(x @ p["w"]) * 0.5 + 0.1)
        first, *others = p["heads"]
        extra = jnp.stack([h.mean(), h[0, 0], jnp.float32(0)])
        return regressions(h, [first, *others]) + extra, {"h": h, "next": h.sum()}

    params = {"w": normal(1, 8, 8), "heads": three(8)}
    return Model(losses, params, ("w",), has_aux=True)


def entangled():
    """Losses that depend on one another, on parameters alone, or on nothing."""
    x = normal(0, 3, 8)

    def losses(p):
        h = jnp.tanh(x @ p["w"]) + jnp.argmax(p["s"])
        first, second, third = regressions(h, p["heads"])
        stacked = jnp.stack([first, first * second, 1 + third, p["s"][0] ** 2, 2.0])
        stacked = jnp.where(stacked > 0.5, stacked, 0.5 + 3 * stacked)
        return stacked * jnp.exp(-p["log_variance"]) + p["log_variance"]

    # The losses mix before they are stacked, so that the heads are trunk too.
    found = ("w", "heads/0", "heads/1", "heads/2")
    params = {"w": normal(1, 8, 8), "heads": three(8), "s": normal(2, 4)}
    return Model(losses, params | {"log_variance": normal(3, 5)}, found)


def one_vector():
    """The losses come as one vector; own parameters are read before it is split."""
    x, y = normal(0, 3, 8), normal(1, 3, 4)

    def losses(p):
        h = jnp.tanh(x @ p["trunk"]["w"]) * (1 + p["heads"]["gate"][None])
        errors = (h @ p["heads"]["w"] - y) ** 2
        return 0.5 * errors.mean(0), {"features": h, "gate": p["heads"]["gate"], "n": 3}

    params = {"trunk": {"w": normal(2, 8, 8)}}
    params["heads"] = {"w": normal(3, 8, 4), "gate": normal(4, 8)}
    return Model(losses, params, ("trunk/w",), labels=HEADS, has_aux=True)


def one_task():
    def losses(p):
        return ((normal(0, 3, 8) @ p["w"]) ** 2).mean(keepdims=True)[0]

    return Model(losses, {"w": normal(1, 8, 8)})


def spectrum():
    """What the trunk hands to the heads may be complex."""
    x = normal(0, 3, 8)

    def losses(p):
        h = jnp.fft.rfft(x @ p["w"])
        outs = [jnp.real(h) @ w + jnp.imag(h**2) @ w for w in p["heads"]]
        return jnp.stack([jnp.mean((out - 1) ** 2) for out in outs])

    return Model(losses, {"w": normal(1, 8, 8), "heads": three(5)}, ("w",))


class Linen(linen.Module):
    """A convolution, batch statistics and a dense layer."""

    @linen.compact
    def __call__(self, x):
        h = linen.Conv(6, (1, 2), padding="VALID", use_bias=False)(x)
        h = linen.BatchNorm(use_running_average=False)(h)
        return linen.Dense(7, name="dense")(h.reshape(2, -1))


def in_linen():
    """Batch statistics couple the examples and come back as an auxiliary output."""
    x = normal(0, 2, 2, 2, 9)
    variables = jax.jit(Linen().init)(jax.random.key(0), x)
    statistics = jax.tree.map(np.asarray, variables["batch_stats"])

    def losses(p):
        model = {"params": p["model"], "batch_stats": statistics}
        h, new = Linen().apply(model, x, mutable=["batch_stats"])
        return regressions(h, p["heads"]), new

    params = {"model": variables["params"], "heads": three(7)}
    factored = ("model/Conv_0/kernel", "model/dense/kernel")
    return Model(losses, params, factored, ("model/dense/bias",), has_aux=True)


def in_nnx():
    model = nnx.Sequential(nnx.Linear(8, 9, rngs=nnx.Rngs(0)), jnp.tanh)
    graph, state = nnx.split(model)
    x = normal(0, 3, 8)

    def losses(p):
        return regressions(nnx.merge(graph, p["model"])(x), p["heads"])

    names = ("model/layers/0/kernel",), ("model/layers/0/bias",)
    return Model(losses, {"model": state, "heads": three(9)}, *names)


def in_equinox():
    model = eqx.nn.MLP(8, 9, 9, 1, key=jax.random.key(0), activation=jnp.tanh)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = normal(0, 3, 8)

    def losses(p):
        return regressions(jax.vmap(eqx.combine(p["model"], static))(x), p["heads"])

    layers = [f"model/layers/{i}" for i in range(2)]
    names = (tuple(f"{x}/{kind}" for x in layers) for kind in ("weight", "bias"))
    return Model(losses, {"model": params, "heads": three(9)}, *names)


MODELS = {
    "mlp": mlp,
    "biases": biases,
    "no biases": no_biases,
    "attention": attention,
    "orientations": orientations,
    "convolutions": convolutions,
    "lookups": lookups,
    "scan": lambda: recurrent(scanned=True),
    "unrolled rnn": lambda: recurrent(scanned=False),
    "calls": calls,
    "tied": tied,
    "normalised": normalised,
    "several batches": several_batches,
    "activations": activations,
    "entangled": entangled,
    "one vector": one_vector,
    "one task": one_task,
    "spectrum": spectrum,
    "linen": in_linen,
    "nnx": in_nnx,
    "equinox": in_equinox,
}


def names(leaves, params):
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = {stack.path_name(paths[leaf][0]) for leaf in leaves}
    return {name.removesuffix("/value") for name in names}  # of nnx variables


def cast(params, dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def split(tree, labels):
    """Shared and own leaves, as lists."""
    if labels is None:
        return jax.tree.leaves(tree), []
    shared = jax.tree.leaves(tree["trunk"])
    return shared, jax.tree.leaves(tree["heads"])


def every_way(pull, weights, rows):
    """The weighted gradient of the shared leaves, whichever way is the cheapest."""
    numbers = pull.leaves.numbers("shared")
    given, no_sums = (pull.uses.plan, pull.backward), dict.fromkeys(numbers, ())
    found = [
        evaluate.combine(*given, rows, weights, numbers, sums=no_sums),
        *(
            evaluate.gradient(*given, weights, numbers, seeds=None, heads_again=again)
            for again in (False, True)
        ),
    ]
    zeros = {leaf: jnp.zeros_like(pull.leaves.values[leaf]) for leaf in numbers}
    return [[(zeros | way)[leaf] for leaf in numbers] for way in found]


def compare(model, dtype, tolerance, strategy="vmap"):
    """Losses, Gramian, weighted gradients and aux, in one compiled program."""
    params = cast(model.params, dtype)

    def alone(p):
        return model.task_losses(p) if model.has_aux else (model.task_losses(p), None)

    def both(p):
        options = Options(has_aux=model.has_aux, labels=model.labels)
        uses = engine.find_uses(model.task_losses, p, options)
        assert names(uses.plan.factored, p) == set(model.factored)
        assert names(uses.plan.biases, p) == set(model.biases)
        pull = engine.linearize_uses(uses, options, name="test")
        weights = jnp.linspace(0.5, 2, pull.losses.shape[0], dtype=dtype)
        own = pull.own(weights) if model.labels is not None else []
        rows = pull.rows(Passes(strategy, 2))
        ways = [
            jax.tree.leaves(pull.shared(weights, rows)),
            *every_way(pull, weights, rows),
        ]
        found = pull.gramian(rows), ways, own

        rows, aux = jax.jacrev(alone, has_aux=True)(p)
        parts = split(rows, model.labels)
        mixed = [[jnp.tensordot(weights, g, 1) for g in part] for part in parts]
        expected = stack.gramian(parts[0]), [mixed[0]] * len(ways), mixed[1]
        return (found, pull.losses, pull.aux), (expected, alone(p)[0], aux)

    got, want = jax.jit(both)(params)
    close(got, want, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_jacobian_in_float64(name):
    with enable_x64(True):
        compare(MODELS[name](), jnp.float64, 1e-10)


@pytest.mark.deep
@pytest.mark.parametrize("strategy", ["unrolled", "map", "chunked"])
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_in_float64(name, strategy):
    with enable_x64(True):
        compare(MODELS[name](), jnp.float64, 1e-10, strategy)


@pytest.mark.deep
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_jacobian_in_float32(name):
    compare(MODELS[name](), jnp.float32, 1e-5)


@pytest.mark.parametrize("strategy", ["unrolled", "map", "chunked"])
def test_every_strategy(strategy):
    compare(mlp(), jnp.float32, 1e-5, strategy)


def test_half_precision_is_rounded_no_earlier_than_when_stacking():
    model = mlp()

    def losses(p):
        return model.task_losses(cast(p, jnp.bfloat16)).astype(jnp.float32)

    compare(model._replace(task_losses=losses), jnp.float32, 0.03)


@pytest.mark.parametrize(
    "name", ["mlp", pytest.param("convolutions", marks=pytest.mark.deep)]
)
def test_in_parts(name, monkeypatch):
    """What large models do: gradients formed piece by piece, tasks one by one."""
    monkeypatch.setattr(contract, "_LIVE", 100)
    model = MODELS[name]()
    with enable_x64(True):
        compare(model, jnp.float64, 1e-10)
        monkeypatch.setattr(plan, "choose", lambda *_: contract.formed)
        compare(model, jnp.float64, 1e-10)


def test_every_way_leaves_out_an_absent_task():
    model = mlp()
    params = cast(model.params, jnp.float32)
    options = Options(labels=model.labels)
    uses = engine.find_uses(model.task_losses, params, options)
    mask = jnp.array([True, False, True])
    pull = engine.linearize_uses(uses, options, mask=mask, name="test")
    rows = pull.rows(Passes("vmap", 2))
    # A weight that the mask alone keeps from the update.
    weights = jnp.array([0.5, 7.0, 2.0])
    jacobian = split(jax.jacrev(model.task_losses)(params), model.labels)[0]
    present = jnp.where(mask, weights, 0)
    expected = [jnp.tensordot(present, g, 1) for g in jacobian]
    for way in every_way(pull, weights, rows):
        close(way, expected, 1e-5)


PARAMS = cast(mlp().params, jnp.float32)
SHARED = mtljax.shared_params(PARAMS, HEADS)
ALL, SOME = jnp.ones(3, bool), jnp.array([True, False, True])
GRAMIAN = [case for case in CASES if case.build(3).needs == "gramian"]


def two_engines(case, dtype, tolerance):
    """Three steps with both engines, one of them without one of the tasks."""
    balancer = case.build(3)
    task_losses = mlp().task_losses
    steps = [
        jax.jit(
            mtljax.value_and_balanced_grad(
                task_losses, balancer, labels=HEADS, engine=name, heads="weighted"
            )
        )
        for name in ("gramian", "stacked")
    ]
    params = cast(PARAMS, dtype)
    states = [balancer.init(SHARED)] * 2
    for mask in (ALL, SOME, ALL):
        results = [
            step(params, state, mask=mask)
            for step, state in zip(steps, states, strict=True)
        ]
        losses, grads, states = zip(*results, strict=True)
        close(losses[0], losses[1])
        close(grads[0], grads[1], tolerance)
        np.testing.assert_allclose(
            states[0].task_weights, states[1].task_weights, rtol=1e-3, atol=1e-5
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads[1])


@pytest.mark.parametrize("name", ["mgda", "pcgrad"])
def test_methods(name):
    case = next(c for c in GRAMIAN if c.name == name and not c.options)
    two_engines(case, jnp.float32, 1e-4)


@pytest.mark.deep
@pytest.mark.parametrize("case", GRAMIAN, ids=lambda case: case.id)
def test_every_method_in_float64(case):
    with enable_x64(True):
        two_engines(case, jnp.float64, 1e-6)


class Weights(NamedTuple):
    task_weights: Any


def equal_norms():
    """A smooth function of the Gramian, and a cheap one."""

    def weigh(state, *, losses, gramian, mask):
        return jax.lax.rsqrt(jnp.diag(gramian)) + 0.1 * gramian.sum(0), state

    return from_weights(
        "equal_norms",
        3,
        init=lambda: Weights(jnp.ones(3)),
        weigh=weigh,
        needs="gramian",
        native="free",
    )


def test_the_update_can_be_differentiated():
    model, balancer = mlp(), equal_norms()
    with enable_x64(True):
        params = cast(model.params, jnp.float64)

        @jax.jit
        def derivatives(p):
            def total(p, name):
                step = mtljax.value_and_balanced_grad(
                    model.task_losses, balancer, labels=HEADS, engine=name
                )
                _, update, _ = step(p, balancer.init(SHARED))
                return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(update))

            return [jax.grad(total)(p, name) for name in ("gramian", "stacked")]

        got, want = derivatives(params)
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want)) > 0.1
        close(got, want, 1e-9)


def test_an_absent_task_may_have_a_loss_that_is_not_finite():
    """Even its derivative may: every task's part of a backward pass is its own."""
    model = mlp()

    def broken(p):
        losses = model.task_losses(p)
        return jnp.stack([losses[0], jnp.nan * losses[1], losses[2]])

    steps = [
        mtljax.value_and_balanced_grad(
            f, mtljax.mgda(3), labels=HEADS, engine="gramian"
        )
        for f in (broken, model.task_losses)
    ]

    @jax.jit
    def both(p, mask):
        return [step(p, mtljax.mgda(3).init(p), mask=mask)[1:] for step in steps]

    (got, state), (want, _) = both(PARAMS, SOME)
    close(got["trunk"], want["trunk"])
    assert np.isfinite(state.task_weights).all()
    assert np.isnan(got["heads"][1]).all()
    (got, _), _ = both(PARAMS, ALL)
    assert np.isnan(got["trunk"][0]["w"]).all()


def test_compiles_once():
    traces = []

    def counted(p):
        traces.append(1)
        return mlp().task_losses(p)

    balancer = mtljax.mgda(3)
    step = mtljax.value_and_balanced_grad(
        counted, balancer, labels=HEADS, engine="gramian"
    )
    step, state, params = jax.jit(step), balancer.init(SHARED), PARAMS
    for _ in range(3):
        _, grad, state = step(params, state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
    assert len(traces) == 1
    assert step._cache_size() == 1


def test_products_of_two_batches():
    def task_losses(p, ids, x):
        h = jnp.tanh(p["table"][ids] + x @ p["w"] + p["b"][None])
        return regressions(h @ p["v"] + p["c"][None], p["heads"])

    params = {"table": normal(1, 40, 6), "w": normal(2, 9, 6), "b": normal(3, 6)}
    params["c"] = normal(7, 8)
    params |= {"v": normal(4, 6, 8), "heads": three(8)}
    first = np.array([1, 5, 5]), normal(5, 3, 9)
    second = np.array([5, 7, 1, 0]), normal(6, 4, 9)
    with enable_x64(True):
        params = cast(params, jnp.float64)

        @jax.jit
        def both(p):
            found = [
                mtljax.gradients.cross_task_gramian(task_losses, engine=name)(
                    p, first, second
                )
                for name in ("gramian", "stacked")
            ]
            rows = [jax.jacrev(task_losses)(p, *batch) for batch in (first, second)]
            losses = [task_losses(p, *batch) for batch in (first, second)]
            return found, (*losses, stack.cross_gramian(*rows))

        found, expected = both(params)
        for got in found:
            close(got, expected, 1e-10)


def choice(task_losses, params, *args):
    """What "auto" decides from shapes."""
    params = jax.tree.map(jnp.zeros, params, is_leaf=is_shape)

    def function(p):
        return task_losses(p, *args)

    return engine.choose("auto", function, params, Options())


def chosen(*args):
    """Whether it takes the engine."""
    return choice(*args).uses is not None


def is_shape(node):
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def dense(p, x):
    for w in p["trunk"]:
        x = jnp.tanh(x @ w)
    return regressions(x, p["heads"])


def test_auto_compares_the_work():
    params = {"trunk": [(512, 512)] * 3, "heads": [(512,)] * 3}
    assert chosen(dense, params, jnp.zeros((128, 512)))
    assert not chosen(dense, params, jnp.zeros((4096, 512)))
    tiny = {"trunk": [(8, 8)] * 3, "heads": [(8,)] * 3}
    assert not chosen(dense, tiny, jnp.zeros((2, 8)))

    def convolution(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return regressions(h.mean((1, 2)), p["heads"])

    for tasks in (3, 40):
        images = {"w": (3, 3, 8, 16), "heads": [(16,)] * tasks}
        uses, passes = choice(convolution, images, jnp.zeros((32, 28, 28, 8)))
        assert uses is None or not uses.plan.factored
        if jax.default_backend() == "cpu":
            assert passes.strategy == "map"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
@pytest.mark.parametrize("strategy", ["unrolled", "map", "vmap"])
@pytest.mark.parametrize("name", ["gramian", "stacked"])
def test_all_convolutions_of_a_step_are_in_the_order_of_the_library(name, strategy):
    """Elsewhere than at the top of a program XLA:CPU would not sort their axes."""

    def convolve(x, kernel):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=axes
        )

    def task_losses(p, x):
        h = jnp.tanh(convolve(jnp.tanh(convolve(x, p["first"])), p["second"]))
        outs = [convolve(h, head) for head in p["heads"]]
        return jnp.stack([(out**2).mean() for out in outs])

    params = {
        "first": jnp.ones((3, 3, 2, 4)),
        "second": jnp.ones((3, 3, 4, 64)),
        "heads": [jnp.ones((1, 1, 64, 2))] * 3,
    }
    labels = {"first": "shared", "second": "shared", "heads": "own"}
    balancer = mtljax.upgrad(3)
    grad_fn = mtljax.value_and_balanced_grad(
        task_losses, balancer, labels=labels, engine=name, strategy=strategy
    )
    # A kernel whose gradient is formed, and one whose gradient is not.
    x = jnp.ones((2, 4, 4, 2))
    text = str(jax.make_jaxpr(grad_fn)(params, balancer.init(params), x))
    found = set(re.findall(r"ConvDimensionNumbers\(.*", text))
    assert len(found) == 1
    assert "rhs_spec=(3, 2, 0, 1)" in found.pop()


def test_auto_makes_values_that_do_not_fit_for_some_tasks_at_a_time():
    params = {"trunk": [(64, 64)] * 2, "heads": [(64,)] * 40}
    found = [
        choice(dense, params, jnp.zeros((examples, 64))).passes
        for examples in (1 << 10, 1 << 14, 1 << 18)
    ]
    if jax.default_backend() == "cpu":
        assert [one.strategy for one in found] == ["vmap", "chunked", "map"]
        assert found[1].chunk_size == 2


def test_auto_keeps_heads_out_of_a_loop():
    # Both ways form the gradients of the trunk; one runs all heads in every pass.
    heads = [(64,)] * 40
    params = {"trunk": [(64, 64)] * 2, "heads": heads}
    x = jnp.zeros((1 << 18, 64))
    uses, passes = choice(dense, params, x)
    assert uses is not None
    if jax.default_backend() == "cpu":
        assert passes.strategy == "map"


def test_auto_stacks_what_the_engine_would_spoil():
    params = {"trunk": [(512, 512)] * 3, "heads": [(512,)] * 3}
    x = jnp.zeros((128, 512))
    assert not chosen(jax.checkpoint(dense), params, x)

    def branching(p, x):
        return dense(p, x) if p["trunk"][0][0, 0] == 0 else dense(p, -x)

    assert not chosen(branching, params, x)


def test_a_batch_per_task_costs_one_backward_pass():
    def losses(p, xs):
        return jnp.stack([jnp.tanh(x @ p["w"]).sum() for x in xs])

    params = {"w": (256, 256)}
    assert chosen(losses, params, jnp.zeros((5, 64, 256)))
    flops = [
        jax.jit(mtljax.task_gramian(losses, engine=name, strategy="unrolled"))
        .lower({"w": jnp.zeros((256, 256))}, jnp.zeros((5, 64, 256)))
        .compile()
        .cost_analysis()["flops"]
        for name in ("gramian", "stacked")
    ]
    assert flops[0] < 0.5 * flops[1]


def test_the_gradients_are_not_formed():
    """Twenty tasks, four examples: less work, and no array of T gradients."""
    params = {"trunk": [jnp.zeros((128, 128))] * 2, "heads": [jnp.zeros(128)] * 20}
    programs = [
        jax.jit(mtljax.task_gramian(dense, engine=name, strategy="vmap"))
        .lower(params, jnp.zeros((4, 128)))
        .compile()
        for name in ("gramian", "stacked")
    ]
    flops = [program.cost_analysis()["flops"] for program in programs]
    assert flops[0] < 0.4 * flops[1]
    memory = [program.memory_analysis().temp_size_in_bytes for program in programs]
    rows = 4 * 20 * 2 * 128 * 128
    assert memory[0] < 0.3 * rows < 0.5 * memory[1]


@pytest.mark.deep
def test_memory_at_forty_tasks():
    """The model of the benchmark: at most a third of what stacking needs."""
    shapes = (256, 512), (512, 512), (512, 512)
    params = {
        "trunk": [jnp.zeros(shape) for shape in shapes],
        "heads": [jnp.zeros(512)] * 40,
    }
    memory = []
    for name in ("gramian", "stacked"):
        balancer = mtljax.mgda(40)
        step = mtljax.value_and_balanced_grad(
            dense, balancer, labels=HEADS, engine=name
        )
        inputs = params, balancer.init({}), jnp.zeros((128, 256))
        program = jax.jit(step).lower(*inputs).compile()
        memory.append(program.memory_analysis().temp_size_in_bytes)
    assert memory[0] < memory[1] / 3


@pytest.mark.usefixtures("as_users")
def test_errors():
    p = {"a": jnp.ones((2, 2)), "n": jnp.ones(2, int)}
    with pytest.raises(ValueError, match=r"'n' has dtype int32; only real floating"):
        mtljax.task_gramian(lambda p: p["a"].sum(1), engine="gramian")(p)
    p["n"] = jnp.ones(2, complex)
    with pytest.raises(ValueError, match=r"'n' has dtype complex64; only real float"):
        mtljax.task_gramian(lambda p: p["a"].sum(1), engine="gramian")(p)
    with pytest.raises(ValueError, match="task_gramian: engine='loss' is not one of"):
        mtljax.task_gramian(lambda p: p, engine="loss")
    balancer = mtljax.graddrop(2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"'gramian' does not support graddrop.*grads"):
        mtljax.value_and_balanced_grad(lambda p: p, balancer, engine="gramian")
    p = jnp.ones(3)
    gramian = mtljax.task_gramian(lambda p: p, engine="gramian", strategy="loop")
    with pytest.raises(ValueError, match="strategy='loop' is not one of 'auto'"):
        gramian(p)
    gramian = mtljax.task_gramian(lambda p: p.sum(), engine="gramian")
    with pytest.raises(ValueError, match="vector of T scalar losses"):
        gramian(p)
    cross = mtljax.gradients.cross_task_gramian(lambda p, x: p * x)
    with pytest.raises(ValueError, match="returns 3 losses on the first batch and 6"):
        cross(jnp.ones(1), (jnp.ones(3),), (jnp.ones(6),))


def rows_of_positions(p, x):
    h = (jnp.tanh(x @ p["w"]) @ p["v"]).mean(1)
    return jnp.stack([jnp.mean((h - i) ** 2) for i in range(2)])


def images(p, x):
    axes, window = ("NHWC", "HWIO", "NHWC"), (1, 2, 2, 1)
    h = jax.lax.conv_general_dilated(
        x[..., None], p["w"][None, :, None], (1, 1), "SAME", dimension_numbers=axes
    )
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, window, "VALID")
    h = jnp.tanh(h).mean((1, 2)) @ p["v"]
    return jnp.stack([jnp.mean((h - i) ** 2) for i in range(5)])


@pytest.mark.parametrize(
    ("task_losses", "strategy"),
    [
        (rows_of_positions, "vmap"),
        (rows_of_positions, "unrolled"),
        (images, "unrolled"),
        (images, "map"),
    ],
)
@pytest.mark.parametrize(
    "kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.deep)]
)
def test_sharded_batches(kind, task_losses, strategy):
    """With shardings as part of types, as under ``jax.set_mesh``."""
    params = {"w": jnp.ones((8, 4)), "v": jnp.ones((4, 4))}
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    losses, expected = mtljax.task_gramian(task_losses, engine="stacked")(params, x)
    kinds = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((1,), ("data",), axis_types=kinds)
    spec = jax.sharding.PartitionSpec
    set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh  # jax 0.7
    with set_mesh(mesh):
        at = jax.sharding.NamedSharding(mesh, spec("data"))
        sharded = jax.device_put(x, at)
        everywhere = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec()))
        for engine in ("gramian", "stacked"):
            gramian = mtljax.task_gramian(task_losses, engine=engine, strategy=strategy)
            here, found = jax.jit(gramian)(everywhere, sharded)
            np.testing.assert_allclose(here, losses, 1e-5)
            np.testing.assert_allclose(found, expected, 1e-5)


def test_activations_at_the_end_of_the_trunk_belong_to_the_heads():
    """So that no pass through the trunk has to undo them for all tasks."""
    x = normal(0, 3, 8)

    def handed(trunk, **params):
        params = cast({"w": normal(1, 8, 8), "heads": three(8)} | params, jnp.float32)

        def losses(p):
            return regressions(trunk(x @ p["w"], p), p["heads"])

        found = engine.find_uses(losses, params, Options()).plan.stages
        ends = (op for op in found.trunk if found.outputs.intersection(op.outs))
        return {op.primitive.name for op in ends}

    scale = jnp.ones((1, 8))
    assert handed(lambda h, p: h) == {"dot_general"}
    assert handed(lambda h, p: jax.nn.relu(h)) == {"dot_general"}
    assert handed(lambda h, p: jax.nn.relu(jnp.tanh(h) * 0.5)) == {"dot_general"}
    # What a parameter scales, what is read inside too, or a change of precision.
    assert handed(lambda h, p: jnp.tanh(h) * p["s"], s=scale) == {"mul"}
    assert handed(lambda h, p: h * jnp.tanh(h)) == {"mul"}
    half = handed(lambda h, p: h.astype(jnp.bfloat16).astype(jnp.float32))
    assert half == {"convert_element_type"}
