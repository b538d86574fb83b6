"""Penalty-based boundary intersection: along the preference, at a price beside it."""

from typing import NamedTuple

import jax.numpy as jnp

from mtljax.balancer import Balancer, check_number, factory, from_weights
from mtljax.methods._preference import (
    HostVector,
    TaskVector,
    constant_preference,
    present_preference,
    task_vector,
)
from mtljax.types import Losses, Mask, Number, Scale, Weights


class PBIState(NamedTuple):
    """State of :func:`pbi`."""

    task_weights: Weights


def pbi_weights(
    losses: Losses,
    preference: Weights,
    ideal: Losses | HostVector,
    theta: Number,
    mask: Mask | None = None,
) -> Weights:
    """Gradient of ``d_1 + θ d_2`` in the losses.

    ``d_1 = (ℓ − z)·r̂`` and ``d_2 = ‖(ℓ − z) − d_1 r̂‖`` with ``r̂ = r/‖r‖``. Where
    ``d_2`` is zero up to rounding, so is its gradient.
    """
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    size = jnp.sqrt((preference**2).sum())
    toward = preference / jnp.where(size > 0, size, 1)
    shifted = losses - jnp.asarray(ideal, losses.dtype)
    shifted = jnp.where(mask & (size > 0), shifted, 0)
    beside = shifted - (shifted @ toward) * toward
    info = jnp.finfo(losses.dtype)
    noise = 8 * info.eps * jnp.sqrt((shifted**2).sum())
    distance = jnp.maximum(jnp.sqrt((beside**2).sum()), jnp.maximum(noise, info.tiny))
    return toward + theta * beside / distance


@factory
def pbi(
    num_tasks: int,
    *,
    theta: Number = 5.0,
    preference: TaskVector | None = None,
    ideal: Number | TaskVector = 0.0,
    scale: Scale = "native",
) -> Balancer:
    """Penalty-based boundary intersection (PBI).

    Descends ``d_1 + θ d_2``: the distance of the losses from the ideal point z along
    the preference r, and θ times their distance from that line. Its minimum is where
    the line through z meets the Pareto front (for θ large enough).

    Weights can be negative: a loss too small for its preference is pushed up. On the
    line the norm ``d_2`` has no gradient; the penalty is left out there.

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      theta: θ, not negative; 5 in the paper.
      preference: r ``[T]``, not negative; equal by default. Only its direction counts,
        among the tasks present. May be a traced array.
      ideal: z ``[T]`` or one number, at most the losses; 0 by default (inferred: the
        paper takes the best values found so far).
      scale: ``"native"`` are the derivatives, with ``‖r‖ = 1``; ``"mean"`` divides them
        by the sum of the entries of ``r/‖r‖``, so that θ = 0 is a weighted mean, and
        ``"sum"`` multiplies that by the number of tasks.

    Returns:
      A balancer; needs ``losses`` and reads the side input ``preference``, which
      replaces the constant. One backward pass; no state.

    Raises:
      ValueError: If ``theta`` is negative, ``ideal`` or the preference has another
        length than T, or the preference has a negative entry or none above zero.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.pbi(2, theta=1.0, preference=[3.0, 4.0])
      >>> grads = {"w": jnp.eye(2)}
      >>> losses = jnp.array([3.0, 3.0])
      >>> balancer.update(grads, balancer.init(grads), losses=losses)[0]["w"].tolist()
      [1.4, 0.2]

    References:
      Zhang and Li, `MOEA/D: A Multiobjective Evolutionary Algorithm Based on
      Decomposition <https://doi.org/10.1109/TEVC.2007.892759>`_, 2007.
    """
    check_number("pbi", "theta", theta, at_least=0.0)
    origin = task_vector("pbi", "ideal", num_tasks, ideal)
    constant = constant_preference("pbi", num_tasks, preference)

    def init():
        return PBIState(jnp.ones(num_tasks, jnp.float32))

    def weigh(state, *, losses, gramian, mask, preference):
        del gramian
        chosen = present_preference("pbi", constant, preference, mask, losses.dtype)
        weights = pbi_weights(losses, chosen, origin, theta, mask)
        if scale != "native":
            # `chosen` sums to 1, so its length is one over the sum of r/‖r‖.
            weights = weights * jnp.sqrt((chosen**2).sum())
        return weights, state

    return from_weights(
        "pbi",
        num_tasks,
        init=init,
        weigh=weigh,
        needs="losses",
        native="mean",
        scale=scale,
        reads_losses=True,
        side_inputs=("preference",),
    )
