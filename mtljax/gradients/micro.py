"""Exact accumulation of gradients over micro-batches."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.balancer import clone_keys
from mtljax.gradients.linearized import (
    Leaves,
    Linearized,
    Options,
    Region,
    VectorLosses,
    linearize,
    own_weights,
    split_leaves,
)
from mtljax.gradients.representation import Represented, Through, linearize_through
from mtljax.gradients.separate import Separate
from mtljax.types import Gramian, Losses, Params, Weights

# What the first loop accumulates: the losses, and also T gradients or the Gramian of a
# representation.
Wanted: TypeAlias = Literal["losses", "rows", "representation"]


class Accumulated(NamedTuple):
    """A batch as a loop over micro-batches; every loss is the mean over the loop.

    Gradients are additive, so the loop sums them. The Gramian of a representation is
    additive too, because examples do not mix in it. The Gramian of the parameters is
    not additive. It needs the T gradients of the whole batch.
    """

    sweep: Callable[[Callable[[Any], Any]], tuple[Any, Any]]
    leaves: Leaves
    region: Region  # of the whole batch
    aux: Any  # [M, ...]
    rows: list[Any] | None  # stacked gradients of the shared leaves
    gramian: Gramian | None
    owns: list[Any]  # gradients of the own leaves

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.region.losses

    def stacked(self) -> list[Any]:
        """Returns the T gradients of the shared leaves."""
        assert self.rows is not None
        return self.rows

    def own(self, weights: Weights) -> list[Any]:
        """Returns the gradients of the own leaves for weights of one."""
        del weights
        return self.owns

    def measured(self) -> tuple[Gramian | None, list[Any] | None]:
        """Returns the Gramian, and the stacked gradients if they were used."""
        if self.rows is None:
            return self.gramian, None
        return self.leaves.gramian(self.rows, self.region), self.rows

    def gradients(
        self, weights: Weights, own: Weights, rows: list[Any] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves."""
        if rows is None:
            found, _ = self.sweep(lambda one: one.local_gradients(weights, own))
            shared, owns = found
            axes = self.region.axes
            return (
                self.leaves.summed(shared, axes),
                self.leaves.summed(owns, axes, "own"),
            )
        owns = []
        if self.leaves.numbers("own"):
            found, _ = self.sweep(lambda one: one.local_own(own))
            owns = self.leaves.summed(found, self.region.axes, "own")
        return stack.combine(rows, weights), owns


def split_batch(args: Any, count: int) -> Any:
    """Splits every array ``[N, ...]`` into ``[M, N / M, ...]``.

    Example n is in micro-batch n mod M, so that examples that are split over devices
    remain on their device.

    Raises:
      ValueError: If M does not divide the length of an array.
    """

    def leaf(x):
        x = jnp.asarray(x)
        if x.ndim == 0 or x.shape[0] % count:
            raise ValueError(
                f"micro_batches={count} must divide the leading axis of every argument "
                f"after params, but one has shape {x.shape}."
            )
        size = x.shape[0] // count
        x = placement.divisible(x, size)
        return jnp.moveaxis(x.reshape(size, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(leaf, args)


def accumulate(
    task_losses: Any,
    call: VectorLosses,
    params: Params,
    options: Options,
    count: int,
    *,
    mask: Any,
    name: str,
    wanted: Wanted = "rows",
    owns: bool = True,
) -> Accumulated:
    """Runs the first loop over the micro-batches.

    Args:
      task_losses: The function of the user.
      call: Its call, with the arguments that are split.
      params: Parameters.
      options: Options of the gradients.
      count: M.
      mask: Present tasks of the whole batch.
      name: Name of the public function, for error messages.
      wanted: What the loop accumulates.
      owns: Whether it accumulates gradients of own leaves with weight one.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{name}: micro_batches must be a positive integer, not {count!r}."
        )
    if isinstance(task_losses, Separate):
        raise ValueError(
            f"{name}: micro_batches does not support mtljax.separate. Split the "
            "batches of the tasks in the loss."
        )
    split = split_batch(list(call.args), count)

    def forward(batch) -> Linearized | Represented:
        one = VectorLosses(call.function, batch, call.kwargs, call.names)
        if wanted == "representation":
            assert isinstance(task_losses, Through)
            found = linearize_through(
                task_losses, one, params, options, mask=mask, name=name
            )
        else:
            found = linearize(one, params, options, mask=mask, name=name)
        call.names = one.names
        return found

    def sweep(function):
        """Returns the mean over the micro-batches, and the auxiliary outputs.

        All loops sample the same random numbers.
        """
        first, batches = clone_keys((split, split))
        first = jax.tree.map(lambda x: x[0], first)

        def one(batch):
            found = forward(batch)
            return function(found), (found.aux, found.region.mask)

        types = jax.make_jaxpr(lambda b: one(b)[0])(first).out_avals
        shape = jax.eval_shape(lambda b: one(b)[0], first)
        zeros = [placement.zeros(aval) for aval in types]
        start = jax.tree.unflatten(jax.tree.structure(shape), zeros)

        def body(total, batch):
            part, others = one(batch)
            return jax.tree.map(lambda t, x: t + x / count, total, part), others

        return jax.lax.scan(body, start, batches)

    def first_sweep(found):
        local = found.region.losses
        ones = own_weights(local, found.region.mask)
        own = found.local_own(ones) if owns and wanted != "losses" else []
        if wanted == "rows":
            return local, found.local_rows(), own
        if wanted == "representation":
            return local, found.measured()[0], own
        return local, (), own

    (losses, measured, own), (aux, masks) = sweep(first_sweep)
    leaves, axes = split_leaves(params, options.labels), options.axes
    present = None if masks is None else masks[0]
    region = Region(axes, losses, None, losses, present, present)
    rows = gramian = None
    if wanted == "rows":
        rows = leaves.summed(measured, axes)
        rows = leaves.constrained(rows, options.shardings)
    elif wanted == "representation":
        # Gradients of a micro-batch are M times as large as those of the whole batch,
        # and ``measured`` is a mean, so that Σ_m G_m / M² = measured / M.
        gramian = measured / count
    own = leaves.summed(own, axes, "own") if own else []
    return Accumulated(sweep, leaves, region, aux, rows, gramian, own)
