"""LeNet trunk of the Multi-MNIST experiments."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax.models._layers import (
    check_images,
    linear,
    max_pool_2x2,
    to_compute,
    torch_bias,
    torch_uniform,
)


class LeNet(nn.Module):
    """LeNet trunk: convolutions with 2x2 max-pool and ReLU, then a dense layer.

    The defaults are the LeNet of FS-MTL. On 36x36x1 images the second pool returns
    5x5x20 = 500 values. With two heads of ten classes the model has 31,910 parameters.
    Convolutions use VALID padding. Every layer has the initial values of PyTorch.

    Attributes:
      channels: Output channels of every convolution.
      kernels: Side of every square kernel. Use smaller kernels for small images.
      features: Width of the dense layer, which is the input of the heads.
      dropout: Share of the units of the dense layer that are dropped in training.
      dtype: Compute dtype. Parameters stay float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.models import LeNet
      >>> trunk = LeNet(kernels=(3, 3))
      >>> x = jax.ShapeDtypeStruct((2, 12, 12, 1), jnp.float32)
      >>> init = lambda key, x: trunk.init_with_output(key, x, train=False)
      >>> features, variables = jax.eval_shape(init, jax.random.key(0), x)
      >>> features.shape
      (2, 50)

    References:
      LeCun et al., Gradient-based learning applied to document recognition, 1998. Sener
      and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, use it with two heads.
    """

    channels: Sequence[int] = (10, 20)
    kernels: Sequence[int] = (9, 5)
    features: int = 50
    dropout: float = 0.0
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool) -> Float[Array, "batch features"]:
        """Maps images ``x [batch, height, width, channels]`` to ``[batch, features]``.

        Raises:
          ValueError: If the image is too small for the kernels, or if the numbers of
            channels and kernels differ.
        """
        if len(self.channels) != len(self.kernels):
            raise ValueError(
                "LeNet needs one kernel size per convolution, but received channels="
                f"{tuple(self.channels)} and kernels={tuple(self.kernels)}."
            )
        h = to_compute(x, self.dtype)
        check_images(h, "LeNet")
        image = h.shape[1:3]
        for i, (width, side) in enumerate(
            zip(self.channels, self.kernels, strict=True)
        ):
            if min(h.shape[1:3]) < side + 1:
                raise ValueError(
                    f"A {image[0]}x{image[1]} image is too small for LeNet with "
                    f"kernels={tuple(self.kernels)}: convolution {i} and its 2x2 pool "
                    f"need at least {side + 1} pixels per side, but the input has "
                    f"{min(h.shape[1:3])}."
                )
            h = nn.Conv(
                width,
                (side, side),
                padding="VALID",
                dtype=self.dtype,
                kernel_init=torch_uniform,
                bias_init=torch_bias(side * side * h.shape[-1]),
                name=f"conv_{i}",
            )(h)
            h = jax.nn.relu(max_pool_2x2(h))
        h = h.reshape(h.shape[0], -1)
        h = linear(self.features, h.shape[-1], dtype=self.dtype, name="dense")(h)
        return nn.Dropout(self.dropout, deterministic=not train)(jax.nn.relu(h))
