"""RGW: random weights of the gradients of the shared parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.types import Scale, Weights


class RandomGradientWeightingState(NamedTuple):
    """State of :func:`random_gradient_weighting`."""

    key: PRNGKeyArray  # consumed by the next update
    task_weights: Weights


@factory
def random_gradient_weighting(
    num_tasks: int, *, key: PRNGKeyArray, scale: Scale = "native"
) -> Balancer:
    """Random gradient weighting of the shared parameters (RGW).

    The update is ``d = Σ_i w_i g_i`` with ``w = softmax(z)``, where ``z ~ N(0, I)`` is
    sampled at every step. For stacked gradients the rule is that of
    :func:`mtljax.random_loss_weighting`. The methods differ in the gradients of the
    task-specific parameters. RLW multiplies the losses, so a head receives ``w_i``
    times its gradient. RGW replaces the gradients of the shared parameters only, so a
    head receives the gradient of its own loss. With
    :func:`mtljax.value_and_balanced_grad`::

        RGW: value_and_balanced_grad(f, random_gradient_weighting(...), labels=labels)
        RLW: value_and_balanced_grad(f, random_loss_weighting(...), labels=labels,
                                     heads="weighted")

    Without ``labels`` every parameter is shared, and the methods are identical.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random`` for the weights, stored in the state.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1, as in the paper,
        LibMTL and ``Random`` of TorchJD. ``"sum"`` multiplies them by the number of
        present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads neither the losses nor the gradients. A step
      costs one backward pass, and one more through the heads only. The weights do not
      depend on the gradients, so the weighted sum is the gradient of one loss, whereas
      LibMTL runs T backward passes. The state contains the key.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> balancer = mtljax.random_gradient_weighting(3, key=jax.random.key(0))
      >>> grads = {"trunk": jnp.ones((3, 2))}
      >>> update, _ = balancer.update(grads, balancer.init(grads))
      >>> update["trunk"].tolist()
      [1.000, 1.000]

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting
      <https://arxiv.org/abs/2111.10603>`_, 2022.
    """

    def init():
        return RandomGradientWeightingState(key, jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses, gramian
        next_key, draw = jax.random.split(state.key)
        logits = jax.random.normal(draw, (num_tasks,), jnp.float32)
        return jax.nn.softmax(logits, where=mask), state._replace(key=next_key)

    return from_weights(
        "random_gradient_weighting",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="mean",
        scale=scale,
    )
