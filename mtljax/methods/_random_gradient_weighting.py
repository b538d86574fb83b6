"""Random gradient weighting: random weights on the shared gradients only."""

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
    """Random weights on the gradients of the shared parameters (RGW).

    ``d = Σ_i w_i g_i`` with ``w = softmax(z)``, ``z ~ N(0, I)`` redrawn at every step:
    on the gradients that a balancer sees, the same rule as
    :func:`mtljax.random_loss_weighting`. The two differ in what the parameters *owned*
    by a task receive. RLW multiplies the losses, so a head gets ``w_i`` times its
    gradient; RGW replaces the gradients of the shared parameters, and a head gets the
    gradient of its own loss unchanged. With :func:`mtljax.value_and_balanced_grad`::

        RGW: value_and_balanced_grad(f, random_gradient_weighting(...), labels=labels)
        RLW: value_and_balanced_grad(f, random_loss_weighting(...), labels=labels,
                                     heads="weighted")

    Without ``labels`` every parameter counts as shared, and there is no difference.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      key: Seeds the weights; lives in the state.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1 (paper, LibMTL,
        TorchJD's ``Random``); ``"sum"`` multiplies by the number of tasks.

    Returns:
      A balancer; reads nothing. One backward pass (LibMTL makes T: as the weights do
      not depend on the gradients, the weighted sum is the gradient of one loss), and
      one through the heads alone; state: the key.

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
