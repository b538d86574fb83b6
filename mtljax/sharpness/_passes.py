"""The first pass, and the loop over tasks for the passes that follow it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import placement
from mtljax.gradients import pullback
from mtljax.gradients.linearized import (
    Linearized,
    Options,
    VectorLosses,
    checked_losses,
    linearize,
    make_region,
)
from mtljax.gradients.passes import pick
from mtljax.sharpness._perturbation import Ball, Leaves, Splits, ascend, shifted
from mtljax.types import Losses, Params


class Passes(NamedTuple):
    """The result of the first pass, from which both parts of a step are computed.

    In a mapped region all gradients are averaged over the devices before they are used,
    so that the perturbations are those of the whole batch.
    """

    first: Linearized
    function: VectorLosses  # the local losses (and an auxiliary output)
    mask: Any  # as the user passed it, for this device
    name: str
    basis: Array  # [T, T], rows of absent tasks zero

    @property
    def shared(self) -> Leaves:
        """The shared leaves."""
        return self.first.leaves.of("shared")

    @property
    def own(self) -> Leaves:
        """The own leaves."""
        return self.first.leaves.of("own")

    @property
    def losses(self) -> Losses:
        """The losses at the parameters."""
        return self.first.losses

    @property
    def present(self) -> Array:
        """Ones for the tasks that are present, zeros for the others."""
        return self.basis.sum(0)

    @property
    def splits(self) -> tuple[Splits, Splits]:
        """The mapped axes over which shared and own leaves are split."""
        region = self.first.region

        def split(leaf):
            sums = region.sums(leaf)
            return tuple(axis for axis in region.axes if axis not in sums)

        return [split(x) for x in self.shared], [split(x) for x in self.own]

    def tree(self, shared: Leaves, own: Leaves) -> Params:
        """Returns the parameters with other shared and own leaves."""
        leaves = self.first.leaves
        return leaves.tree(shared, own, leaves.of("frozen"))

    def again(self, shared: Leaves, own: Leaves) -> Linearized:
        """Runs the forward pass at another point."""
        params = self.tree(shared, own)
        options = self.first.options
        return linearize(self.function, params, options, mask=self.mask, name=self.name)

    def local_losses_at(self, shared: Leaves, own: Leaves) -> Losses:
        """Returns the losses of this device at another point."""
        out = self.function(self.tree(shared, own))
        return checked_losses(out, self.first.options.has_aux)[0]

    def losses_at(self, shared: Leaves, own: Leaves) -> Losses:
        """Returns the losses at another point."""
        local = self.local_losses_at(shared, own)
        options = self.first.options
        return make_region(local, self.mask, options, self.name).losses

    def gradients(
        self, cotangent: Array, at: Linearized | None = None
    ) -> tuple[Leaves, Leaves]:
        """Returns the gradients of shared and own leaves at one point."""
        found = self.first if at is None else at
        shared, own = found.pull(found.region.seeded(cotangent))
        return self._summed(shared, own)

    def together(self, rows: Array, shared: Leaves, own: Leaves):
        """Returns the gradients of several tasks, each at its own shared leaves.

        The leaves ``shared`` are stacked like the rows. The leaves ``own`` and their
        gradients are not stacked, because each leaf belongs to one task.
        """
        region = self.first.region

        def losses(shared, own):
            def at(shared, row):
                return only(self.local_losses_at(shared, own), row)

            return jax.vmap(at)(shared, rows)

        point = placement.cast((shared, own), region.axes)
        _, pull, _ = pullback(losses, *point, backward="jax")
        shared, own = pull(region.seeded(jnp.ones_like(rows) * (rows != 0)).sum(1))
        return self._summed(shared, own)

    def _summed(self, shared: Leaves, own: Leaves) -> tuple[Leaves, Leaves]:
        """Sums gradients over the mapped axes."""
        leaves, axes = self.first.leaves, self.first.region.axes
        return leaves.summed(shared, axes), leaves.summed(own, axes, "own")

    def climb(
        self, directions: tuple[Leaves, Leaves], ball: Ball
    ) -> tuple[Leaves, Leaves, Array]:
        """Computes a perturbation, see :func:`ascend`."""
        return ascend((self.shared, self.own), directions, ball, self.splits)

    def moved(self, eps: Leaves, delta: Leaves) -> tuple[Leaves, Leaves]:
        """Returns the perturbed parameters."""
        return shifted(self.shared, eps), shifted(self.own, delta)


def first_pass(
    call: VectorLosses,
    params: Params,
    options: Options,
    *,
    mask: Any,
    name: str,
) -> Passes:
    """Runs one forward pass at the parameters, and keeps what later passes need."""
    first = linearize(call, params, options, mask=mask, name=name)
    first.leaves.check_balanced("shared", "own")
    num_tasks = first.losses.shape[0]
    basis = jnp.eye(num_tasks, dtype=first.losses.dtype)
    if first.region.mask is not None:
        basis = jnp.where(first.region.mask[:, None], basis, 0)
    return Passes(first, call.again(), mask, name, basis)


def only(losses: Losses, basis: Array) -> Array:
    """Returns the loss that a row of the basis selects; the others may be NaN."""
    return jnp.where(basis != 0, losses, 0).sum()


def add(left: Leaves, right: Leaves) -> Leaves:
    """Adds two lists of leaves."""
    return [a + b for a, b in zip(left, right, strict=True)]


def over_tasks(
    single: Callable[[Array, Array], tuple[Any, Leaves]],
    many: Callable[[Array, Array], tuple[Any, Leaves]],
    passes: Passes,
    sums: Leaves,
) -> tuple[Any, Leaves]:
    """Runs every task, stacks the first result and sums the second.

    Args:
      single: ``single(row of the basis, task) -> (rows, sums)``.
      many: The same for ``c`` tasks at once.
      passes: The first pass.
      sums: Leaves with the shapes and dtypes of the sums.

    Returns:
      A pair of the stacked results, ``[T, ...]``, and the sums.
    """
    basis, num_tasks = passes.basis, passes.basis.shape[0]
    asked = passes.first.options.passes
    strategy, chunk_size, together = pick(asked, num_tasks, passes.first.body)
    tasks = jnp.arange(num_tasks)
    if strategy == "vmap":
        return many(basis, tasks)
    if strategy == "unrolled":
        found = [single(basis[task], tasks[task]) for task in range(num_tasks)]
        rows = jax.tree.map(lambda *row: jnp.stack(row), *[rows for rows, _ in found])
        return rows, functools.reduce(add, [sums for _, sums in found])
    size = min(chunk_size, num_tasks) if strategy == "chunked" else 1
    blocks = -(-num_tasks // size)
    padding = blocks * size - num_tasks  # zero rows, treated as absent tasks
    basis = jnp.pad(basis, ((0, padding), (0, 0))).reshape(blocks, size, num_tasks)
    tasks = jnp.pad(tasks, (0, padding)).reshape(blocks, size)

    def block(sums, at):
        if strategy == "map":
            rows, more = single(at[0][0], at[1][0])
            rows = jax.tree.map(lambda x: x[None], rows)
        else:
            rows, more = many(*at)
        return add(sums, more), rows

    zeros = [placement.zeros(x) for x in sums]
    sums, rows = jax.lax.scan(block, zeros, (basis, tasks), unroll=together)
    rows = jax.tree.map(
        lambda x: x.reshape(blocks * size, *x.shape[2:])[:num_tasks], rows
    )
    return rows, sums
