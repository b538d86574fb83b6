"""FAMO: equal relative decrease of all losses with one backward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtljax import per_task
from mtljax.balancer import (
    Balancer,
    check_number,
    factory,
    from_weights,
)
from mtljax.methods._preference import TaskVector, task_vector
from mtljax.types import Losses, Mask, Number, Scale, Weights


class FAMOState(NamedTuple):
    """State of :func:`famo`."""

    learned: per_task.PerTask  # value: the logits ξ, [T]
    previous: Losses  # losses of the last batch, before the step
    pending: Mask  # tasks whose last change of loss is not yet used to update ξ
    task_weights: Weights

    @property
    def logits(self) -> Float[Array, " tasks"]:
        """Returns the logits ξ."""
        return self.learned.value


def famo_weights(
    logits: Float[Array, " tasks"], excess: Losses, mask: Mask | None = None
) -> Weights:
    """Computes ``w_i = c z_i/D_i`` with ``z = softmax(ξ)`` and ``Σ_i w_i = 1``."""
    raw = jax.nn.softmax(logits, where=mask) / excess
    return raw / jnp.maximum(raw.sum(), jnp.finfo(raw.dtype).tiny)


def famo_slope(
    logits: Float[Array, " tasks"], before: Losses, after: Losses, mask: Mask
) -> Float[Array, " tasks"]:
    """Computes the gradient ``z∘(δ − z·δ)`` for ξ with ``δ = log D − log D⁺``."""
    z = jax.nn.softmax(logits, where=mask)
    change = jnp.where(mask, jnp.log(before) - jnp.log(after), 0)
    return z * (change - z @ change)


@factory
def famo(
    num_tasks: int,
    *,
    learning_rate: Number = 0.025,
    weight_decay: Number = 1e-3,
    min_losses: Number | TaskVector = 0.0,
    scale: Scale = "native",
) -> Balancer:
    """Fast adaptive multi-task optimisation (FAMO).

    With ``D = ℓ − b`` and ``z = softmax(ξ)`` the weights are ``w_i = c z_i / D_i``. The
    constant c normalises them to sum to 1. Every step descends ``c Σ z_i log D_i``.
    After the step, Adam updates the logits ξ from the change of the log losses. The
    weight of a task increases if its loss decreased less than the others.

    The change should be measured on the *same* batch after the step, with one more
    forward pass: ``state = mtljax.observe(balancer, state, losses=losses_after)``. The
    O(1) cost in the paper is one backward and two forward passes. Without ``observe``,
    the losses of the next batch are used. This has no extra cost, but the change then
    includes the difference between two batches. Do not sample new dropout masks for the
    second losses, and do not update BatchNorm statistics.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      learning_rate: Learning rate of Adam for the logits.
      weight_decay: L2 coefficient γ of the logits. It is added to their gradient, as
        in Adam of PyTorch, and is the regulariser of the method. The authors' NYUv2,
        CelebA and QM9 scripts, LibMTL and TorchJD use 1e-3. The Cityscapes script uses
        1e-2, and the default of the authors' class is 1e-5.
      min_losses: Lower bound b of the losses, a number or shape ``[T]``.
      scale: ``"native"`` and ``"mean"`` are weights that sum to 1. ``"sum"`` multiplies
        them by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be above
      ``min_losses``. A step costs one backward pass, and one more forward pass with
      :func:`mtljax.observe`. The state has 6 T numbers.

    Raises:
      ValueError: If ``learning_rate`` is not positive, ``weight_decay`` is negative, or
        the number of ``min_losses`` differs from T.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.famo(3)
      >>> grads = {"w": jnp.eye(3)}
      >>> state = balancer.init(grads)
      >>> _, state = balancer.update(grads, state, losses=jnp.array([0.5, 2.0, 1.0]))
      >>> state.task_weights.tolist()
      [0.5714, 0.1429, 0.2857]

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, 2023.
    """
    check_number("famo", "learning_rate", learning_rate, above=0.0)
    check_number("famo", "weight_decay", weight_decay, at_least=0.0)
    inner = optax.chain(
        optax.add_decayed_weights(weight_decay), optax.adam(learning_rate)
    )

    bound = task_vector("famo", "min_losses", num_tasks, min_losses)
    zero = isinstance(bound, np.ndarray) and not bound.any()

    def excess(losses):  # the constant 1e-8 is that of the authors' code
        return losses - jnp.asarray(bound, losses.dtype) + 1e-8

    def init():
        zeros = jnp.zeros(num_tasks, jnp.float32)
        nothing = jnp.zeros(num_tasks, bool)
        return FAMOState(per_task.init(inner, zeros), zeros + 1, nothing, zeros + 1)

    def learn(state, losses, seen):
        seen = seen & state.pending
        slope = famo_slope(state.logits, excess(state.previous), excess(losses), seen)
        learned = per_task.step(inner, state.learned, slope, seen)
        return state._replace(learned=learned, pending=state.pending & ~seen)

    def weigh(state, *, losses, gramian, mask):
        del gramian
        state = learn(state, losses, mask)
        weights = famo_weights(state.logits, excess(losses), mask)
        return weights, state._replace(
            previous=jnp.where(mask, losses, state.previous),
            pending=state.pending | mask,
        )

    def observe(state, *, losses, mask):
        return learn(state, losses, mask)

    return from_weights(
        "famo",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="mean",
        scale=scale,
        reads_losses=True,
        positive_losses=zero,
        domain=lambda losses: losses > jnp.asarray(bound, losses.dtype),
        observe=observe,
    )
