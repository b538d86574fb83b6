"""Losses and gradients of one inner step, for a task or a group."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtljax import placement
from mtljax.alternating._parts import Parts
from mtljax.gradients import pullback
from mtljax.gradients.linearized import Options, Region, make_region


def indexed(task_losses: Callable[..., Any]) -> Callable[..., Any]:
    """Converts a function that returns all T losses to a task loss.

    The result is a task loss for :func:`alternate`. Every inner step evaluates all
    heads and differentiates one of them. Use it for small heads of different shapes
    that are labelled with their task number. In a group the members share the forward
    pass. ``jax.lax.switch`` over heads would not share it, because under ``vmap`` it
    evaluates every branch for every member.

    Args:
      task_losses: A function ``task_losses(params, batch, **kwargs)`` that returns the
        losses, shape ``[T]``, or ``(losses, batch_stats)``.

    Returns:
      A function ``task_loss(params, task, batch, **kwargs)`` that returns the loss of
      one task, or ``(loss, batch_stats)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.alternating import indexed
      >>> task_loss = indexed(lambda params, batch: jnp.array([1.0, 2.0]) * params)
      >>> float(task_loss(3.0, 1, None))
      6.0
    """

    def task_loss(params, task, batch, **kwargs):
        out = task_losses(params, batch, **kwargs)
        losses, *stats = out if isinstance(out, tuple) else (out,)
        return (losses[task], *stats) if stats else losses[task]

    return task_loss


class Group(NamedTuple):
    """The members of one inner step, and their losses as functions of the parameters.

    Trees of parameters contain one row per member in every stacked own leaf.
    """

    parts: Parts
    task_loss: Callable[[Any, Array], Any]  # (parameters of one task, task)
    tasks: Int[Array, " members"]
    present: Bool[Array, " members"]
    has_stats: bool
    full: bool  # whether every member is known to be present before tracing
    here: Bool[Array, " members"]  # members that are present on this device
    options: Options

    def _one(self, params: Any, task: Array) -> tuple[Array, Any]:
        out = self.task_loss(params, task)
        if self.has_stats != isinstance(out, tuple):
            raise ValueError(
                "task_loss must return (loss, batch_stats) if step is given "
                f"batch_stats, and the loss alone otherwise; it returned a "
                f"{type(out).__name__}."
            )
        loss, stats = out if self.has_stats else (out, None)
        shape = jnp.shape(loss)
        if shape:
            raise ValueError(
                f"task_loss must return a scalar, not an array of shape {shape}; for a "
                "function that returns all losses, use "
                "mtljax.alternating.indexed(task_losses)."
            )
        return loss, stats

    def losses(self, params: Any) -> tuple[Float[Array, " members"], Any]:
        """Returns all losses from one forward pass through the shared part."""
        if self.tasks.shape[0] == 1:
            # vmap would convert a lax.switch over heads to an evaluation of all heads.
            loss, stats = self.loss_of(params, jnp.int32(0))
            return loss[None], stats
        return jax.vmap(self._one, in_axes=(self.parts.axes(), 0), out_axes=(0, None))(
            params, self.tasks
        )

    def loss_of(self, params: Any, member: Array) -> tuple[Array, Any]:
        """Returns the loss of one member."""
        row = self.parts.map_rows(lambda x: x[member], params)
        return self._one(row, self.tasks[member])

    def weights(self, mean: bool) -> Float[Array, " members"]:
        """Returns the weights of the members' losses in the loss of the group."""
        weights = self.present.astype(jnp.result_type(float))
        return weights / jnp.maximum(weights.sum(), 1) if mean else weights

    def total(self, losses: Array, mean: bool) -> Array:
        """Returns the loss of the group; the loss of an absent member may be NaN."""
        seen = jnp.where(self.present, losses, 0)
        return (seen * self.weights(mean).astype(losses.dtype)).sum()


class Linearized(NamedTuple):
    """One forward pass of a group, and the pullback of its losses."""

    losses: Array
    stats: Any
    region: Region
    pull: Callable[..., Any]
    params: Any

    def gradient(self, weights: Array) -> Any:
        """Returns the gradient of a weighted sum, averaged over the mapped devices."""
        weights = weights.astype(self.losses.dtype)
        (local,) = self.pull(self.region.seeded(weights))
        return jax.tree.map(
            lambda g, leaf: placement.total(g, self.region.sums(leaf)),
            local,
            self.params,
        )


def linearize(group: Group, params: Any) -> Linearized:
    """Runs the forward pass of the members at ``params``."""
    options = group.options
    point = placement.cast(params, options.axes)
    local, pull, stats = pullback(group.losses, point, has_aux=True)
    mask = None if group.full else group.here
    region = make_region(local, mask, options, "alternate")
    stats = averaged(stats, options.axes)
    return Linearized(region.losses, stats, region, pull, params)


def averaged(stats: Any, axes: tuple[str, ...]) -> Any:
    """Averages floating-point statistics over devices; counts are equal on all."""
    if not axes:
        return stats
    count = placement.size(axes)

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return placement.total(x / count, axes)
        return placement.largest(x, axes)

    return jax.tree.map(leaf, stats)


def group_gradient(
    group: Group, params: Any, mean: bool, grad_fn: Callable[..., Any] | None
):
    """Returns ``(losses, stats, gradient of the group's loss)`` from one pass."""
    if grad_fn is None:
        found = linearize(group, params)
        return found.losses, found.stats, found.gradient(group.weights(mean))

    def objective(params):
        losses, stats = group.losses(params)
        return group.total(losses, mean), (losses, stats)

    (_, (losses, stats)), grad = grad_fn(objective, has_aux=True)(params)
    return losses, stats, grad


def each_member(
    group: Group,
    params: Any,
    visit: Callable[..., tuple[Any, Any]],
    carry: Any,
    *,
    mean: bool,
    grad_fn: Callable[..., Any] | None,
) -> tuple[Any, Any, Any, Any]:
    """Calls ``visit`` with the gradient of each member.

    This costs one forward pass and one backward pass per member, all at ``params``, or
    one call of ``grad_fn`` per member. At most one gradient is stored at a time. The
    loop runs from the last member to the first. Padding entries repeat the first
    member, whose result must be written last.

    Args:
      group: The group.
      params: The point of all gradients.
      visit: ``visit(carry, member, loss, grad) -> (carry, out)``.
      carry: The initial carry.
      mean: Whether the loss of the group is the mean.
      grad_fn: See :class:`StepOptions`.

    Returns:
      A tuple ``(losses, stats, carry, outs)`` with outs stacked over the members.
    """
    numbers = jnp.arange(group.tasks.shape[0])
    weights = group.weights(mean)
    if grad_fn is None:
        found = linearize(group, params)

        def body(carry, number):
            grad = found.gradient(jnp.where(numbers == number, weights, 0))
            return visit(carry, number, found.losses[number], grad)

        carry, outs = jax.lax.scan(body, carry, numbers, reverse=True)
        return found.losses, found.stats, carry, outs

    def call(carry, number):
        def objective(params):
            loss, stats = group.loss_of(params, number)
            weight = weights[number].astype(loss.dtype)
            return jnp.where(group.present[number], loss, 0) * weight, (loss, stats)

        (_, (loss, stats)), grad = grad_fn(objective, has_aux=True)(params)
        carry, out = visit(carry, number, loss, grad)
        return carry, (loss, stats, out)

    carry, found = jax.lax.scan(call, carry, numbers, reverse=True)
    losses, stats, outs = found
    return losses, jax.tree.map(lambda x: x[0], stats), carry, outs
