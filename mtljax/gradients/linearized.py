"""The forward pass, and the gradients of any weighted sum of its losses.

This module implements three aspects for all public functions:

- the labels of the leaves (shared, own or frozen),
- the names of the tasks,
- the mapped region in which a device computes the losses of its part of the batch.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Scalar

from mtljax import placement, stack
from mtljax.balancer import as_mask, check_choice, clone_keys, task_vector
from mtljax.gradients._pullback import pullback
from mtljax.gradients.labels import check_trained, resolve_labels
from mtljax.gradients.passes import Body, Passes, map_tasks, pick
from mtljax.placement import Axes, Backward
from mtljax.types import Gramian, Losses, Mask, Params, Weights

Strategy: TypeAlias = Literal["auto", "unrolled", "vmap", "map", "chunked"]
Exchange: TypeAlias = Literal["all", "scatter"]


@dataclasses.dataclass(frozen=True)
class Mapped:
    """The mapped axis of ``jax.pmap`` or ``jax.shard_map``, for ``axis_name=``.

    Attributes:
      axis_name: Name of the axis, or several names.
      exchange: How stacked gradients are averaged over the devices. With ``"all"``
        every device has all T gradients. With ``"scatter"`` every device has the T
        gradients of its part of the parameters. Afterwards only the T x T Gramian and
        the update are exchanged, which sends (T + 1) / 2T of the bytes. ``"scatter"``
        supports methods that read the losses or the Gramian.
    """

    axis_name: str | tuple[str, ...]
    exchange: Exchange = "all"

    def __post_init__(self):
        check_choice("Mapped", "exchange", self.exchange, Exchange)

    @property
    def axes(self) -> Axes:
        """Names of the mapped axes."""
        names = self.axis_name
        return (names,) if isinstance(names, str) else tuple(names)


AxisName: TypeAlias = str | tuple[str, ...] | Mapped | None


class Options(NamedTuple):
    """Options of the gradients that all public functions share."""

    has_aux: bool = False
    labels: Any = None
    passes: Passes = Passes("auto", 4)
    backward: Backward = "auto"
    axes: Axes = ()
    exchange: Exchange = "all"
    shardings: Any = None


def make_options(
    name: str,
    *,
    has_aux: bool = False,
    labels: Any = None,
    strategy: Strategy | int = "auto",
    backward: Backward = "auto",
    axis_name: AxisName = None,
    grad_shardings: Any = None,
) -> Options:
    """Validates the options; ``name`` is the public function in error messages."""
    if isinstance(strategy, int):
        if strategy < 1:
            raise ValueError(
                f"{name}: strategy={strategy} is the number of tasks in a chunk; it "
                "must be at least 1."
            )
        passes = Passes("chunked", strategy)
    else:
        check_choice(name, "strategy", strategy, Strategy)
        passes = Passes(strategy, 4)
    check_choice(name, "backward", backward, Backward)
    if axis_name is not None and not isinstance(axis_name, Mapped):
        axis_name = Mapped(axis_name)
    axes, exchange = (axis_name.axes, axis_name.exchange) if axis_name else ((), "all")
    return Options(has_aux, labels, passes, backward, axes, exchange, grad_shardings)


def check_losses(losses: Any) -> Losses:
    """Raises an error unless ``task_losses`` returned a floating-point vector.

    Args:
      losses: The result of ``task_losses`` without the auxiliary output.

    Returns:
      The losses, shape ``[T]``.

    Raises:
      ValueError: If the losses are not a non-empty vector of floating-point numbers.

    Examples:
      >>> check_losses(jnp.array([1.0, 2.0])).shape
      (2,)
    """
    if not hasattr(losses, "ndim") or losses.ndim != 1:
        found = (
            f"an array of shape {losses.shape}"
            if hasattr(losses, "shape")
            else f"a {type(losses).__name__}"
        )
        raise ValueError(
            f"task_losses must return a vector of T scalar losses, not {found}; "
            "reduce every loss to a scalar and return jnp.stack([loss_1, ..., loss_T])."
        )
    if losses.shape[0] == 0:
        raise ValueError(
            "task_losses returned no loss at all (a vector of length 0). Return at "
            "least one loss."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"task_losses must return floating-point losses, not {losses.dtype}."
        )
    return losses


def checked_losses(out: Any, has_aux: bool) -> tuple[Losses, Any]:
    """Returns the losses and the auxiliary output (or None) of ``task_losses``."""
    aux = None
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                "has_aux=True: task_losses must return a pair (losses, aux)."
            )
        out, aux = out
    elif isinstance(out, tuple):
        raise ValueError(
            "task_losses returned a tuple; pass has_aux=True if it is "
            "(losses, aux), or stack the losses into one vector."
        )
    return check_losses(out), aux


class Leaves(NamedTuple):
    """The parameters as a list, with the label of every leaf."""

    values: list[Any]
    treedef: Any
    marks: list[str]
    labelled: bool
    paths: list[str]

    def some(self, only: Sequence[int]) -> "Leaves":
        """Returns some of the shared leaves, without a tree."""
        chosen = [self.numbers("shared")[i] for i in only]
        return self._replace(
            values=[self.values[i] for i in chosen],
            marks=["shared"] * len(chosen),
            paths=[self.paths[i] for i in chosen],
        )

    def check_balanced(self, *labels: str) -> None:
        """Raises an error if leaves with one of the labels have no inner product.

        Raises:
          ValueError: If no leaf has one of the labels, or if such a leaf is complex or
            has less than 16 bits.
        """
        if not set(labels) & set(self.marks):
            raise ValueError("no parameter is shared, so there is nothing to balance.")
        for path, mark, leaf in zip(self.paths, self.marks, self.values, strict=True):
            why = stack.why_unbalanced(leaf) if mark in labels else None
            if why is not None:
                hint = ""
                if jnp.issubdtype(stack.dtype_of(leaf), jnp.complexfloating):
                    hint = " Store its real and its imaginary part as two leaves."
                raise ValueError(f"parameter {path!r} {why}{hint}")

    def numbers(self, label: str) -> list[int]:
        """Returns the numbers of the leaves with a label."""
        return [i for i, mark in enumerate(self.marks) if mark == label]

    def of(self, label: str) -> list[Any]:
        """Returns the values of the leaves with a label."""
        return [self.values[i] for i in self.numbers(label)]

    def tree(self, shared: Sequence[Any], own: Sequence[Any], frozen: Sequence[Any]):
        """Returns a tree with the structure of the parameters."""
        sources = {"shared": iter(shared), "own": iter(own), "frozen": iter(frozen)}
        leaves = [next(sources[mark]) for mark in self.marks]
        return jax.tree.unflatten(self.treedef, leaves)

    def shared_tree(self, shared: Sequence[Any]) -> Any:
        """Returns the tree with MaskedNode for leaves that are not shared."""
        count = len(self.marks) - len(self.numbers("shared"))
        rest = [optax.MaskedNode()] * count
        return self.tree(shared, rest, rest)

    def gramian(self, rows: Sequence[Any], region: "Region") -> Gramian:
        """Returns inner products of stacked gradients, also of split parameters."""
        self.check_balanced("shared")
        parts: dict[Axes, list[Any]] = {}
        for row, leaf in zip(rows, self.of("shared"), strict=True):
            sums = region.sums(leaf)
            split = tuple(axis for axis in region.axes if axis not in sums)
            parts.setdefault(split, []).append(row)
        found = [placement.total(stack.gramian(r), split) for split, r in parts.items()]
        return functools.reduce(operator.add, found)

    def summed(
        self, gradients: Sequence[Any], axes: Axes, label: str = "shared"
    ) -> list[Any]:
        """Sums this device's parts of gradients over the mapped axes."""
        return [
            placement.total(g, unsplit(leaf, axes))
            for g, leaf in zip(gradients, self.of(label), strict=True)
        ]

    def constrained(self, rows: list[Any], shardings: Any) -> list[Any]:
        """Applies the shardings that the user passed to stacked gradients."""
        if shardings is None:
            return rows
        wanted = jax.tree.leaves(shardings)
        wanted = [wanted[i] for i in self.numbers("shared")]
        return placement.constrain(rows, wanted, stacked=True)

    def gradient(self, shared: Sequence[Any], own: Sequence[Any]) -> Any:
        """Returns the gradient as a tree; the gradient of a frozen leaf is zero."""
        return self.tree(shared, own, [jnp.zeros_like(x) for x in self.of("frozen")])


