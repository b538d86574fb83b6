"""An optax optimiser for one learned number per task, with masks.

Log-variances (UW), logits (FAMO) and the like are vectors ``[T]`` that a method
learns beside the model. Each entry gets its own optimiser state, step count
included, so that a task absent from a batch is not moved by its momentum.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtljax.types import Mask, Weights


class PerTask(NamedTuple):
    """Variables ``[T]`` and the optimiser state of each."""

    value: Weights
    opt_state: Any  # every leaf leads with the task axis


def init(optimizer: optax.GradientTransformation, value: Weights) -> PerTask:
    """Starts every entry of ``value`` ``[T]`` with its own optimiser state."""
    return PerTask(value, jax.vmap(optimizer.init)(value))


def step(
    optimizer: optax.GradientTransformation, state: PerTask, grad: Weights, mask: Mask
) -> PerTask:
    """One optimiser step on the entries of present tasks; the others stay."""
    updates, opt_state = jax.vmap(optimizer.update)(grad, state.opt_state, state.value)
    new = PerTask(state.value + jnp.asarray(updates), opt_state)

    def keep(n, o):
        return jnp.where(mask.reshape((-1,) + (1,) * (n.ndim - 1)), n, o)

    return jax.tree.map(keep, new, state)
