"""RLW: random task weights that are sampled at every step."""

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
    """Computes the softmax of the logits over the present tasks."""
    return jax.nn.softmax(logits, where=mask)


@factory
def random_loss_weighting(
    num_tasks: int, *, key: PRNGKeyArray, scale: Scale = "native"
) -> Balancer:
    """Random loss weighting (RLW).

    The update is ``d = Σ_i w_i g_i`` with ``w = softmax(z)``, where ``z ~ N(0, I)`` is
    sampled at every step. Since ``E[w_i] = 1/T``, the method is equal weighting with
    noise. It is a control experiment for every method that learns weights.

    With ``labels`` and the default ``heads="own"``, the task-specific parameters
    receive the gradients of their own losses. This is
    :func:`random_gradient_weighting`. The rule of the paper weights the losses, which
    is ``heads="weighted"``.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random`` for the weights, stored in the state.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1, as in the paper,
        LibMTL, nash-mtl and TorchJD. ``"sum"`` multiplies them by the number of present
        tasks, as in the IGB code.

    Returns:
      A :class:`mtljax.Balancer` that reads neither the losses nor the gradients. A step
      costs one backward pass. The state contains the key.

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
