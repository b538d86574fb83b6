"""Stacked gradients that are split over the devices of a mapped axis."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.gradients.linearized import Leaves, Linearized, Region
from mtljax.types import Gramian, Losses, Weights

# Leaves with at least this many entries per part are exchanged without a buffer.
_LARGE = 1 << 12


class Part(NamedTuple):
    """This device's part ``[T, P / D]`` of the gradients of some leaves."""

    numbers: list[int]
    rows: Any


class Scattered(NamedTuple):
    """A forward pass whose stacked gradients are scattered over the devices.

    A reduce-scatter sums the gradients over the devices. The devices then exchange
    T x T inner products and the weighted sum. Small leaves share one buffer, because
    each collective operation has a constant cost.
    """

    found: Linearized

    @property
    def leaves(self) -> Leaves:
        """The parameters."""
        return self.found.leaves

    @property
    def region(self) -> Region:
        """The mapped region."""
        return self.found.region

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.found.losses

    @property
    def aux(self) -> Any:
        """The auxiliary output of ``task_losses``."""
        return self.found.aux

    def measured(self) -> tuple[Gramian, list[Part]]:
        """Returns the Gramian, and the parts of the gradients."""
        axes, rows = self.region.axes, self.found.local_rows()
        devices, parts = placement.size(axes), []
        for numbers in _buffers(rows, devices):
            # Inside a mapped region a reshape needs no communication.
            flat = [rows[i].reshape(len(rows[i]), -1) for i in numbers]
            dtype = stack.promoted(*(x.dtype for x in flat))
            buffer = jnp.concatenate([x.astype(dtype) for x in flat], axis=1)
            padding = -buffer.shape[1] % devices
            buffer = jnp.pad(buffer, ((0, 0), (0, padding)))
            parts.append(Part(numbers, placement.scattered(buffer, axes, 1)))
        gramian = placement.total(stack.gramian([part.rows for part in parts]), axes)
        return gramian, parts

    def gradients(
        self, weights: Weights, own: Weights, parts: list[Part] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves."""
        if parts is None:
            return self.found.gradients(weights, own)
        leaves = self.leaves.of("shared")
        updates: list[Any] = [None] * len(leaves)
        for numbers, rows in parts:
            mixed = placement.assembled(stack.combine(rows, weights), self.region.axes)
            start = 0
            for i in numbers:
                stop = start + leaves[i].size
                whole = mixed[start:stop].reshape(leaves[i].shape)
                updates[i] = whole.astype(leaves[i].dtype)
                start = stop
        return updates, self.found.own(own)


def scatter(found: Linearized) -> Scattered:
    """Checks that no shared parameter is split, and returns the scattered pass."""
    region = found.region
    if any(region.sums(leaf) != region.axes for leaf in found.leaves.of("shared")):
        raise ValueError(
            "exchange='scatter' requires parameters that are equal on all devices of "
            f"{region.axes}, but a shared parameter is split over them. Use "
            "exchange='all'."
        )
    return Scattered(found)


def _buffers(rows: list[Any], devices: int) -> list[list[int]]:
    """Groups the leaves: large ones alone, small ones in one buffer."""
    large = [i for i, row in enumerate(rows) if row.size >= devices * _LARGE]
    small = [i for i in range(len(rows)) if i not in large]
    return [[i] for i in large] + ([small] if small else [])
