"""Stacked gradients of which every device of a mapped axis holds a part."""

import math
from typing import Any

import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.gradients.linearized import Linearized
from mtljax.gradients.passes import Passes
from mtljax.gradients.task_grads import local_rows

# Entries of a part from which on a leaf travels alone, without a copy into a buffer.
_LARGE = 1 << 12


def scattered_step(
    balancer: Any, found: Linearized, state: Any, inputs: Any, passes: Passes
) -> tuple[list[Any], Any, Any]:
    """A step of a balancer that acts by weights: ``(shared gradient, weights, state)``.

    The rows are summed over the devices by a reduce-scatter, so that each device holds
    ``[T, P / D]``; of these, T x T inner products and the weighted sum are exchanged.
    Small leaves travel in one buffer, as each collective has a cost of its own.

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
    devices = placement.size(axes)
    gramian, parts = None, []
    for numbers in _buffers(rows, devices):
        # A region is per device, so a reshape is free of communication.
        flat = [rows[i].reshape(len(rows[i]), -1) for i in numbers]
        dtype = jnp.result_type(*flat)
        buffer = jnp.concatenate([x.astype(dtype) for x in flat], axis=1)
        padding = -buffer.shape[1] % devices
        part = placement.scattered(jnp.pad(buffer, ((0, 0), (0, padding))), axes, 1)
        parts.append((numbers, part))
    if balancer.needs == "gramian":
        gramian = placement.total(stack.gramian([part for _, part in parts]), axes)
    weights, state = balancer.weigh(
        state, losses=found.losses, gramian=gramian, **inputs
    )
    updates: list[Any] = [None] * len(rows)
    for numbers, part in parts:
        mixed = placement.assembled(stack.combine(part, weights), axes)
        start = 0
        for i in numbers:
            shape, dtype = rows[i].shape[1:], rows[i].dtype
            stop = start + math.prod(shape)
            updates[i] = mixed[start:stop].reshape(shape).astype(dtype)
            start = stop
    return updates, weights, state


def _buffers(rows: list[Any], devices: int) -> list[list[int]]:
    """Leaves that travel together: large ones alone, small ones in one buffer."""
    large = [i for i, row in enumerate(rows) if row.size >= devices * _LARGE]
    small = [i for i in range(len(rows)) if i not in large]
    return [[i] for i in large] + ([small] if small else [])
