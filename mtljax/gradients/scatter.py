"""Stacked gradients of which every device of a mapped axis holds a part."""

from typing import Any

import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.gradients.linearized import Linearized
from mtljax.gradients.passes import Passes
from mtljax.gradients.task_grads import local_rows


def scattered_step(
    balancer: Any, found: Linearized, state: Any, inputs: Any, passes: Passes
) -> tuple[list[Any], Any, Any]:
    """A step of a balancer that acts by weights: ``(shared gradient, weights, state)``.

    The rows are summed over the devices by a reduce-scatter, so that each device holds
    ``[T, P / D]``; of these, T x T inner products and the weighted sum are exchanged.
    All leaves travel in one buffer, as each collective has a cost of its own.

    Raises:
      ValueError: If a shared parameter is split over the axis, whose rows are parts
        already.
    """
    axes, shared = found.region.axes, found.leaves.of("shared")
    if any(found.region.sums(leaf) != axes for leaf in shared):
        raise ValueError(
            "exchange='scatter' is for parameters that are equal on all devices of "
            f"{axes}; parameters that are split over them need exchange='all'."
        )
    rows = local_rows(found, passes)
    flat = [row.reshape(len(row), -1) for row in rows]
    dtype = jnp.result_type(*flat)
    buffer = jnp.concatenate([x.astype(dtype) for x in flat], axis=1)
    padding = -buffer.shape[1] % placement.size(axes)
    buffer = jnp.pad(buffer, ((0, 0), (0, padding)))
    part = placement.scattered(buffer, axes, 1)
    gramian = None
    if balancer.needs == "gramian":
        gramian = placement.total(stack.gramian(part), axes)
    weights, state = balancer.weigh(
        state, losses=found.losses, gramian=gramian, **inputs
    )
    mixed = placement.assembled(stack.combine(part, weights), axes)
    updates, start = [], 0
    for row, flattened in zip(rows, flat, strict=True):
        stop = start + flattened.shape[1]
        updates.append(mixed[start:stop].reshape(row.shape[1:]).astype(row.dtype))
        start = stop
    return updates, weights, state

