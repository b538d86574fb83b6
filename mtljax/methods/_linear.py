"""Linear scalarisation: constant task weights, the baseline of every table."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.types import Scale, Weights


class LinearState(NamedTuple):
    """State of :func:`linear`."""

    task_weights: Weights  # of the last update; kept for logging


@factory
def linear(
    num_tasks: int,
    *,
    weights: TaskVector | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Sum of the task gradients under constant weights (equal weighting, LS).

    ``d = Σ_i w_i g_i``, all ``w_i = 1`` unless given.

    The first baseline to tune: with a tuned learning rate and weights it is hard to
    beat. The sum is LibMTL's and nash-mtl's convention, the mean (``scale="mean"``)
    that of TorchJD's ``Mean``.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      weights: One constant per task ``[T]``; may be a traced array, so that weights can
        be a ``vmap`` axis (one-hot rows are the single-task baselines).
      scale: ``"native"`` uses the weights as given; ``"sum"`` and ``"mean"`` normalise
        them to add up to the number of present tasks, or to 1.

    Returns:
      A balancer: stacked gradients ``[T, *param]`` to one update ``[*param]``. Reads
      nothing; one backward pass; no state.

    Raises:
      ValueError: If ``weights`` has another length than T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.linear(2, weights=[1.0, 0.5])
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 4.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["w"].tolist()
      [1.0, 2.0]

    References:
      Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning Even
      Help? <https://arxiv.org/abs/2209.11379>`_, 2022, on tuning this baseline.
    """
    given = 1.0 if weights is None else weights
    constant = task_vector("linear", "weights", num_tasks, given)

    def init():
        return LinearState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask):
        del losses, gramian, mask
        return jnp.asarray(constant), state

    return from_weights(
        "linear",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="free",
        scale=scale,
    )
