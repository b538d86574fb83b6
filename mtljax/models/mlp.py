"""Trunk that is a multi-layer perceptron (MLP)."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax.models._layers import linear, to_compute

_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
}


class MLP(nn.Module):
    """Multi-layer perceptron (MLP) trunk: dense layers, each with an activation.

    The input is flattened. Layers have the initial values of PyTorch's ``nn.Linear``.
    An empty ``hidden`` is the identity, so that every head is a linear model of the
    input.

    Attributes:
      hidden: Width of every hidden layer.
      activation: One of ``relu``, ``gelu``, ``elu``, ``tanh``.
      dropout: Share of units that are dropped after every activation in training.
      dtype: Compute dtype. Parameters stay float32.

    Raises:
      ValueError: If the activation is unknown, when the model is called.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.models import MLP
      >>> trunk = MLP(hidden=(8, 4))
      >>> x = jax.ShapeDtypeStruct((2, 3, 3), jnp.float32)
      >>> init = lambda key, x: trunk.init_with_output(key, x, train=False)
      >>> features, variables = jax.eval_shape(init, jax.random.key(0), x)
      >>> features.shape
      (2, 4)
    """

    hidden: Sequence[int] = (128, 128)
    activation: str = "relu"
    dropout: float = 0.0
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool) -> Float[Array, "batch features"]:
        """Maps ``x [batch, ...]`` to features ``[batch, hidden[-1]]``."""
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {self.activation!r}; choose one of "
                f"{', '.join(_ACTIVATIONS)}."
            )
        x = to_compute(x, self.dtype)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = linear(width, x.shape[-1], dtype=self.dtype, name=f"dense_{i}")(x)
            x = _ACTIVATIONS[self.activation](x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x
