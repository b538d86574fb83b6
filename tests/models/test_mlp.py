"""The MLP trunk, against numpy."""

import jax
import numpy as np
import pytest

from mtljax import models

X = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)


def start(model):
    return jax.jit(model.init)(jax.random.key(0), X)


def test_matches_numpy():
    model = models.build("mlp", {"a": 2}, hidden=(5, 4), activation="tanh")
    variables = start(model)
    params = jax.tree.map(np.asarray, variables.params)
    h = X.reshape(4, 6)
    for name in ("dense_0", "dense_1"):
        layer = params["trunk"][name]
        h = np.tanh(h @ layer["kernel"] + layer["bias"])
    expected = h @ params["heads"]["a"]["kernel"] + params["heads"]["a"]["bias"]
    outputs, _ = model.apply(variables, X, train=False)
    np.testing.assert_allclose(outputs["a"], expected, rtol=1e-5, atol=1e-6)


def test_no_hidden_layer_is_linear():
    model = models.build("mlp", {"a": 2}, hidden=())
    variables = start(model)
    assert variables.params["trunk"] == {}
    head = jax.tree.map(np.asarray, variables.params["heads"]["a"])
    outputs, _ = model.apply(variables, X, train=True)
    expected = X.reshape(4, 6) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs["a"], expected, rtol=1e-5, atol=1e-6)


def test_unknown_activation():
    model = models.build("mlp", {"a": 2}, activation="selu")
    with pytest.raises(ValueError, match="choose one of relu, gelu, elu, tanh"):
        jax.eval_shape(model.init, jax.random.key(0), X)


def test_dropout_needs_a_key_only_in_training():
    model = models.build("mlp", {"a": 2}, hidden=(64,), dropout=0.5)
    variables = start(model)
    with pytest.raises(ValueError, match="needs key="):
        model.apply(variables, X, train=True)
    run = jax.jit(lambda key: model.apply(variables, X, train=True, key=key)[0]["a"])
    first, again, other = (np.asarray(run(jax.random.key(i))) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    model.apply(variables, X, train=False)
