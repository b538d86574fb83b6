"""The LeNet trunk: FS-MTL's size, small canvases, arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from mtljax import models


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(model, *image):
    x = jax.ShapeDtypeStruct(image, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def test_size_of_fs_mtl():
    variables = shapes(models.build("lenet", {"a": 10, "b": 10}), 2, 36, 36, 1)
    assert count(variables.params) == 31_910
    assert variables.params["trunk"]["dense"]["kernel"].shape == (500, 50)
    assert variables.batch_stats == {}


@pytest.mark.parametrize(("side", "kernels"), [(12, (3, 3)), (16, (5, 3)), (8, (3, 2))])
def test_small_canvases(side, kernels):
    model = models.build("lenet", {"a": 10}, kernels=kernels)
    shapes(model, 2, side, side, 1)


@pytest.mark.parametrize("side", [8, 12, 19])
def test_too_small_images(side):
    with pytest.raises(ValueError, match=f"A {side}x{side} image is too small"):
        shapes(models.build("lenet", {"a": 10}), 2, side, side, 1)
    shapes(models.build("lenet", {"a": 10}), 2, 20, 20, 1)


def test_clear_errors():
    with pytest.raises(ValueError, match="takes images"):
        shapes(models.build("lenet", {"a": 10}), 2, 36, 36)
    with pytest.raises(ValueError, match="one kernel size per convolution"):
        shapes(models.build("lenet", {"a": 10}, kernels=(3,)), 2, 36, 36, 1)


def test_one_convolution_matches_scipy():
    options = {"channels": (2,), "kernels": (3,), "features": 4}
    model = models.build("lenet", {"a": 3}, **options)
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 1)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    outputs, _ = jax.jit(model.apply, static_argnames="train")(variables, x, train=True)

    params = jax.tree.map(np.asarray, variables.params)
    trunk, head = params["trunk"], params["heads"]["a"]
    kernel, bias = trunk["conv_0"]["kernel"], trunk["conv_0"]["bias"]
    maps = [
        signal.correlate2d(x[0, :, :, 0], kernel[:, :, 0, c], mode="valid") + bias[c]
        for c in range(2)
    ]
    pooled = np.stack(maps, -1).reshape(2, 2, 2, 2, 2).max((1, 3))
    h = np.maximum(pooled, 0).reshape(1, -1)
    h = np.maximum(h @ trunk["dense"]["kernel"] + trunk["dense"]["bias"], 0)
    expected = h @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs["a"], expected, rtol=1e-5, atol=1e-6)
