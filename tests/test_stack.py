"""Algebra on stacked trees against the same on one flat matrix in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import stack

MATRIX = np.random.default_rng(0).normal(size=(3, 11))


def tree(dtype=jnp.float32):
    m = jnp.asarray(MATRIX, dtype)
    return {"a": m[:, :6].reshape(3, 2, 3), "b": [m[:, 6:10], m[:, 10]]}


def flat(update):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)])


def test_gramian():
    np.testing.assert_allclose(stack.gramian(tree()), MATRIX @ MATRIX.T, rtol=1e-5)


def test_gramian_of_halves_is_accumulated_in_float32():
    count = 4096  # in bfloat16 this sum would stop at 256
    grads = {"w": jnp.ones((2, count), jnp.bfloat16)}
    gramian = stack.gramian(grads)
    assert gramian.dtype == jnp.float32
    np.testing.assert_array_equal(gramian, np.full((2, 2), count))


def test_cross_gramian():
    other = np.random.default_rng(1).normal(size=(3, 11))
    m = jnp.asarray(other, jnp.float32)
    right = {"a": m[:, :6].reshape(3, 2, 3), "b": [m[:, 6:10], m[:, 10]]}
    np.testing.assert_allclose(
        stack.cross_gramian(tree(), right), MATRIX @ other.T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_all_finite(bad):
    grads = tree()
    assert stack.all_finite(grads)
    grads["b"][1] = grads["b"][1].at[2].set(bad)
    assert not stack.all_finite(grads)


def test_combine():
    weights = jnp.array([0.5, -1.0, 2.0])
    update = stack.combine(tree(), weights)
    assert jax.tree.map(jnp.shape, update) == {"a": (2, 3), "b": [(4,), ()]}
    np.testing.assert_allclose(flat(update), weights @ MATRIX, rtol=1e-5)


def test_combine_keeps_the_dtype_and_rounds_once():
    grads = {"w": jnp.full((256, 1), 1.0, jnp.bfloat16), "v": jnp.ones((256, 2))}
    update = stack.combine(grads, jnp.full(256, 1.01))
    assert (update["w"].dtype, update["v"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(update["w"], jnp.bfloat16(256 * 1.01))
    np.testing.assert_allclose(update["v"], 256 * 1.01, rtol=1e-5)


def test_select_zeroes_also_what_is_not_finite():
    grads = tree()
    grads["b"][0] = grads["b"][0].at[1].set(jnp.nan)
    selected = stack.select(grads, jnp.array([True, False, True]))
    for before, after in zip(
        jax.tree.leaves(tree()), jax.tree.leaves(selected), strict=True
    ):
        assert (after[1] == 0).all()
        np.testing.assert_array_equal(after[::2], before[::2])


def test_per_leaf_names_the_paths_of_both_trees():
    params = {"a": (1.0, {"b": 2.0, "c": None}), "d": [3.0]}
    assert stack.per_leaf(None, params, "x") == [None] * 3
    assert stack.per_leaf({"a": (1, 2), "d": [None]}, params, "x") == [1, 2, None]
    message = (
        "x must be a tree like the parameters, or a prefix of it. It has the paths "
        "a, e, and the parameters have a/0, a/1/b, d/0."
    )
    for wrong in ({"a": 1, "e": 2}, {"a": 1, "e": None}):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            stack.per_leaf(wrong, params, "x")
    many = {f"{i:02}": 0.0 for i in range(20)}
    with pytest.raises(ValueError, match=r"have 00, 01.*07, … \(20 in all\)\.$"):
        stack.per_leaf({"a": 1}, many, "x")


def test_path_name():
    paths = jax.tree_util.tree_leaves_with_path({"trunk": [{"kernel": 1.0}]})
    assert stack.path_name(paths[0][0]) == "trunk/0/kernel"
    assert stack.path_name(()) == "(root)"


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({}, "mine: the gradients are an empty tree"),
        ({"w": jnp.ones((2, 3))}, r"mine: gradient 'w' has shape \(2, 3\);.*=3"),
        ({"w": jnp.float32(1)}, r"'w' has shape \(\)"),
        ({"w": jnp.ones((3, 2), int)}, "'w' has dtype int32; only real floating"),
        ({"w": jnp.ones((3, 2), complex)}, "'w' has dtype complex64"),
        (jnp.ones((2, 3)), r"'\(root\)' has shape"),
    ],
)
def test_check(grads, message):
    with pytest.raises(ValueError, match=message):
        stack.check(grads, 3, "mine")


def test_check_lets_good_trees_pass():
    stack.check(tree(), 3)
    stack.check(tree(jnp.bfloat16), 3)
