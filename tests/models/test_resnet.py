"""The ResNet trunk: published sizes by shape only, arithmetic on a tiny one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import models

TINY = {"width": 2, "blocks": (1, 1), "features": 3}


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def shapes(model, *image):
    x = jax.ShapeDtypeStruct(image, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def test_size_of_fs_mtl():
    variables = shapes(models.build("resnet18", {"a": 10, "b": 10}), 2, 36, 36, 1)
    assert count(variables.params) == 11_223_560
    assert count(variables.batch_stats) == 2 * 4800  # two averages a channel


def test_size_of_torchvision():
    # torchvision's resnet18 on ImageNet has 11,689,512 parameters.
    model = models.build("resnet18", {"imagenet": 1000}, features=None)
    assert count(shapes(model, 2, 64, 64, 3).params) == 11_689_512


def test_celeba_features():
    heads = {f"attribute_{i}": 2 for i in range(40)}
    model = models.build("resnet18", heads, stem="cifar", pool=4, features=None)
    params = shapes(model, 2, 64, 64, 3).params
    assert params["heads"]["attribute_7"]["kernel"].shape == (2048, 2)
    assert params["trunk"]["stem_conv"]["kernel"].shape == (3, 3, 3, 64)
    # kuangliu's CIFAR ResNet-18 without its 512 -> 10 layer.
    assert count(params["trunk"]) == 11_173_962 - 5_130


def test_map_sizes_are_torchvision_s():
    # 36 -> 18 -> 9 -> 9, 5, 3, 2 by PyTorch's floor((n + 2 pad - kernel) / stride) + 1.
    trunk = models.ResNet(pool=1, features=None, width=1)
    x = jax.ShapeDtypeStruct((2, 36, 36, 1), jnp.float32)
    init = lambda key, x: trunk.init_with_output(key, x, train=False)
    assert jax.eval_shape(init, jax.random.key(0), x)[0].shape == (2, 8 * 2 * 2)


def test_clear_errors():
    with pytest.raises(ValueError, match="choose one of imagenet, cifar"):
        shapes(models.build("resnet18", {"a": 1}, stem="tiny"), 2, 8, 8, 1)
    with pytest.raises(ValueError, match="smaller than pool=4"):
        shapes(models.build("resnet18", {"a": 1}, pool=4), 2, 36, 36, 1)
    with pytest.raises(ValueError, match="takes images"):
        shapes(models.build("resnet18", {"a": 1}), 2, 36)


def conv(x, kernel, stride):
    """Zero-padded correlation by loops over the kernel."""
    side = kernel.shape[0]
    pad = side // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    size = (x.shape[1] - side) // stride + 1
    out = np.zeros((x.shape[0], size, size, kernel.shape[-1]))
    for i in range(size):
        for j in range(size):
            a, b = i * stride, j * stride
            out[:, i, j] = np.tensordot(x[:, a : a + side, b : b + side], kernel, 3)
    return out


def pool(x):
    """3x3 maximum of stride 2 and padding 1."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    size = (x.shape[1] - 3) // 2 + 1
    out = np.zeros((x.shape[0], size, size, x.shape[-1]))
    for i in range(size):
        for j in range(size):
            out[:, i, j] = x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
    return out


def norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


def relu(x):
    return np.maximum(x, 0)


def test_forward_matches_numpy():
    model = models.build("resnet18", {"a": 2}, **TINY)
    x = np.random.default_rng(0).normal(size=(3, 11, 11, 1)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    run = jax.jit(model.apply, static_argnames="train")
    outputs, _ = run(variables, x, train=True)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables.params)
    trunk, head = p["trunk"], p["heads"]["a"]
    h = pool(relu(norm(conv(x, trunk["stem_conv"]["kernel"], 2))))
    for name, stride in (("stage_0_block_0", 1), ("stage_1_block_0", 2)):
        block = {k: v["kernel"] for k, v in trunk[name].items() if "conv" in k}
        y = relu(norm(conv(h, block["conv_0"], stride)))
        y = norm(conv(y, block["conv_1"], 1))
        if "shortcut_conv" in block:
            h = norm(conv(h, block["shortcut_conv"], stride))
        h = relu(h + y)
    h = h.mean((1, 2))
    h = relu(h @ trunk["dense"]["kernel"] + trunk["dense"]["bias"])
    expected = h @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs["a"], expected, rtol=1e-3, atol=1e-4)
