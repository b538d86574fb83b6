"""OL-AUX: learns the weights of auxiliary tasks from what they do for the main one."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._main_task import check_main
from mtljax.types import Number, Scale, Weights


class OLAuxState(NamedTuple):
    """State of :func:`ol_aux`."""

    learned: Weights
    gathered: Weights  # Σ <g_m, g_k> since the last change
    steps: Int[Array, " tasks"]  # of which the sum is made
    task_weights: Weights


@factory
def ol_aux(
    num_tasks: int,
    *,
    main: int = 0,
    learning_rate: Number = 1e-4,
    update_every: int = 5,
    scale: Scale = "native",
) -> Balancer:
    """Online learning of auxiliary weights by their inner product with the main task.

    ``d = g_m + Σ_{k≠m} w_k g_k`` with ``w_k = 1`` at first and, every N steps,
    ``w_k <- w_k + β Σ <g_m, g_k>`` over these steps: gradient descent on the main loss
    one step ahead, whose derivative in ``w_k`` is minus the inner product times the
    learning rate of the model, which the rule counts in β. The products have the unit
    of the losses squared, so β must be chosen with them; weights may become negative,
    as nothing in the rule forbids it. A new weight serves from the next step on.

    The rule is that of the released code of ForkMerge (its β and N are the defaults),
    inferred from there: the paper writes the same hypergradient.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      main: Index m of the main task, whose weight is one.
      learning_rate: β.
      update_every: N, in steps on which the task was present.
      scale: The native scale is that of the ``"sum"``.

    Returns:
      A balancer; needs the Gramian: T backward passes. State: 3 T numbers. Without the
      main task in a batch nothing is learned, and the weights are used as they are.

    Raises:
      ValueError: If ``main`` is not the index of a task, or ``learning_rate`` or
        ``update_every`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.ol_aux(2, learning_rate=0.1, update_every=1)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [-2.0, 1.0]])}
      >>> _, state = balancer.update(grads, balancer.init(grads))
      >>> state.learned.tolist()
      [1.0, 0.8]

    References:
      Lin et al., Adaptive Auxiliary Task Weighting for Reinforcement Learning,
      NeurIPS 2019.
    """
    check_main("ol_aux", num_tasks, main)
    check_number("ol_aux", "learning_rate", learning_rate, above=0.0)
    if update_every < 1:
        raise ValueError(f"ol_aux: update_every must be positive, not {update_every}.")

    def init():
        ones = jnp.ones(num_tasks, jnp.float32)
        return OLAuxState(ones, 0 * ones, jnp.zeros(num_tasks, jnp.int32), ones)

    def weigh(state, *, losses, gramian, mask):
        del losses
        taught = mask & mask[main]
        gathered = state.gathered + jnp.where(taught, gramian[main], 0)
        steps = state.steps + taught
        due = taught & (steps >= update_every)
        step = jnp.where(due, learning_rate * gathered, 0).at[main].set(0)
        new = state._replace(
            learned=state.learned + step,
            gathered=jnp.where(due, 0, gathered),
            steps=jnp.where(due, 0, steps),
        )
        return state.learned, new

    return from_weights(
        "ol_aux",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="gramian",
        native="sum",
        scale=scale,
    )
