"""Linear scalarisation (LS): constant task weights."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, factory, from_weights
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.types import Scale, Weights


class LinearState(NamedTuple):
    """State of :func:`linear`."""

    task_weights: Weights  # weights of the last update, for logging


@factory
def linear(
    num_tasks: int,
    *,
    weights: TaskVector | None = None,
    scale: Scale = "native",
) -> Balancer:
    """Linear scalarisation with constant or equal weights (LS).

    The update is ``d = Σ_i w_i g_i`` with ``w_i = 1`` by default.

    Tune this baseline first. With tuned weights and a tuned learning rate it is hard to
    improve on. LibMTL and nash-mtl use the sum. ``Mean`` of TorchJD uses the mean,
    which is ``scale="mean"``.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      weights: Constant weights, shape ``[T]``. They may be traced, so that they can be
        a ``vmap`` axis. One-hot weights are the single-task baselines.
      scale: ``"native"`` uses the weights unchanged. ``"sum"`` normalises them to sum
        to the number of present tasks, and ``"mean"`` to 1.

    Returns:
      A :class:`mtljax.Balancer` that maps stacked gradients ``[T, *param]`` to an
      update ``[*param]``. It reads neither the losses nor the Gramian. A step costs one
      backward pass. The state contains the last task weights only.

    Raises:
      ValueError: If the number of ``weights`` differs from T.

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
