"""Per-task gradients: one vector-Jacobian product per task, four ways to run them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from mtljax.balancer import check_choice
from mtljax.gradients._engine._passes import Body, Passes, batched, few
from mtljax.gradients._engine._sweep import sweep
from mtljax.gradients._labels import resolve_labels
from mtljax.types import Grads, Losses, Mask, Params

Strategy: TypeAlias = Literal["auto", "unrolled", "vmap", "map", "chunked"]


class Pullback(NamedTuple):
    """The forward pass, and what maps a cotangent ``[T]`` to gradients."""

    losses: Losses
    aux: Any
    # Gradients of the shared parameters, in a tree that holds MaskedNode for own ones.
    shared: Callable[[Losses], Any]
    own: Callable[[Losses], Any] | None  # those of own ones; None without labels
    merge: Callable[[Any, Any], Any]  # (shared, own) -> a tree like the parameters
    body: Body  # what a backward pass consists of


def check_losses(losses: Any) -> Losses:
    """Raises unless ``task_losses`` returned a float vector."""
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
        raise ValueError("task_losses returned no loss at all (a vector of length 0).")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"task_losses must return floating-point losses, not {losses.dtype}."
        )
    return losses


def _split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        if isinstance(out, tuple):
            raise ValueError(
                "task_losses returned a tuple; pass has_aux=True if it is "
                "(losses, aux), or stack the losses into one vector."
            )
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError("has_aux=True: task_losses must return a pair (losses, aux).")
    return out


def checked_losses(out: Any, has_aux: bool) -> tuple[Losses, Any]:
    """The losses and the auxiliary output (None without) of ``task_losses``."""
    losses, aux = _split_aux(out, has_aux)
    return check_losses(losses), aux


def linearize(
    function: Callable[[Params], Any], params: Params, *, has_aux: bool, labels: Any
) -> Pullback:
    """One forward pass of ``function``, ready for any number of backward passes."""

    def checked(p):
        return checked_losses(function(p), has_aux)

    if labels is None:
        losses, vjp, aux = jax.vjp(checked, params, has_aux=True)
        pull = sweep(vjp, losses)
        return Pullback(
            losses, aux, lambda c: pull(c)[0], None, lambda g, _: g, pull.body
        )

    flat = resolve_labels(labels, params)
    leaves, treedef = jax.tree.flatten(params)

    def split(label):
        return [x for x, mark in zip(leaves, flat, strict=True) if mark == label]

    def merge(shared, own):
        sources = {"shared": iter(jax.tree.leaves(shared)), "own": iter(own)}
        return jax.tree.unflatten(treedef, [next(sources[label]) for label in flat])

    absent = [optax.MaskedNode()] * flat.count("own")

    losses, vjp, aux = jax.vjp(
        lambda s, o: checked(merge(s, o)),
        split("shared"),
        split("own"),
        has_aux=True,
    )
    pull = sweep(vjp, losses)
    return Pullback(
        losses,
        aux,
        lambda c: merge(pull(c, lambda results: results[0]), absent),
        lambda c: pull(c, lambda results: results[1]),
        merge,
        pull.body,
    )


def pick(asked: Passes, num_tasks: int, body: Body) -> Passes:
    """Resolves ``"auto"`` from the backend, T and what a pass consists of."""
    check_choice("value_and_task_grads", "strategy", asked.strategy, Strategy)
    if asked.strategy != "auto":
        return asked
    if few(num_tasks, body):
        return Passes("unrolled", 1)
    return batched(num_tasks, body)


def task_rows(pull: Pullback, asked: Passes) -> Grads:
    """Stacked gradients of the shared parameters: a pass for every unit cotangent."""
    num_tasks = pull.losses.shape[0]
    basis = jnp.eye(num_tasks, dtype=pull.losses.dtype)
    return map_tasks(pull.shared, basis, pick(asked, num_tasks, pull.body))


def map_tasks(
    function: Callable[[Any], Any],
    rows: Any,
    passes: Passes,
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
) -> Any:
    """``function`` of every row of a stacked tree, the results stacked.

    Tasks lie along ``in_axes`` and ``out_axes``: 0, or a tree of axes.
    """
    strategy, chunk_size, together = passes
    if strategy == "vmap":
        return jax.vmap(function, (in_axes,), out_axes)(rows)
    if isinstance(in_axes, int):
        in_axes = jax.tree.map(lambda _: in_axes, rows)
    if strategy in ("map", "chunked"):
        if strategy == "chunked" and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}.")
        rows = jax.tree.map(lambda x, axis: jnp.moveaxis(x, axis, 0), rows, in_axes)
        num_tasks = jax.tree.leaves(rows)[0].shape[0]
        if strategy == "map":
            stacked = jax.lax.scan(
                lambda _, row: (None, function(row)), None, rows, unroll=together
            )[1]
        else:
            size = min(chunk_size, num_tasks)
            stacked = jax.lax.map(function, rows, batch_size=size)
        if isinstance(out_axes, int):
            out_axes = jax.tree.map(lambda _: out_axes, stacked)
        return jax.tree.map(lambda x, axis: jnp.moveaxis(x, 0, axis), stacked, out_axes)
    leaf, axis = jax.tree.leaves(rows)[0], jax.tree.leaves(in_axes)[0]
    each = [
        function(
            jax.tree.map(
                lambda x, axis, task=task: jax.lax.index_in_dim(x, task, axis, False),
                rows,
                in_axes,
            )
        )
        for task in range(leaf.shape[axis])
    ]
    if isinstance(out_axes, int):
        out_axes = jax.tree.map(lambda _: out_axes, each[0])
    return jax.tree.map(lambda axis, *row: jnp.stack(row, axis), out_axes, *each)


def own_cotangent(losses: Losses, mask: Mask | None) -> Losses:
    """Ones for present tasks: every own parameter follows its own loss."""
    ones = jnp.ones_like(losses)
    return ones if mask is None else jnp.where(mask, ones, 0)


def value_and_task_grads(
    task_losses: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    labels: Any = None,
    strategy: Strategy = "auto",
    chunk_size: int = 4,
) -> Callable[..., Any]:
    """Losses and the gradient of each, stacked along a new leading axis.

    ``jax.value_and_grad`` for a function that returns T losses: one forward pass
    and T backward passes from the same residuals.

    Args:
      task_losses: ``task_losses(params, *args, **kwargs) -> losses[T]`` (or
        ``(losses[T], aux)``). The other arguments are free: one batch for all tasks,
        or a dict with a batch per task, of any shapes.
      argnums: Which positional argument(s) to differentiate.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      labels: Marks parameters ``"shared"`` or ``"own"``: a tree of strings, a prefix
        of one, or a function of the path (see :func:`label_params`). Own leaves are
        then not stacked: they get the gradient of the sum of the losses, which is
        that of their own task's loss.
      strategy: ``"unrolled"`` (T separate passes), ``"vmap"`` (one batched pass),
        ``"map"`` (a loop, least memory beside the result), ``"chunked"`` (a loop of
        batched passes of ``chunk_size`` tasks) or ``"auto"``: unrolled on CPU up to
        16 tasks (fewer for long programs), else vmap, or a loop where the values of
        all tasks would be large and for convolutions on CPU.
        All give the same numbers up to rounding.
      chunk_size: Tasks in a chunk.

    Returns:
      A function of the same arguments that returns ``(losses[T], grads)``, or
      ``((losses[T], aux), grads)``; every (shared) leaf of ``grads`` has shape
      ``[T, *leaf]``. A task whose loss has no finite derivative spoils the rows of
      the others too (0 · NaN is NaN): write ``where``-safe losses for absent tasks.

    Raises:
      ValueError: If the losses are not a vector, a label is unknown or marks nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> def task_losses(params, x):
      ...     h = params["w"] * x
      ...     return jnp.stack([jnp.mean(h**2), jnp.mean((h - 1) ** 2)])
      >>> x = jnp.array([1.0, 3.0])
      >>> losses, grads = value_and_task_grads(task_losses)({"w": jnp.array(1.0)}, x)
      >>> losses.tolist(), grads["w"].tolist()
      ([5.0, 2.0], [10.0, 6.0])
    """
    if labels is not None and not isinstance(argnums, int):
        raise ValueError("labels go with a single differentiated argument (argnums).")

    def function(*args, **kwargs):
        indices = (argnums,) if isinstance(argnums, int) else argnums

        def at(params):
            full = list(args)
            for index, param in zip(indices, params, strict=True):
                full[index] = param
            return task_losses(*full, **kwargs)

        if isinstance(argnums, int):
            pull = linearize(
                lambda p: at((p,)), args[argnums], has_aux=has_aux, labels=labels
            )
        else:
            pull = linearize(
                at, tuple(args[i] for i in argnums), has_aux=has_aux, labels=None
            )
        rows = task_rows(pull, Passes(strategy, chunk_size))
        own = pull.own and pull.own(own_cotangent(pull.losses, None))
        grads = pull.merge(rows, own)
        return ((pull.losses, pull.aux) if has_aux else pull.losses), grads

    return function
