"""OL-AUX: learns weights of auxiliary tasks for one main task."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._main_task import check_main
from mtljax.types import Number, Scale, Weights


class OLAuxState(NamedTuple):
    """State of :func:`ol_aux`."""

    learned: Weights
    gathered: Weights  # Σ <g_m, g_k> since the last change of the weights
    steps: Int[Array, " tasks"]  # number of terms in this sum
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
    """Online learning of auxiliary task weights (OL-AUX).

    The update is ``d = g_m + Σ_{k≠m} w_k g_k`` for the main task m. The weights start
    at ``w_k = 1``. Every N steps, ``w_k ← w_k + β Σ <g_m, g_k>`` with the sum over
    these steps. This is gradient descent on the main loss after one step of the model:
    its derivative with respect to ``w_k`` is minus the inner product times the learning
    rate of the model. β includes this learning rate.

    The inner products have the unit of a squared loss, so choose β accordingly. Weights
    may become negative. A new weight is used from the next step on. If the main task is
    absent from a batch, the weights are used unchanged and are not learned.

    The rule and the defaults of β and N are those of the released ForkMerge code
    (inferred). The paper contains the same hypergradient.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      main: Index m of the main task, whose weight is 1.
      learning_rate: Learning rate β of the weights.
      update_every: Number N of steps between two changes of a weight. Only steps in
        which the task was present are counted.
      scale: The native scale is ``"sum"``.

    Returns:
      A :class:`mtljax.Balancer` that reads the Gramian. A step costs T backward passes.
      The state has 3 T numbers.

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
