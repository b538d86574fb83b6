"""PBI: penalises the distance of the losses from a preference direction."""

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
    """Computes the gradient of ``d_1 + θ d_2`` with respect to the losses.

    ``d_1 = (ℓ − z)·r̂`` and ``d_2 = ‖(ℓ − z) − d_1 r̂‖`` with ``r̂ = r/‖r‖``. If ``d_2``
    is zero up to rounding, its gradient is set to zero.
    """
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    size = jnp.sqrt((preference**2).sum())
    toward = preference / jnp.where(size > 0, size, 1)
    shifted = losses - jnp.asarray(ideal, losses.dtype)
    shifted = jnp.where(mask & (size > 0), shifted, 0)
    beside = shifted - (shifted @ toward) * toward
    info = jnp.finfo(losses.dtype)
    noise = 8 * info.eps * jnp.sqrt((shifted**2).sum())
    distance = jnp.sqrt((beside**2).sum())
    off_line = distance > jnp.maximum(noise, info.tiny)
    direction = jnp.where(off_line, beside / jnp.where(off_line, distance, 1), 0)
    return toward + theta * direction


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

    The objective is ``d_1 + θ d_2`` with ``r̂ = r/‖r‖``, ``d_1 = (ℓ − z)·r̂`` and
    ``d_2 = ‖ℓ − z − d_1 r̂‖``. ``d_1`` is the distance of the losses from the ideal
    point z along the preference r, and ``d_2`` is their distance from this line.
    If θ is large enough, the minimum is the intersection of the line with the Pareto
    front.

    Weights can be negative. The update then increases a loss that is small relative to
    its preference. On the line, ``d_2`` is not differentiable and the penalty is
    omitted.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      theta: Weight θ of the penalty, at least 0. The paper uses 5.
      preference: Preference r, shape ``[T]``, non-negative, equal by default. Only its
        direction over the present tasks matters. It may be traced.
      ideal: Ideal point z, a number or shape ``[T]``, at most the losses. The default 0
        is inferred. The paper uses the best values found until then.
      scale: ``"native"`` are the derivatives with ``‖r‖ = 1``. ``"mean"`` divides them
        by the sum of the entries of ``r/‖r‖``, so that θ = 0 is a weighted mean.
        ``"sum"`` multiplies this by the number of present tasks.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses`` and the side input
      ``preference``, which overrides the constant. A step costs one backward pass. The
      state contains the last task weights only.

    Raises:
      ValueError: If ``theta`` is negative, the number of ``ideal`` values or of
        preferences differs from T, a preference is negative, or all are zero.

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
            # `chosen` sums to 1, so its norm is the reciprocal of the sum of r/‖r‖.
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
