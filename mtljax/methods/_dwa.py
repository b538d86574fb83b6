"""DWA: larger weights for the losses that decrease least."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.types import Losses, Mask, Number, Scale, Weights


class DWAState(NamedTuple):
    """State of :func:`dwa`."""

    running: Losses  # sum of the losses in the current window
    steps: Int[Array, " tasks"]  # steps of each task in the current window
    windows: Int[Array, " tasks"]  # number of complete windows
    last: Losses  # mean loss of the last complete window
    previous: Losses  # mean loss of the window before it
    task_weights: Weights


def dwa_weights(
    last: Losses, previous: Losses, temperature: Number, mask: Mask | None = None
) -> Weights:
    """Computes ``n softmax(r/τ)`` with ``r_i = last_i / previous_i``.

    n is the number of present tasks.
    """
    mask = jnp.ones(last.shape, bool) if mask is None else mask
    safe = jnp.where(previous == 0, 1, previous)
    ratio: Float[Array, " tasks"] = jnp.where(previous == 0, 1, last / safe)
    return mask.sum() * jax.nn.softmax(ratio / temperature, where=mask)


@factory
def dwa(
    num_tasks: int,
    *,
    window: int = 25,
    temperature: Number = 2.0,
    scale: Scale = "native",
) -> Balancer:
    """Dynamic weight average (DWA).

    The weights are ``w = T softmax(r/τ)`` with ``r_i = L_i(k-1) / L_i(k-2)``, where
    ``L_i(k)`` is the mean loss of task i over window k. All weights are 1 until two
    windows are complete. The ratio is 1 if the earlier mean loss is zero. The window of
    a task counts the batches in which the task was present.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      window: Number of steps in a window. The paper averages over an epoch, so pass the
        number of steps per epoch. The default is that of nash-mtl and codebases derived
        from it.
      temperature: Temperature τ of the softmax. The paper uses 2.
      scale: ``"native"`` and ``"sum"`` are weights that sum to the number of present
        tasks, as in the paper. ``"mean"`` divides them by this number.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``. They must not be negative,
      because the ratio of negative losses has the opposite meaning. A step costs one
      backward pass. The state has 5 T numbers.

    Raises:
      ValueError: If ``window`` or ``temperature`` is not positive.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.dwa(2, window=1)
      >>> grads = {"w": jnp.ones((2, 1))}
      >>> state = balancer.init(grads)
      >>> for losses in ([1.0, 1.0], [0.5, 1.0], [0.5, 0.5]):
      ...     _, state = balancer.update(grads, state, losses=jnp.array(losses))
      >>> state.task_weights.tolist()
      [0.8756, 1.1243]

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019.
    """
    if window < 1:
        raise ValueError(f"dwa: window must be at least one step, not {window}.")
    check_number("dwa", "temperature", temperature, above=0.0)

    def init():
        zeros = jnp.zeros(num_tasks, jnp.float32)
        count = jnp.zeros(num_tasks, jnp.int32)
        return DWAState(zeros, count, count, zeros, zeros, zeros + 1)

    def weigh(state, *, losses, gramian, mask):
        del gramian
        ready = (state.windows >= 2) | ~mask
        ones = jnp.ones(num_tasks, jnp.float32)
        weights = dwa_weights(state.last, state.previous, temperature, mask)
        weights = jnp.where(ready.all(), weights, ones)
        running = jnp.where(mask, state.running + losses, state.running)
        steps = state.steps + mask
        full = steps >= window
        return weights, DWAState(
            running=jnp.where(full, 0, running),
            steps=jnp.where(full, 0, steps),
            windows=state.windows + full,
            last=jnp.where(full, running / window, state.last),
            previous=jnp.where(full, state.last, state.previous),
            task_weights=weights,
        )

    return from_weights(
        "dwa",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="sum",
        scale=scale,
        reads_losses=True,
        domain=lambda losses: losses >= 0,
    )