def split_leaves(params: Params, labels: Any) -> Leaves:
    """Sorts the leaves by their labels; without labels all leaves are shared."""
    if labels is None:
        marks = ["shared"] * len(jax.tree.leaves(params))
    else:
        marks = resolve_labels(labels, params)
    return marked_leaves(params, marks, labels is not None)


def marked_leaves(params: Params, marks: list[str], labelled: bool) -> Leaves:
    """Returns the leaves with given labels.

    Raises:
      ValueError: If a leaf that is not frozen has no gradient.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [stack.path_name(path) for path, _ in flat]
    values = [leaf for _, leaf in flat]
    check_trained(paths, marks, values)
    return Leaves(values, treedef, marks, labelled, paths)


def unsplit(leaf: Any, axes: Axes) -> Axes:
    """Returns the axes over which a parameter is not split.

    Over the other axes, the transpose of the gathering has already summed the gradient.
    """
    split = placement.varying(leaf)
    return tuple(axis for axis in axes if axis not in split)


class Region(NamedTuple):
    """The mapped region in which a device computes its own losses.

    The loss of a task is the mean over the devices on which the task is present. Its
    gradient is the sum over the devices of the gradients of ``seeds * local losses``.
    """

    axes: Axes  # empty outside of a mapped region, or without axis_name
    local: Losses  # this device's losses
    seeds: Losses | None  # [T], cotangents of the local losses; None for ones
    losses: Losses  # means over the devices
    mask: Mask | None  # tasks that are present on at least one device
    local_mask: Mask | None  # tasks that are present on this device

    def seeded(self, cotangent: Array) -> Array:
        """Returns cotangents of the local losses, for one or a stack of cotangents."""
        if self.seeds is None:
            return cotangent
        dtype = stack.promoted(cotangent.dtype, self.seeds.dtype)
        seeds = jnp.broadcast_to(self.seeds, cotangent.shape).astype(dtype)
        return cotangent.astype(dtype) * seeds

    def sums(self, leaf: Any) -> Axes:
        """Returns the axes over which the gradient of a parameter must be summed."""
        return unsplit(leaf, self.axes)


class VectorLosses:
    """A call of ``task_losses`` as a function of the parameters.

    A dictionary of losses is converted to a vector, in the order of ``names`` or, if
    they are None, in its own order. ``names`` is known after the first call.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        names: Sequence[str] | None = None,
        *,
        repeats: bool = False,
    ):
        """Stores the function and the arguments of the call."""
        self.function, self.args, self.kwargs = function, args, kwargs
        self.names = None if names is None else tuple(names)
        self.repeats = repeats

    def again(self) -> "VectorLosses":
        """Returns a function that samples the same random numbers as the first call."""
        return VectorLosses(
            self.function, self.args, self.kwargs, self.names, repeats=True
        )

    def __call__(self, params: Params) -> Any:
        """Returns the losses as a vector, with the auxiliary output if there is one."""
        args, kwargs = self.args, self.kwargs
        if self.repeats:
            args, kwargs = clone_keys((args, kwargs))
        out = self.function(params, *args, **kwargs)
        if isinstance(out, Mapping):
            return self._vector(out)
        if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Mapping):
            return self._vector(out[0]), out[1]
        return out

    def _vector(self, losses: Mapping[str, Any]) -> Losses:
        self.names = tuple(losses) if self.names is None else self.names
        for name, loss in losses.items():
            if jnp.shape(loss):
                raise ValueError(
                    f"the loss of task {name!r} has shape {jnp.shape(loss)}; it must "
                    "be a scalar."
                )
        return task_vector(losses, self.names)

    def named(self, losses: Losses) -> Any:
        """Returns the losses in the form that the user's function returns."""
        if self.names is None:
            return losses
        if len(self.names) != len(losses):
            raise ValueError(
                f"names has {len(self.names)} entries, but task_losses returned "
                f"{len(losses)} losses."
            )
        return dict(zip(self.names, losses, strict=True))


