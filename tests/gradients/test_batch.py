"""The batched pass of the Gramian engine: equal to vmap, and nothing is moved."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from mtljax.gradients._rewrite.batch import batch

KEYS = jax.random.split(jax.random.key(0), 8)
W = jax.random.normal(KEYS[0], (5, 4))
TABLE = jax.random.normal(KEYS[1], (3, 5))
CUBE = jax.random.normal(KEYS[2], (3, 5, 4))

FUNCTIONS = {
    "a dense layer backwards": lambda c: jnp.where(TABLE > 0, c["x"], 0) @ W,
    "the other operand": lambda c: W.T @ c["x"].T,
    "both operands": lambda c: c["x"] @ c["x"].T,
    "a batch of products": lambda c: jnp.einsum("ni,nio->no", c["x"], CUBE),
    "second of a batch": lambda c: jnp.einsum("nio,ni->on", CUBE, c["x"]),
    "two contracted axes": lambda c: jnp.einsum("ni,nio->o", c["x"], CUBE),
    "numbers": lambda c: 2.0 * c["x"] - TABLE * c["y"].mean(),
    "a transpose": lambda c: jnp.einsum("ni,nio->oin", c["x"], CUBE).transpose(2, 0, 1),
    "a reshape that keeps": lambda c: c["x"].reshape(3, 1, 5, 1),
    "a reshape that mixes": lambda c: c["x"].reshape(-1) * 2,
    "a vector": lambda c: c["y"] * jnp.arange(4.0),
    "shared results": lambda c: {"same": TABLE * 2, "other": c["x"].sum(0)},
    "a loop": lambda c: jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x) * i, c["x"]),
    "a call": lambda c: jax.jit(lambda x: jax.nn.relu(x) + TABLE)(c["x"]),
    "a choice of numbers": lambda c: jnp.where(c["y"][0] > 0, c["x"], TABLE),
    "a choice of scalars": lambda c: {
        "shared case": jnp.where(TABLE.max() > 0, c["y"].sum(), 2.0),
        "shared cases": jnp.where(c["y"][0] > 0, 1.0, TABLE.sum()),
        "sum": 3.0 * c["y"][1] + TABLE.sum(),
        "clip": jnp.clip(c["y"][1], -0.5, TABLE.max()),
    },
    "a clip": lambda c: jnp.clip(c["x"], -0.5, 0.5),
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_vmap(name, axis):
    function = FUNCTIONS[name]
    rows = {
        "x": jnp.moveaxis(jax.random.normal(KEYS[3], (6, 3, 5)), 0, axis),
        "y": jax.random.normal(KEYS[4], (4, 6)),
    }
    axes = {"x": axis, "y": 1}
    one = {"x": jnp.zeros((3, 5)), "y": jnp.zeros(4)}
    shape = jax.eval_shape(function, one)
    out_axes = jax.tree.map(lambda s: max(s.ndim - 1, 0), shape)
    found = jax.jit(lambda r: batch(function, r, axes, out_axes))(rows)
    expected = jax.vmap(function, (axes,), out_axes)(rows)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def axes_of_tasks(jaxpr, tasks):
    """The places of an axis of that length, over all results of the program."""
    found = set()
    for eqn in jaxpr.eqns:
        for var in eqn.outvars:
            shape = getattr(var.aval, "shape", ())
            if len(shape) == 3 and tasks in shape:
                found.add(shape.index(tasks))
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and hasattr(inner, "eqns"):
                found |= axes_of_tasks(inner, tasks)
    return found


def test_a_dense_network_leaves_the_tasks_beside_the_outputs():
    """No cotangent of T tasks is ever written in another order."""
    tasks, sizes = 7, (12, 16, 16, 16)
    params = {
        "trunk": [jnp.ones(s) for s in itertools.pairwise(sizes)],
        "heads": [jnp.ones(16)] * tasks,
    }

    def losses(p, x):
        for w in p["trunk"]:
            x = jax.nn.relu(x @ w)
        return jnp.stack([jnp.mean(jnp.square(x @ v - 1)) for v in p["heads"]])

    gramian = mtljax.task_gramian(losses, engine="gramian", strategy="vmap")
    jaxpr = jax.make_jaxpr(gramian)(params, jnp.ones((5, 12)))
    assert axes_of_tasks(jaxpr.jaxpr, tasks) == {1}
