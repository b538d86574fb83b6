"""ExcessMTL: larger weights for tasks with a larger excess risk."""

import functools
import operator
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    check_choice,
    check_number,
    factory,
    from_grads,
    rescale,
)
from mtljax.methods._tracked import check_tracked, zeros_like_stacked
from mtljax.types import Grads, Mask, Number, Scale, Weights

Compat: TypeAlias = Literal["official", "torchjd"]

# Above this exponent, one step makes the weights one-hot in any precision.
_MAX_EXPONENT = 1e4


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`."""

    accumulator: Grads  # S_i: sums of squared gradients, [T, *param], float32
    initial: Weights  # e_i⁰: excess risk at the first gradient of a task, 0 before it
    logits: Weights  # log of the weights, up to a constant
    task_weights: Weights


def excess_risks(grads: Grads, accumulator: Grads) -> Weights:
    """Computes ``e_i = Σ_k g_ik² / √(S_ik + 1e-7)``, the excess risk up to a factor."""

    def leaf(g, s):
        g = g.astype(s.dtype)
        # This order avoids the square of g, which may overflow.
        return (g * (g / jnp.sqrt(s + 1e-7))).sum(tuple(range(1, g.ndim)))

    return functools.reduce(
        operator.add, jax.tree.leaves(jax.tree.map(leaf, grads, accumulator))
    )


def excess_mtl_weights(
    logits: Weights,
    excess: Weights,
    initial: Weights,
    step_size: Number,
    mask: Mask | None = None,
) -> tuple[Weights, Weights]:
    """Takes one step of exponentiated gradient, ``w_i ∝ w_i exp(η e_i/e_i⁰)``.

    Returns:
      The weights, which sum to 1 over the present tasks, and the logits, each of shape
      ``[T]``. The logits of absent tasks do not change. The total weight of the present
      tasks according to the logits does not change either.
    """
    mask = jnp.ones(logits.shape, bool) if mask is None else mask
    started = initial > 0
    ratio = jnp.where(started, excess / jnp.where(started, initial, 1), 1)
    moved = logits + jnp.minimum(step_size * ratio, _MAX_EXPONENT)
    moved -= _log_sum(moved, mask) - _log_sum(logits, mask)
    logits = jnp.where(mask, moved, logits)
    return jax.nn.softmax(logits, where=mask), logits


def _log_sum(logits, mask):
    return jnp.where(mask.any(), jax.nn.logsumexp(logits, where=mask), 0)


@factory
def excess_mtl(
    num_tasks: int,
    *,
    step_size: Number = 1.0,
    compat: Compat = "official",
    scale: Scale = "native",
) -> Balancer:
    """Robust multi-task learning with excess risks (ExcessMTL).

    The excess risk of a task is the difference between its loss and its optimal loss.
    The second-order estimate is ``e_i = Σ_k g_ik² / √S_ik``, where ``S_ik`` is the sum
    of all squared gradients, as in Adagrad. It is divided by its first value ``e_i⁰``.
    The weights are updated by exponentiated gradient, ``w_i ← w_i exp(η e_i/e_i⁰)``,
    and normalised. A task with label noise has a large loss but a small excess risk, so
    it does not dominate. The weights are updated before each step. They are equal at
    the first step.

    As long as the gradient of a task has been zero, the ratio ``e_i/e_i⁰`` is 1. The
    rule is not invariant to rotations of parameter space, so the Gramian is not
    sufficient.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      step_size: Step size η, positive. The authors' README and TorchJD use 1. The
        default of LibMTL is 1e-2.
      compat: Native scale of the weights. They sum to the number of present tasks with
        ``"official"``, as in LibMTL, and to 1 with ``"torchjd"``. TorchJD 0.18 without
        warm-up steps does not divide the excess risks of the first step, so that its
        weights are not equal there. This is not reproduced.
      scale: ``"native"``, or weights that sum to the number of present tasks
        (``"sum"``) or 1 (``"mean"``).

    Returns:
      A :class:`mtljax.Balancer` that reads the stacked gradients. A step costs T
      backward passes. The state has T numbers per parameter and 2 T numbers. Initialise
      it with the parameters that are balanced, see :func:`mtljax.shared_params`.

    Raises:
      ValueError: If ``step_size`` is not positive, or the gradients do not have the
        shapes of the parameters passed to ``init``.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.excess_mtl(2)
      >>> state = balancer.init({"w": jnp.zeros(2)})
      >>> for fall in (1.0, 0.5):  # the second task's gradient shrinks
      ...     grads = {"w": jnp.array([[1.0, 0.0], [0.0, fall]])}
      ...     update, state = balancer.update(grads, state)
      >>> state.task_weights.tolist()
      [1.237, 0.763]

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks
      <https://arxiv.org/abs/2402.02009>`_, 2024.
    """
    check_choice("excess_mtl", "compat", compat, Compat)
    check_choice("excess_mtl", "scale", scale, Scale)
    check_number("excess_mtl", "step_size", step_size, above=0.0)

    def init(params):
        zeros = jnp.zeros(num_tasks, jnp.float32)
        accumulator = zeros_like_stacked(params, num_tasks)
        return ExcessMTLState(accumulator, zeros, zeros, zeros + 1)

    def combine(state, grads, *, losses, mask):
        del losses
        check_tracked("excess_mtl", state.accumulator, grads)
        accumulator = jax.tree.map(
            lambda s, g: s + jnp.square(g.astype(s.dtype)), state.accumulator, grads
        )
        excess = excess_risks(grads, accumulator)
        initial = jnp.where(mask & (state.initial == 0), excess, state.initial)
        shares, logits = excess_mtl_weights(
            state.logits, excess, initial, step_size, mask
        )
        native = "mean"
        if compat == "official":
            shares, native = shares * mask.sum(), "sum"
        weights = jnp.where(mask, rescale(shares, mask, scale, native), 0)
        new = ExcessMTLState(accumulator, initial, logits, weights)
        return stack.combine(grads, weights), new

    return from_grads("excess_mtl", num_tasks, init=init, combine=combine)