def present_tasks(mask: Any, num_tasks: int, options: Options, name: str) -> Mask:
    """Returns the tasks that are present on at least one device of the mapped axes."""
    mask = as_mask(name, num_tasks, mask)
    return placement.total(mask.astype(jnp.int32), options.axes) > 0


def make_region(local: Losses, mask: Any, options: Options, name: str) -> Region:
    """Averages the losses over the mapped axes.

    Raises:
      ValueError: If the losses are known to be equal on all devices of an axis.
    """
    mask = None if mask is None else as_mask(name, local.shape[0], mask)
    axes = options.axes
    if not axes:
        return Region((), local, None, local, mask, mask)
    for axis in axes:
        if placement.tracks(axis) and axis not in placement.varying(local):
            raise ValueError(
                f"{name}: the losses are already the same on every device of {axis!r}; "
                "leave out axis_name, or return the local losses."
            )
    if mask is None:
        count = placement.size(axes)
        seeds = jnp.full(local.shape, 1 / count, local.dtype)
        losses = placement.total(local * seeds, axes)
        return Region(axes, local, seeds, losses, None, None)
    count = placement.total(mask.astype(local.dtype), axes)
    present = count > 0
    seeds = jnp.where(mask, 1 / jnp.maximum(count, 1), 0).astype(local.dtype)
    # A task that is absent everywhere reports the mean over all devices.
    everywhere = local / placement.size(axes)
    masked = jnp.where(mask, local, 0) * seeds
    masked, everywhere = placement.total((masked, everywhere), axes)
    losses = jnp.where(present, masked, everywhere)
    return Region(axes, local, seeds, losses, present, mask)


