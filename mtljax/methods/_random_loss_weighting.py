"""Random loss weighting: weights drawn anew at every step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.types import Mask, Scale, Weights


class RandomLossWeightingState(NamedTuple):
    """State of :func:`random_loss_weighting`."""

    key: PRNGKeyArray  # consumed by the next update
    task_weights: Weights


def random_weights(logits: Float[Array, " tasks"], mask: Mask | None = None) -> Weights:
    """Softmax of the logits over the present tasks."""
    return jax.nn.softmax(logits, where=mask)


@factory
def random_loss_weighting(
    num_tasks: int, *, key: PRNGKeyArray, scale: Scale = "native"
) -> Balancer:
    """Weights ``softmax(z)`` with ``z ~ N(0, I)`` redrawn at every step (RLW).

    ``d = Σ_i w_i g_i``, ``E[w_i] = 1/T``: equal weighting with noise, and the control
    that any learned weighting has to beat.

    With ``labels`` and the default ``heads="own"`` the heads keep their own gradients,
    which is :func:`random_gradient_weighting`; the paper's rule, which weighs the
    losses, is ``heads="weighted"``.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      key: Seeds the weights; lives in the state.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1 (paper, LibMTL,
        nash-mtl, TorchJD); ``"sum"`` multiplies by the number of tasks (IGB's code).

    Returns:
      A balancer; reads nothing; one backward pass; state: the key.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> balancer = mtljax.random_loss_weighting(3, key=jax.random.key(0))
      >>> grads = {"w": jnp.ones((3, 2))}
      >>> update, state = balancer.update(grads, balancer.init(grads))
      >>> round(float(state.task_weights.sum()), 5)
      1.0

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting
      <https://arxiv.org/abs/2111.10603>`_, 2022.
    """

    def init():
        return RandomLossWeightingState(key, jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses, gramian
        next_key, draw = jax.random.split(state.key)
        logits = jax.random.normal(draw, (num_tasks,), jnp.float32)
        return random_weights(logits, mask), state._replace(key=next_key)

    return from_weights(
        "random_loss_weighting",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="mean",
        scale=scale,
    )
