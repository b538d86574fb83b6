"""ExcessMTL: more weight to the tasks farthest from where they could be."""

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

# Beyond this one step makes the weights one-hot in any precision.
_MAX_EXPONENT = 1e4


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`."""

    accumulator: Grads  # S_i: sums of squared gradients, [T, *param], float32
    initial: Weights  # e_i⁰: excess risk at a task's first gradient; 0 before
    logits: Weights  # log of the weights, up to a constant
    task_weights: Weights


def excess_risks(grads: Grads, accumulator: Grads) -> Weights:
    """``e_i = Σ_k g_ik² / √(S_ik + 1e-7)``: the excess risk, up to a constant."""

    def leaf(g, s):
        g = g.astype(s.dtype)
        # In this order a square that overflows gives 0, not infinity over infinity.
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
    """One step of exponentiated gradient, ``w_i ∝ w_i exp(η e_i/e_i⁰)``.

    Returns:
      Weights that sum to 1 over the present tasks, and the logits: those of absent
      tasks are the same, those of present ones keep the share of all of them.
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

    The excess risk of a task, how far its loss is above its optimum, is estimated to
    second order by ``e_i = Σ_k g_ik² / √S_ik`` with ``S_ik`` the sum of all squared
    gradients (Adagrad's scaling), and taken relative to its first value. The weights
    follow by exponentiated gradient, ``w_i ← w_i exp(η e_i/e_i⁰)``, normalised: a task
    with label noise has a large loss but no excess risk, and does not take over. The
    first step has equal weights; those of a step are updated before it is taken.

    A task without a gradient yet counts as being at its first step. The rule is not
    invariant to rotations of parameter space, so the Gramian does not suffice.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      step_size: η, positive: 1 in the authors' README and TorchJD; 1e-2 is LibMTL's
        default.
      compat: Native scale of the weights: they sum to T (``"official"``, also LibMTL)
        or to 1 (``"torchjd"``).
      scale: ``"native"``, or weights that sum to T (``"sum"``) or 1 (``"mean"``).

    Returns:
      A balancer; needs the stacked gradients: T backward passes. State: T numbers per
      parameter and 3 T more, so ``init`` wants the parameters that are balanced.

    Raises:
      ValueError: If ``step_size`` is not positive, or the gradients do not fit the
        parameters given to ``init``.

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