class Linearized(NamedTuple):
    """The forward pass, from which any number of backward passes can be run."""

    leaves: Leaves
    region: Region
    aux: Any
    pull: Callable[..., Any]  # cotangents of the local losses -> (shared, own)
    options: Options
    only: tuple[int, ...] | None = (
        None  # numbers of the shared leaves that are measured
    )

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.region.losses

    @property
    def body(self) -> Body:
        """Description of a backward pass."""
        return self.pull.body  # pyright: ignore[reportFunctionMemberAccess]

    def local_rows(self, only: Sequence[int] | None = None) -> list[Any]:
        """Returns this device's part of the T gradients of shared leaves.

        If ``only`` is given, it selects some of the leaves. Each unit cotangent needs
        one pass. Gradients of absent tasks are zero.
        """

        def part(results):
            shared = results[0]
            return shared if only is None else [shared[i] for i in only]

        region, num_tasks = self.region, self.losses.shape[0]
        # Loops and vmap require the final type of the cotangents before the pass.
        basis = jnp.eye(num_tasks, dtype=region.local.dtype)
        basis = placement.cast(region.seeded(basis), placement.varying(region.local))
        passes = pick(self.options.passes, num_tasks, self.body)
        rows = map_tasks(lambda c: self.pull(c, part), basis, passes)
        mask = region.local_mask
        return rows if mask is None else stack.select(rows, mask)

    def stacked(self) -> list[Any]:
        """Returns the T gradients of the shared leaves."""
        rows = self.leaves.summed(self.local_rows(), self.region.axes)
        return self.leaves.constrained(rows, self.options.shardings)

    def local_gradients(self, weights: Weights, own: Weights) -> tuple[Any, Any]:
        """Returns this device's parts of both weighted gradients."""
        return self._weighted(weights, 0), self.local_own(own)

    def local_own(self, weights: Weights) -> list[Any]:
        """Returns this device's part of the weighted gradient of own leaves."""
        return self._weighted(weights, 1) if self.leaves.numbers("own") else []

    def shared(self, weights: Weights) -> list[Any]:
        """Returns ``Σ_t weights[t] g_t`` for the shared leaves."""
        return self.leaves.summed(self._weighted(weights, 0), self.region.axes)

    def own(self, weights: Weights) -> list[Any]:
        """Returns ``Σ_t weights[t] g_t`` for the own leaves."""
        return self.leaves.summed(self.local_own(weights), self.region.axes, "own")

    def measured(self) -> tuple[Gramian, list[Any] | None]:
        """Returns the Gramian, and the stacked gradients if ``only`` is None."""
        if self.only is None:
            rows = self.stacked()
            return self.leaves.gramian(rows, self.region), rows
        rows = self.local_rows(self.only)
        part = self.leaves.some(self.only)
        rows = part.summed(rows, self.region.axes)
        return part.gramian(rows, self.region), None

    def gradients(
        self, weights: Weights, own: Weights, rows: list[Any] | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves.

        They are computed from the rows if these are given, else by a backward pass.
        """
        if rows is None:
            return self.shared(weights), self.own(own)
        return stack.combine(rows, weights), self.own(own)

    def _weighted(self, weights: Losses, part: int) -> list[Any]:
        dtype = self.losses.dtype
        seeds, scale = in_range(self.region.seeded(weights), dtype)
        found = self.pull(seeds.astype(dtype), lambda results: results[part])
        return rescaled(found, scale)


def in_range(weights: Weights, dtype: Any) -> tuple[Weights, Scalar | None]:
    """Divides weights by their largest value if losses have half precision.

    They may exceed the range of float16.

    Returns:
      The pair ``(weights, scale)``. The scale is None for wider losses.
    """
    if jnp.finfo(dtype).bits >= 32:
        return weights, None
    wide = weights.astype(stack.wide_dtype(weights.dtype))
    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.maximum(jnp.abs(wide).max(), tiny)
    return wide / scale, scale


def rescaled(gradients: Sequence[Any], scale: Scalar | None) -> list[Any]:
    """Multiplies gradients for the weights of :func:`in_range` by the scale."""
    if scale is None:
        return list(gradients)

    def leaf(g):
        wide = stack.wide_dtype(g.dtype)
        return (g.astype(wide) * scale.astype(wide)).astype(g.dtype)

    return [leaf(g) for g in gradients]


def linearize(
    function: Callable[[Params], Any],
    params: Params,
    options: Options,
    *,
    mask: Any = None,
    name: str = "value_and_task_grads",
) -> Linearized:
    """Runs ``function``, which returns the losses (and an auxiliary output)."""
    leaves = split_leaves(params, options.labels)
    frozen = leaves.of("frozen")

    def of_parts(shared, own):
        out = function(leaves.tree(shared, own, frozen))
        return checked_losses(out, options.has_aux)

    # The parameters are marked as varying, so that JAX does not sum their gradients
    # before they are scaled.
    parts = placement.cast((leaves.of("shared"), leaves.of("own")), options.axes)
    local, pull, aux = pullback(
        of_parts, *parts, has_aux=True, backward=options.backward
    )
    mask = task_vector(mask, getattr(function, "names", None))
    region = make_region(local, mask, options, name)
    return Linearized(leaves, region, aux, pull, options)


def own_weights(losses: Losses, mask: Mask | None) -> Losses:
    """Returns ones for present tasks, because own parameters follow their own loss."""
    # ones_like would have the varying axes of the losses.
    ones = jnp.ones(losses.shape, losses.dtype)
    return ones if mask is None else jnp.where(mask, ones, 0)
