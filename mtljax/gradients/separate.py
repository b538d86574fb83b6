"""Tasks with separate inputs, at T times the cost of one task.

If every task reads its own batch, a vector of losses costs T² times as much as one
task. The reason is that each of T backward passes runs through the batches of all
tasks. Here the user declares that the tasks are separate, and each task is
differentiated separately.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.balancer import task_vector
from mtljax.gradients.labels import resolve_labels
from mtljax.gradients.linearized import (
    Leaves,
    Options,
    Region,
    check_losses,
    make_region,
    marked_leaves,
)
from mtljax.types import Gramian, Losses, Params, Weights


class Separate:
    """Losses of tasks with separate inputs; the result of :func:`separate`.

    A call with the arguments of ``task_losses`` returns the losses, shape ``[T]``, or a
    dictionary of losses if it was built from a dictionary.
    """

    def __init__(self, losses: Any, in_axes: Any):
        """Stores the losses and their axes."""
        self.losses = losses
        self.in_axes = in_axes
        self.names = tuple(losses) if isinstance(losses, Mapping) else None

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Returns the losses of all tasks, with the auxiliary outputs if any."""
        if self.names is None:
            axes = self.axes(args)
            return jax.vmap(lambda *x: self.losses(*x, **kwargs), axes)(params, *args)
        each = {
            name: self.losses[name](params, *[arg[name] for arg in args], **kwargs)
            for name in self.names
        }
        if not isinstance(each[self.names[0]], tuple):
            return each
        losses = {name: loss for name, (loss, _) in each.items()}
        return losses, {name: aux for name, (_, aux) in each.items()}

    def axes(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Returns ``in_axes`` for the parameters and for every further argument."""
        axes = self.in_axes
        if isinstance(axes, int) or len(axes) != len(args) + 1:
            raise ValueError(
                f"separate: in_axes={axes!r} must have an entry for params and for "
                f"each of the {len(args)} further arguments."
            )
        return tuple(axes)

    def param_axes(self, params: Params) -> list[int | None]:
        """Returns the axis of the tasks in every leaf; None if the leaf is shared."""
        if self.names is not None:
            return [None] * len(jax.tree.leaves(params))
        axes = stack.per_leaf(self.in_axes[0], params, "separate: in_axes[0]")
        if any(axis not in (None, 0) for axis in axes):
            raise ValueError(
                f"separate: axes of parameters must be None or 0, not {axes}."
            )
        return axes


def ordered(task: Separate, names: Sequence[str] | None) -> Separate:
    """Returns the tasks in the order of the names of a balancer.

    Raises:
      ValueError: If the names differ.
    """
    if names is None or task.names is None or tuple(names) == task.names:
        return task
    if set(names) != set(task.names):
        raise ValueError(
            f"the tasks are {list(names)}, but separate was given losses for "
            f"{list(task.names)}. Use the names of the balancer."
        )
    return Separate({name: task.losses[name] for name in names}, task.in_axes)


def separate(
    loss: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    in_axes: Any = (None, 0),
) -> Separate:
    """Declares tasks whose losses read separate inputs.

    The gradients of all tasks then cost T times as much as those of one task. A
    ``jax.vmap`` over the tasks in ``task_losses`` gives the same numbers at T² times
    the cost.

    Args:
      loss: A function ``loss(params, *args) -> scalar`` for all tasks, whose arguments
        are stacked along a leading axis of length T. For inputs of different shapes,
        pass a dictionary of such functions, one per task. Every positional argument is
        then a dictionary with the same names, and keyword arguments are passed to every
        loss unchanged. With ``has_aux=True`` a loss returns ``(scalar, aux)``.
      in_axes: Axes for a single function, as in ``jax.vmap``: one entry for ``params``
        and one for every argument. A leaf of the parameters with axis 0 contains one
        slice per task (stacked heads). It is labelled ``"own"`` automatically, and its
        gradient has shape ``[T, ...]``.

    Returns:
      A ``Separate``, which all functions of mtljax accept as ``task_losses``. A call
      returns the losses, shape ``[T]``, or a dictionary of losses if ``loss`` is one.

    Raises:
      ValueError: If the dictionary of losses is empty.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> task_losses = mtljax.separate(lambda w, x: (w @ x) ** 2)
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> losses, grads = mtljax.value_and_task_grads(task_losses)(jnp.ones(2), x)
      >>> grads.tolist()
      [[2.0, 0.0], [0.0, 8.0]]
    """
    if isinstance(loss, Mapping):
        if not loss:
            raise ValueError("separate: the dict of losses is empty.")
        loss = dict(loss)
    return Separate(loss, in_axes)


class SeparateRows(NamedTuple):
    """Gradients of separate tasks, each from a pass through its own inputs."""

    leaves: Leaves
    region: Region
    aux: Any
    local: list[Any]  # [T, ...], this device's part of the gradients of shared leaves
    local_own: list[Any]  # of own leaves, stacked over tasks
    stacked_own: list[bool]  # whether the own leaf itself has an axis of tasks
    options: Options

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.region.losses

    def stacked(self) -> list[Any]:
        """Returns the T gradients of the shared leaves."""
        rows = self.leaves.summed(self.local, self.region.axes)
        return self.leaves.constrained(rows, self.options.shardings)

    def own(self, weights: Weights) -> list[Any]:
        """Returns the weighted sum of the gradients of the own leaves."""
        found = []
        for g, whole in zip(self.local_own, self.stacked_own, strict=True):
            if whole:
                wide = jnp.expand_dims(weights.astype(g.dtype), range(1, g.ndim))
                found.append(g * wide)
            else:
                found.append(stack.combine(g, weights))
        return self.leaves.summed(found, self.region.axes, "own")

    def measured(self) -> tuple[Gramian, list[Any]]:
        """Returns the Gramian and the stacked gradients."""
        rows = self.stacked()
        return self.leaves.gramian(rows, self.region), rows

    def gradients(
        self, weights: Weights, own: Weights, rows: list[Any] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves."""
        rows = self.stacked() if rows is None else rows
        return stack.combine(rows, weights), self.own(own)


def linearize_separate(
    task: Separate,
    params: Params,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    *,
    mask: Any,
    name: str,
) -> SeparateRows:
    """Runs one forward and one backward pass per task."""
    leaves, axes = _labelled(task, params, options)
    values = placement.cast(leaves.values, options.axes)
    trained = [i for i, mark in enumerate(leaves.marks) if mark != "frozen"]

    def loss(parts, fixed, function, *args):
        full = list(fixed)
        for i, part in zip(trained, parts, strict=True):
            full[i] = part
        tree = jax.tree.unflatten(leaves.treedef, full)
        out = function(tree, *args, **kwargs)
        value, aux = out if options.has_aux else (out, None)
        return value, aux

    parts = [values[i] for i in trained]
    graded = jax.value_and_grad(loss, has_aux=True)
    if task.names is None:
        in_axes = [axes[i] for i in trained], axes, *task.axes(args)[1:]
        (local, aux), rows = jax.vmap(
            lambda parts, fixed, *args: graded(parts, fixed, task.losses, *args),
            in_axes,
        )(parts, values, *args)
    else:
        absent = _known_absent(task.names, mask)
        local, aux, rows = [], {}, []
        for key in task.names:
            if key in absent:
                rows.append([jnp.zeros_like(part) for part in parts])
                local.append(None)
                continue
            mine = [arg[key] for arg in args]
            (value, aux[key]), row = graded(parts, values, task.losses[key], *mine)
            local.append(value)
            rows.append(row)
        some = next(x for x in local if x is not None)
        local = jnp.stack([jnp.zeros_like(some) if x is None else x for x in local])
        rows = [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]
    region = make_region(
        check_losses(local), task_vector(mask, task.names), options, name
    )
    rows = _seeded(rows, region)
    of = {"shared": [], "own": []}
    for i, row in zip(trained, rows, strict=True):
        of[leaves.marks[i]].append(row)
    whole = [axes[i] is not None for i in leaves.numbers("own")]
    aux = aux if options.has_aux else None
    return SeparateRows(leaves, region, aux, of["shared"], of["own"], whole, options)


def _seeded(rows: list[Any], region: Region) -> list[Any]:
    """Sets gradients of absent tasks to zero, and multiplies others by the seeds."""
    if region.local_mask is not None:
        rows = stack.select(rows, region.local_mask)
    if region.seeds is None:
        return rows
    return [
        row * jnp.expand_dims(region.seeds.astype(row.dtype), range(1, row.ndim))
        for row in rows
    ]


def _labelled(
    task: Separate, params: Params, options: Options
) -> tuple[Leaves, list[int | None]]:
    """Returns the leaves and the axis of the tasks in each; one with an axis is own."""
    axes = task.param_axes(params)
    implied = ["own" if axis == 0 else "shared" for axis in axes]
    if options.labels is None:
        return marked_leaves(params, implied, "own" in implied), axes
    marks = resolve_labels(options.labels, params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, _), mark, axis in zip(paths, marks, axes, strict=True):
        if axis == 0 and mark == "shared":
            raise ValueError(
                f"separate: parameter {stack.path_name(path)!r} has a slice per task "
                "by in_axes, but labels mark it as 'shared'. Label it 'own'."
            )
    return marked_leaves(params, marks, True), axes


def with_labels(task: Separate, params: Params, options: Options) -> Options:
    """Returns the options with the labels that ``in_axes`` implies."""
    leaves, _ = _labelled(task, params, options)
    if not leaves.labelled:
        return options
    return options._replace(labels=jax.tree.unflatten(leaves.treedef, leaves.marks))


def _known_absent(names: Sequence[str], mask: Any) -> set[str]:
    """Returns tasks that Python booleans mark as absent; they are not traced."""
    if isinstance(mask, Mapping):
        flags = dict(mask)
    elif isinstance(mask, list | tuple):
        flags = dict(zip(names, mask, strict=True))
    else:
        return set()
    absent = {name for name, flag in flags.items() if flag is False}
    return absent if len(absent) < len(names) else set()
