"""Shared layers with the arithmetic and the initial values of PyTorch.

The papers that are reproduced trained PyTorch models. Therefore linear layers, batch
normalisation and pooling follow its conventions. Images have the shape
``[batch, height, width, channels]``.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, Real

# Normal with variance 2 / (kernel area * output channels), as in He et al. (1502.01852)
# with fan-out. It initialises the convolutions of torchvision's ResNet.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# Uniform in +-1/sqrt(fan_in), the initial kernel of PyTorch's Linear and Conv2d.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> nn.initializers.Initializer:
    """Returns an initializer that is uniform in ``+-1/sqrt(fan_in)``, as in PyTorch."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: PRNGKeyArray, shape, dtype=jnp.float32, out_sharding=None) -> Array:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    features: int,
    fan_in: int,
    *,
    dtype: Dtype | None = None,
    name: str | None = None,
) -> nn.Dense:
    """Creates a dense layer with the initial values of PyTorch's ``nn.Linear``."""
    bias_init = torch_bias(fan_in)
    return nn.Dense(
        features, dtype=dtype, kernel_init=torch_uniform, bias_init=bias_init, name=name
    )


def to_compute(x: Real[ArrayLike, "*shape"], dtype: Dtype | None) -> Array:
    """Casts to the compute dtype; None keeps floats and casts integers to float32."""
    x = jnp.asarray(x)
    if dtype is None:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    return x.astype(dtype)


def at_least_float32(x: Array) -> Array:
    """Casts half-precision floats to float32 and leaves wider floats unchanged."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def check_images(x: Array, model: str) -> None:
    """Raises an error unless ``x`` is ``[batch, height, width, channels]``."""
    if x.ndim != 4:
        raise ValueError(
            f"{model} takes images [batch, height, width, channels], but the input has "
            f"shape {x.shape}."
        )


def max_pool_2x2(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch height//2 width//2 channels"]:
    """Computes the maximum over 2x2 windows and ignores an odd last row or column.

    In a training step on a CPU it takes half the time of ``lax.reduce_window``, because
    its gradient is a mask and not a scatter. Tied maxima share the gradient equally.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as PyTorch computes it.

    With ``train=True`` the input is normalised with the mean and the biased variance of
    the batch. If the ``batch_stats`` collection is mutable, the running averages move
    by ``momentum`` towards the mean and the *unbiased* variance. With ``train=False``
    the input is normalised with the running averages. Statistics are computed in at
    least float32. Under ``jit`` with a sharded batch they are those of the global
    batch.

    Attributes:
      momentum: Weight of the new statistics, as in PyTorch (0.1 is slow).
      epsilon: Added to the variance.

    References:
      Ioffe and Szegedy, `Batch Normalization
      <https://arxiv.org/abs/1502.03167>`_, 2015.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        """Normalises ``x [..., channels]``; the class describes the two modes."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        wide = at_least_float32(x)
        if train:
            mean, var = self._batch_moments(wide)
            if self.is_mutable_collection("batch_stats"):
                count = x.size // channels
                self._move(running_mean, mean)
                self._move(running_var, var * (count / (count - 1)))
        else:
            mean, var = running_mean.value, running_var.value
        shape = (1,) * (x.ndim - 1) + (channels,)
        gain = jax.lax.rsqrt(var + self.epsilon) * scale
        out = (wide - mean.reshape(shape)) * gain.reshape(shape) + bias.reshape(shape)
        return out.astype(x.dtype)

    def _batch_moments(self, x: Array) -> tuple[Array, Array]:
        axes = tuple(range(x.ndim - 1))
        if x.size < 2 * x.shape[-1]:
            raise ValueError(
                "BatchNorm: training needs more than one value per channel, but the "
                f"input has shape {x.shape}."
            )
        mean = x.mean(axes)
        return mean, jnp.square(x - x.mean(axes, keepdims=True)).mean(axes)

    def _move(self, running: nn.Variable, new: Array) -> None:
        new = jax.lax.stop_gradient(new)
        old = running.value
        running.value = ((1 - self.momentum) * old + self.momentum * new).astype(
            old.dtype
        )
