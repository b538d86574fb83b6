"""ResNet-18 trunk with the ImageNet or the CIFAR stem."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax.models._layers import (
    BatchNorm,
    check_images,
    he_normal_fan_out,
    linear,
    to_compute,
)


class ResNet(nn.Module):
    """ResNet trunk of basic blocks; the defaults are torchvision's ResNet-18.

    ============================  ===========================================  ========
    model                         options                                      features
    ============================  ===========================================  ========
    FS-MTL, Multi-MNIST           the defaults (fc 512 -> 100 and ReLU)             100
    CelebA (Sener and Koltun)     ``stem="cifar", pool=4, features=None``          2048
    torchvision without its fc    ``features=None``                                 512
    ============================  ===========================================  ========

    The first model has 11,223,560 parameters with one input channel and two heads of
    ten classes. The 2048 features of the second model are those of a 64x64 image.
    Convolutions have no bias and He-normal initial values with fan-out. Batch
    normalisation starts at 1 and 0, and the dense layer as in PyTorch.

    Attributes:
      stem: ``"imagenet"`` is a 7x7 convolution of stride 2 and a 3x3 max-pool of
        stride 2. ``"cifar"`` is a 3x3 convolution of stride 1 without a pool.
      pool: ``None`` averages the last feature map over all positions. An integer is
        the side of windows that are averaged and then flattened.
      features: Width of a last dense layer with ReLU. ``None`` omits this layer.
      width: Channels of the first stage. Every further stage doubles them.
      blocks: Number of basic blocks of every stage.
      dtype: Compute dtype. Parameters and batch statistics stay float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.models import ResNet
      >>> x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
      >>> trunk = ResNet(stem="cifar", pool=4, features=None)
      >>> init = lambda key, x: trunk.init_with_output(key, x, train=False)
      >>> features, variables = jax.eval_shape(init, jax.random.key(0), x)
      >>> features.shape
      (2, 2048)

    References:
      He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015.
    """

    stem: str = "imagenet"
    pool: int | None = None
    features: int | None = 100
    width: int = 64
    blocks: Sequence[int] = (2, 2, 2, 2)
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool) -> Float[Array, "batch features"]:
        """Maps images ``x [batch, height, width, channels]`` to ``[batch, features]``.

        Raises:
          ValueError: If the stem is unknown, if the input is not a batch of images, or
            if the last feature map is smaller than the pooling window.
        """
        x = to_compute(x, self.dtype)
        check_images(x, "ResNet")
        x = self._stem(x, train)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                x = BasicBlock(
                    self.width * 2**stage,
                    stride,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{i}",
                )(x, train=train)
        x = self._pool(x)
        if self.features is not None:
            x = linear(self.features, x.shape[-1], dtype=self.dtype, name="dense")(x)
            x = jax.nn.relu(x)
        return x

    def _stem(self, x: Array, train: bool) -> Array:
        if self.stem == "imagenet":
            side, stride = 7, 2
        elif self.stem == "cifar":
            side, stride = 3, 1
        else:
            raise ValueError(
                f"Unknown stem {self.stem!r}; choose one of imagenet, cifar."
            )
        x = _conv(self.width, side, stride, self.dtype, "stem_conv")(x)
        x = jax.nn.relu(BatchNorm(name="stem_norm")(x, train=train))
        if self.stem == "imagenet":
            pads = ((0, 0), (1, 1), (1, 1), (0, 0))
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads
            )
        return x

    def _pool(self, x: Array) -> Array:
        if self.pool is None:
            return x.mean(axis=(1, 2))
        if min(x.shape[1:3]) < self.pool:
            raise ValueError(
                f"The last feature map of this ResNet is {x.shape[1]}x{x.shape[2]}, "
                f"smaller than pool={self.pool}; use larger images or pool=None."
            )
        n, rows, columns, channels = x.shape
        rows, columns = rows // self.pool, columns // self.pool
        x = x[:, : rows * self.pool, : columns * self.pool]
        x = x.reshape(n, rows, self.pool, columns, self.pool, channels)
        return x.mean(axis=(2, 4)).reshape(n, -1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut connection.

    Attributes:
      width: Output channels.
      stride: Stride of the first convolution and of the shortcut. If shapes differ,
        the shortcut is a 1x1 convolution with batch normalisation, otherwise the
        identity.
      dtype: Compute dtype.
    """

    width: int
    stride: int = 1
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Maps ``[batch, h, w, c]`` to ``[batch, h/stride, w/stride, width]``."""
        y = _conv(self.width, 3, self.stride, self.dtype, "conv_0")(x)
        y = jax.nn.relu(BatchNorm(name="norm_0")(y, train=train))
        y = _conv(self.width, 3, 1, self.dtype, "conv_1")(y)
        y = BatchNorm(name="norm_1")(y, train=train)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = _conv(self.width, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = BatchNorm(name="shortcut_norm")(x, train=train)
        return jax.nn.relu(x + y)


def _conv(width: int, side: int, stride: int, dtype: Dtype | None, name: str):
    pad = (side // 2, side // 2)
    return nn.Conv(
        width,
        (side, side),
        strides=(stride, stride),
        padding=(pad, pad),
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal_fan_out,
        name=name,
    )
