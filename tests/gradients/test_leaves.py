"""Leaves that are no real arrays, and trees with empty, missing or scalar leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtljax
from mtljax.alternating import alternate
from mtljax.sharpness import value_and_flat_grad

pytestmark = pytest.mark.usefixtures("as_users")

T = 2
W = jnp.array([1.0, 2.0])
CAGRAD, LINEAR = mtljax.cagrad(T), mtljax.linear(T)
NOT_TRAINED = {
    "int32": jnp.array([1, 2]),
    "bool": np.array([True, False]),
    "int": 3,
    "key<fry>": jax.random.key(0),
    "str": "relu",
}
EMPTY = {"none": None, "empty": jnp.zeros((3, 0)), "dict": {}}


def task_losses(params, x=1.0):
    """The losses |w|² and |w - 1|², and ± Σ |e|² of another leaf."""
    w, other = params["w"] * x, jnp.zeros(())
    e = params.get("e")
    if isinstance(e, jax.Array) and jnp.issubdtype(e.dtype, jnp.inexact):
        real = jnp.abs(e) if jnp.iscomplexobj(e) else e.astype(jnp.float32)
        other = (real**2).sum()
    return jnp.stack([(w**2).sum() + other, ((w - 1) ** 2).sum() - other / 2])


def balanced(balancer, params, *args, **options):
    step = mtljax.value_and_balanced_grad(task_losses, balancer, **options)
    return step(params, balancer.init(params), *args)[1]


def one_loss(params, x):
    return (params["w"] * x).sum()


CALLS = {
    "rows": mtljax.value_and_task_grads(task_losses),
    "losses": lambda p: balanced(LINEAR, p),
    "auto": lambda p: balanced(CAGRAD, p),
    "stacked": lambda p: balanced(CAGRAD, p, engine="stacked"),
    "gramian": lambda p: balanced(CAGRAD, p, engine="gramian"),
    "measure": lambda p: balanced(CAGRAD, p, measure="w"),
    "reuse": lambda p: balanced(mtljax.reuse(CAGRAD, every=2), p),
    "grads": lambda p: balanced(mtljax.graddrop(T, key=jax.random.key(0)), p),
    "micro": lambda p: balanced(CAGRAD, p, jnp.ones(2), micro_batches=2),
    "separate": lambda p: mtljax.value_and_balanced_grad(
        mtljax.separate(one_loss, (None, 0)), LINEAR
    )(p, LINEAR.init(p), jnp.ones((T, 2))),
    "task_gramian": mtljax.task_gramian(task_losses),
    "cross": lambda p: mtljax.cross_task_gramian(task_losses)(p, (1.0,), (2.0,)),
    "flat": lambda p: value_and_flat_grad(task_losses, CAGRAD, rho=0.1)(
        p, value_and_flat_grad(task_losses, CAGRAD, rho=0.1).init({"w": W})
    ),
    "check_labels": lambda p: mtljax.check_labels(
        task_losses, {"w": "shared", "e": "own"}, p
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", NOT_TRAINED)
def test_a_leaf_without_gradient_is_named_by_every_function(kind, name):
    with pytest.raises(ValueError, match=rf"parameter 'e' .*{kind}.*in another argum"):
        CALLS[name]({"w": W, "e": NOT_TRAINED[kind]})


@pytest.mark.parametrize("kind", list(NOT_TRAINED)[:-1])
def test_alternating_steps_name_a_leaf_without_gradient(kind):
    method = alternate(optax.sgd(0.1), T, key=jax.random.key(0))
    with pytest.raises(ValueError, match=rf"alternate: parameter 'e' .*{kind}"):
        method.init({"w": W, "e": NOT_TRAINED[kind]})


@pytest.mark.parametrize("kind", list(NOT_TRAINED)[:-1])
def test_a_frozen_leaf_may_have_any_dtype(kind):
    params = {"w": W, "e": NOT_TRAINED[kind]}
    labels = {"w": "shared", "e": "frozen"}
    expected = balanced(CAGRAD, {"w": W})
    found = balanced(CAGRAD, params, labels=labels, engine="stacked")
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)
    mtljax.check_labels(task_losses, labels, params)


NO_GRAMIAN = {"rows", "losses", "measure", "separate", "check_labels"}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NO_GRAMIAN])
def test_a_complex_leaf_has_no_gramian(name):
    with pytest.raises(ValueError, match=r"'e' has dtype complex64; only real float"):
        CALLS[name]({"w": W, "e": jnp.array([1 + 2j])})


def test_a_complex_leaf_with_constant_weights_is_that_of_jax():
    params = {"w": W, "e": jnp.array([1 + 2j, -1j])}
    weights = jnp.array([1.0, 3.0])
    expected = jax.grad(lambda p: task_losses(p) @ weights)(params)
    balancer = mtljax.linear(T, weights=weights)
    found = balanced(balancer, params)
    for key in params:
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-6)
    rows = mtljax.value_and_task_grads(task_losses)(params)[1]
    row = jax.grad(lambda p: task_losses(p)[1])(params)
    np.testing.assert_allclose(rows["e"][1], row["e"], rtol=1e-6)


def test_a_complex_head_is_not_balanced():
    params = {"w": W, "e": jnp.array([1 + 2j])}
    labels = {"w": "shared", "e": "own"}
    total = jax.grad(lambda p: task_losses(p).sum())(params)["e"]
    for engine in ("auto", "stacked"):
        found = balanced(CAGRAD, params, labels=labels, engine=engine)["e"]
        np.testing.assert_allclose(found, total, rtol=1e-6)


def test_a_leaf_of_eight_bits_is_named():
    grads = {"w": jnp.ones((T, 2), jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match="'w' has dtype float8_e4m3fn; only leaves of"):
        CAGRAD.update(grads, CAGRAD.init(grads))
    with pytest.raises(ValueError, match="'e' has dtype float8_e4m3fn; only leaves of"):
        balanced(CAGRAD, {"w": W, "e": grads["w"][0]})


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("engine", ["auto", "stacked", "gramian"])
def test_an_empty_leaf_changes_nothing(kind, engine):
    params = {"w": W, "e": EMPTY[kind]}
    found = balanced(CAGRAD, params, engine=engine)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    expected = balanced(CAGRAD, {"w": W}, engine=engine)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


def test_an_empty_leaf_of_a_group_of_its_own():
    balancer = mtljax.per_layer(mtljax.mgda(T))
    params = {"a": jnp.ones(1), "s": jnp.ones(()), "z": jnp.zeros((0, 2)), "n": None}
    column = jnp.array([1.0, 3.0])
    grads = {"a": column[:, None], "s": column, "z": jnp.zeros((T, 0, 2)), "n": None}
    update, _ = balancer.update(grads, balancer.init(params), params)
    assert update["a"].tolist() == [1.0]
    assert float(update["s"]) == 1.0
    assert update["z"].shape == (0, 2)


@pytest.mark.parametrize("scalar", [2.5, np.float32(2.5), jnp.float32(2.5)])
def test_a_scalar_is_an_array_of_one_entry(scalar):
    def losses(p):
        return task_losses({"w": p["w"], "e": jnp.asarray(p["e"])})

    expected, found = (
        mtljax.value_and_balanced_grad(losses, CAGRAD)(p, CAGRAD.init(p))[1]
        for p in ({"w": W, "e": jnp.array([2.5])}, {"w": W, "e": scalar})
    )
    assert found["e"].shape == ()
    np.testing.assert_allclose(found["e"], expected["e"][0], rtol=1e-6)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize("params", [{}, {"a": None}, ()])
def test_an_empty_tree_cannot_be_balanced(params):
    def losses(_):
        return jnp.ones(T)

    for engine in ("auto", "stacked", "gramian"):
        step = mtljax.value_and_balanced_grad(losses, CAGRAD, engine=engine)
        with pytest.raises(ValueError, match="no parameter is shared"):
            step(params, CAGRAD.init(params))
    with pytest.raises(ValueError, match="no parameter is shared"):
        mtljax.task_gramian(losses)(params)
    with pytest.raises(ValueError, match="the gradients are an empty tree"):
        mtljax.stack.gramian(params)
    # Constant weights need no gradients, as in jax.grad.
    assert mtljax.value_and_task_grads(losses)(params)[1] == params
    step = mtljax.value_and_balanced_grad(losses, LINEAR)
    assert step(params, LINEAR.init(params))[1] == params


def test_a_representation_may_contain_integers():
    def encode(p):
        return {"h": 2 * p["w"], "mask": jnp.array([1, 0]), "b": jnp.array([0, 1]) > 0}

    def heads(_, z):
        return jnp.stack([(z["h"] ** 2 * z["mask"]).sum(), (z["h"] * z["b"]).sum()])

    through = mtljax.through(encode, heads)
    # With h = 2 w = (2, 4), the rows are (2 h_1, 0) and (0, 1): the Gramian is diagonal
    # with the entries 16 and 1, and the weights of MGDA are 1/17 and 16/17.
    step = mtljax.value_and_balanced_grad(
        through, mtljax.mgda(T), measure="representation"
    )
    params = {"w": W}
    _, grad, _ = step(params, mtljax.mgda(T).init(params))
    np.testing.assert_allclose(grad["w"], [8 / 17, 32 / 17], rtol=1e-5)
    wave = mtljax.through(lambda p: jnp.fft.fft(p["w"]), lambda p, z: jnp.abs(z))
    step = mtljax.value_and_balanced_grad(wave, CAGRAD, measure="representation")
    with pytest.raises(ValueError, match=r"the representation .* has dtype complex64"):
        step(params, CAGRAD.init(params))


def test_check_labels_accepts_named_losses_and_frozen_leaves_of_any_dtype():
    params = {"h": jnp.ones(2), "w": W, "n": jnp.array(3), "k": jax.random.key(0)}
    labels = {"h": "own", "w": "shared", "n": "frozen", "k": "frozen"}

    def right(p):
        return {"seg": p["h"].sum() + p["w"].sum(), "depth": (p["w"] ** 2).sum()}

    def wrong(p):
        return {"seg": p["h"].sum(), "depth": p["h"].sum() * p["w"].sum()}

    mtljax.check_labels(right, labels, params)
    with pytest.raises(ValueError, match=r"'h' .* tasks \['seg', 'depth'\] all depend"):
        mtljax.check_labels(wrong, labels, params)
