"""The network for molecules, against a matrix for every edge in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import models
from mtljax.models.mpnn import MPNN

ATOMS, WIDTH, EDGE, FEATURES = 5, 4, 6, 3
RNG = np.random.default_rng(0)


def bonded(count=3):
    """Molecules of three to five atoms, with bonds of all types."""
    x = np.zeros((count, ATOMS, 5 + ATOMS), np.uint8)
    for i in range(count):
        n = 3 + i % 3
        x[i, :n, 0] = RNG.integers(6, 10, n)
        x[i, :n, 1] = RNG.integers(0, 4, n)
        x[i, :n, 2] = RNG.integers(0, 3, n)
        x[i, :n, 3] = RNG.integers(0, 4, n)
        x[i, :n, 4] = RNG.integers(0, 2, n)
        for a, b in [(0, 1), (1, 2), (0, 2)] + [(2, k) for k in range(3, n)]:
            x[i, a, 5 + b] = x[i, b, 5 + a] = RNG.integers(1, 5)
    return x[..., None]


def placed(count=3):
    x = np.zeros((count, ATOMS, 4), np.float32)
    for i in range(count):
        n = 3 + i % 3
        x[i, :n, 0] = RNG.choice([1, 6, 7, 8, 9], n)
        x[i, :n, 1:] = RNG.normal(size=(n, 3))
    return x[..., None]


INPUTS = {"bonds": bonded(), "distances": placed()}
each = pytest.mark.parametrize("edges", INPUTS)


@functools.cache
def made(edges):
    trunk = MPNN(edges=edges, width=WIDTH, edge_width=EDGE, features=FEATURES)
    model = models.multitask(trunk, {"mu": 1, "cv": 1})
    variables = jax.jit(model.init)(jax.random.key(0), INPUTS[edges])
    apply = jax.jit(lambda p, x: model.apply((p, {}), x, train=True)[0])
    return apply, variables.params


def run(edges, x):
    apply, params = made(edges)
    return np.stack([np.asarray(v[:, 0]) for v in apply(params, x).values()], -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(params, x, edges):
    """One molecule, without its padding, float64."""
    trunk = jax.tree.map(lambda v: np.asarray(v, np.float64), params["trunk"])
    dense = lambda name, v: v @ trunk[name]["kernel"] + trunk[name]["bias"]
    real = x[:, 0] > 0
    n = int(real.sum())
    x = x[:n].astype(np.float64)
    near = {}
    if edges == "bonds":
        columns = [np.eye(4)[x[:, 0].astype(int) - 6], np.eye(3)[x[:, 2].astype(int)]]
        columns += [np.eye(4)[x[:, 3].astype(int)], x[:, 4:5], x[:, 1:2]]
        for i in range(n):
            for j in range(n):
                if x[i, 5 + j]:
                    near[i, j] = np.eye(4)[int(x[i, 5 + j]) - 1]
    else:
        columns = [(x[:, :1] == [1, 6, 7, 8, 9]).astype(float)]
        for i in range(n):
            for j in range(n):
                if i != j:
                    near[i, j] = np.linalg.norm(x[i, 1:] - x[j, 1:])[None]
    h = np.maximum(dense("embed", np.concatenate(columns, -1)), 0)
    matrices = {
        pair: dense("edge_out", np.maximum(dense("edge_hidden", e), 0)).reshape(
            WIDTH, WIDTH
        )
        for pair, e in near.items()
    }
    for _ in range(3):
        m = np.zeros_like(h)
        for i in range(n):
            sent = [h[j] @ a for (k, j), a in matrices.items() if k == i]
            m[i] = np.mean(sent, 0) if sent else 0
        a, b = dense("gru_in", np.maximum(m, 0)), dense("gru_state", h)
        r, z = (sigmoid(a[:, k : k + WIDTH] + b[:, k : k + WIDTH]) for k in (0, WIDTH))
        new = np.tanh(a[:, 2 * WIDTH :] + r * b[:, 2 * WIDTH :])
        h = (1 - z) * new + z * h
    q, c, answer = np.zeros(WIDTH), np.zeros(WIDTH), np.zeros(2 * WIDTH)
    for _ in range(3):
        gates = dense("lstm_in", answer) + dense("lstm_state", q)
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        q = sigmoid(o) * np.tanh(c)
        e = np.exp(h @ q)
        answer = np.concatenate([q, (e / e.sum()) @ h])
    features = np.maximum(dense("out", answer), 0)
    heads = params["heads"].values()
    return [features @ np.asarray(p["kernel"])[:, 0] + p["bias"][0] for p in heads]


@each
def test_matches_numpy(edges):
    found = run(edges, INPUTS[edges])
    _, params = made(edges)
    for molecule, values in zip(INPUTS[edges], found, strict=True):
        wanted = reference(params, molecule[..., 0], edges)
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5)


@each
def test_the_order_of_the_atoms_does_not_matter(edges):
    x = INPUTS[edges]
    order = np.array([3, 0, 4, 1, 2])  # padding goes between atoms
    moved = x[:, order]
    if edges == "bonds":
        moved = np.concatenate([moved[:, :, :5], moved[:, :, 5:][:, :, order]], 2)
    np.testing.assert_allclose(run(edges, moved), run(edges, x), rtol=1e-4, atol=1e-5)


def test_moving_and_turning_a_molecule_changes_nothing():
    x = INPUTS["distances"].copy()
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    moved = x.copy()
    moved[..., 1:, 0] = x[..., 1:, 0] @ turn + np.array([1.0, -2.0, 0.5])
    moved[x[..., 0, 0] == 0] = 0
    np.testing.assert_allclose(
        run("distances", moved), run("distances", x), rtol=1e-3, atol=1e-4
    )


@each
def test_gradients_are_finite_and_reach_every_parameter(edges):
    apply, params = made(edges)
    x = INPUTS[edges]
    loss = lambda p: sum(jnp.square(v - 1).sum() for v in apply(p, x).values())
    grads = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.parametrize(
    ("edges", "shape", "message"),
    [
        ("bonds", (2, 9, 4, 1), r"takes molecules \[batch, atoms, 5 \+ atoms, 1\]"),
        ("bonds", (2, 9, 14), r"the input has shape \(2, 9, 14\)"),
        ("distances", (2, 9, 14, 1), r"takes molecules \[batch, atoms, 4, 1\]"),
    ],
)
def test_wrong_shapes(edges, shape, message):
    model = models.multitask(MPNN(edges=edges), {"a": 1})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
