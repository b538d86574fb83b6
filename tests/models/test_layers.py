"""The PyTorch-like layers, against numpy and PyTorch's documented formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.models._layers import (
    BatchNorm,
    he_normal_fan_out,
    linear,
    max_pool_2x2,
    to_compute,
    torch_bias,
    torch_uniform,
)

X = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32) * 3 + 1
PARAMS = {"scale": np.linspace(0.5, 2, 5, dtype="f"), "bias": np.arange(5, dtype="f")}
STATS = {"mean": np.full(5, 0.3, "f"), "var": np.full(5, 2.0, "f")}
VARIABLES = {"params": PARAMS, "batch_stats": STATS}


APPLY = jax.jit(BatchNorm().apply, static_argnames=("train", "mutable"))


def normalise(x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5) * PARAMS["scale"] + PARAMS["bias"]


def test_batch_norm_train_moves_the_averages_as_pytorch():
    y, new = APPLY(VARIABLES, X, train=True, mutable="batch_stats")
    x = X.astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(y, normalise(X, x.mean(0), x.var(0)), atol=1e-5)
    got = new["batch_stats"]
    np.testing.assert_allclose(got["mean"], 0.9 * 0.3 + 0.1 * x.mean(0), rtol=1e-6)
    expected = 0.9 * 2.0 + 0.1 * x.var(0, ddof=1)  # unbiased, as PyTorch keeps it
    np.testing.assert_allclose(got["var"], expected, rtol=1e-6)


def test_batch_norm_train_without_moving():
    moving, _ = APPLY(VARIABLES, X, train=True, mutable="batch_stats")
    still = APPLY(VARIABLES, X, train=True)
    np.testing.assert_array_equal(still, moving)


def test_batch_norm_eval_uses_the_averages():
    y, new = APPLY(VARIABLES, X, train=False, mutable="batch_stats")
    np.testing.assert_allclose(y, normalise(X, 0.3, 2.0), atol=1e-5)
    np.testing.assert_array_equal(new["batch_stats"]["mean"], STATS["mean"])


def test_batch_norm_half_precision_keeps_float32_statistics():
    x = jnp.asarray(X, jnp.bfloat16)
    y, new = APPLY(VARIABLES, x, train=True, mutable="batch_stats")
    assert y.dtype == jnp.bfloat16
    got = new["batch_stats"]["mean"]
    assert got.dtype == jnp.float32
    mean = np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(got, 0.27 + 0.1 * mean, rtol=1e-5)


def test_batch_norm_of_one_value_is_an_error():
    with pytest.raises(ValueError, match="more than one value per channel"):
        APPLY(VARIABLES, X[:1, :1, :1], train=True)


@pytest.mark.parametrize("side", [6, 7])
def test_max_pool_matches_loops(side):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    y = max_pool_2x2(jnp.asarray(x))
    assert y.shape == (2, 3, 3, 3)
    for i in range(3):
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(y[:, i, j], window.max((1, 2)))


def test_initial_values():
    key = jax.random.key(0)
    conv = he_normal_fan_out(key, (3, 3, 32, 64), jnp.float32)
    np.testing.assert_allclose(conv.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    bound = 1 / np.sqrt(9 * 32)
    kernel = torch_uniform(key, (3, 3, 32, 64), jnp.float32)
    bias = torch_bias(9 * 32)(key, (20_000,), jnp.float32)
    for value in (kernel, bias):
        assert 0.99 * bound < value.max() <= bound
        assert -0.99 * bound > value.min() >= -bound
        np.testing.assert_allclose(value.std(), bound / np.sqrt(3), rtol=0.02)


def test_linear_is_a_dense_layer():
    layer, x = linear(3, 5), np.ones((2, 5), np.float32)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    np.testing.assert_allclose(y, x @ params["kernel"] + params["bias"], rtol=1e-6)


def test_to_compute():
    assert to_compute(np.zeros(2, np.uint8), None).dtype == jnp.float32
    assert to_compute(jnp.zeros(2, jnp.bfloat16), None).dtype == jnp.bfloat16
    assert to_compute(jnp.zeros(2), jnp.bfloat16).dtype == jnp.bfloat16
