"""An optax optimizer for one learned number per task, with masks.

Some methods learn a vector of shape ``[T]`` in addition to the model, for example the
log-variances of UW or the logits of FAMO. Each entry has its own optimizer state and
step count. Momentum therefore does not change the entry of an absent task.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtljax.types import Mask, Weights


class PerTask(NamedTuple):
    """Learned numbers of shape ``[T]`` and the optimizer state of each."""

    value: Weights
    opt_state: Any  # every leaf has a leading task axis


def init(optimizer: optax.GradientTransformation, value: Weights) -> PerTask:
    """Creates an optimizer state for each entry of ``value``, shape ``[T]``."""
    return PerTask(value, jax.vmap(optimizer.init)(value))


def step(
    optimizer: optax.GradientTransformation, state: PerTask, grad: Weights, mask: Mask
) -> PerTask:
    """Takes one optimizer step on the entries of present tasks.

    Args:
      optimizer: An optax optimizer.
      state: Learned numbers and their optimizer states.
      grad: Gradient with respect to the numbers, shape ``[T]``.
      mask: Tasks whose entries are updated, shape ``[T]``.

    Returns:
      The new state. The entries of all other tasks are unchanged.
    """
    updates, opt_state = jax.vmap(optimizer.update)(grad, state.opt_state, state.value)
    new = PerTask(state.value + jnp.asarray(updates), opt_state)

    def keep(n, o):
        return jnp.where(mask.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(keep, new, state)
