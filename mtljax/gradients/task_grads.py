"""Per-task gradients: one vector-Jacobian product per task, four ways to run them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.gradients.linearized import (
    AxisName,
    Linearized,
    Strategy,
    linearize,
    make_options,
    own_weights,
)
from mtljax.gradients.passes import Body, Passes, batched, few
from mtljax.placement import Backward


def pick(asked: Passes, num_tasks: int, body: Body) -> Passes:
    """Resolves ``"auto"`` from the backend, T and the size of a pass."""
    if asked.strategy != "auto":
        return asked
    if few(num_tasks, body):
        return Passes("unrolled", 1)
    return batched(num_tasks, body)


def local_rows(found: Linearized, passes: Passes | None = None) -> list[Any]:
    """This device's part of the T gradients of the shared leaves.

    A pass for every unit cotangent. Rows of absent tasks are zero.
    """
    num_tasks = found.losses.shape[0]
    # Loops and vmap need the type of the cotangents before the pullback sees them.
    region = found.region
    basis = jnp.eye(num_tasks, dtype=region.local.dtype)
    basis = placement.cast(region.seeded(basis), placement.varying(region.local))
    passes = pick(passes or found.options.passes, num_tasks, found.body)
    rows = map_tasks(lambda c: found.pull(c, lambda r: r[0]), basis, passes)
    mask = region.local_mask
    return rows if mask is None else stack.select(rows, mask)


def task_rows(found: Linearized, passes: Passes | None = None) -> list[Any]:
    """The T gradients of the shared leaves, stacked."""
    rows = found.summed(local_rows(found, passes))
    shardings = found.options.shardings
    if shardings is not None:
        wanted = jax.tree.leaves(shardings)
        wanted = [wanted[i] for i in found.leaves.numbers("shared")]
        rows = placement.constrain(rows, wanted, stacked=True)
    return rows


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


def value_and_task_grads(
    task_losses: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    labels: Any = None,
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
    grad_shardings: Any = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Computes the losses and the gradient of each, stacked along a new leading axis.

    ``jax.value_and_grad`` for a function that returns T losses: one forward pass
    and T backward passes from the same residuals.

    Args:
      task_losses: ``task_losses(params, *args, **kwargs) -> losses[T]`` (or
        ``(losses[T], aux)``). The other arguments are free: one batch for all tasks,
        or a dict with a batch per task, of any shapes.
      argnums: Which positional argument(s) to differentiate.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``: a tree of
        strings, a prefix of one, or a function of the path (see :func:`label_params`).
        Own leaves are not stacked: they get the gradient of the sum of the losses,
        which is that of their own task's loss. Frozen leaves get zeros of their own
        shape, and cost no backward pass.
      strategy: ``"unrolled"`` (T separate passes), ``"vmap"`` (one batched pass),
        ``"map"`` (a loop, least memory in addition to the result), an integer k (a loop
        of batched passes of k tasks; ``"chunked"`` is 4) or ``"auto"``: unrolled on CPU
        up to 16 tasks (fewer for long programs), else vmap, or a loop if the values of
        all tasks would be large and for convolutions on CPU.
        All give the same numbers up to rounding.
      axis_name: The mapped axis of ``jax.pmap`` or ``jax.shard_map``, if
        ``task_losses`` returns the losses of this device's part of the batch. Losses
        and gradients are then the means over the axis. Without it, ``jax.shard_map``
        gives sums over the devices, as ``jax.jacrev`` does.
      grad_shardings: Tree of ``NamedSharding`` like the parameters, for a mesh with
        Auto axes: the sharding of the gradient of every leaf.
      backward: ``"jax"`` runs the backward passes of ``jax.vjp`` unchanged,
        ``"rewritten"`` rewrites them for XLA:CPU, ``"auto"`` rewrites them if the
        program runs on one CPU device.

    Returns:
      A function of the same arguments, and of ``mask=`` ``[T]`` (the tasks that are
      present), that returns ``(losses[T], grads)``, or ``((losses[T], aux), grads)``;
      every shared leaf of ``grads`` has shape ``[T, *leaf]``. Rows and own gradients of
      absent tasks are zero. A task whose loss has no finite derivative makes the rows of
      the others non-finite too (0 · NaN is NaN): write ``where``-safe losses for absent
      tasks.

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
    name = "value_and_task_grads"
    if labels is not None and not isinstance(argnums, int):
        raise ValueError("labels go with a single differentiated argument (argnums).")
    options = make_options(
        name,
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
        grad_shardings=grad_shardings,
    )
    indices = (argnums,) if isinstance(argnums, int) else argnums

    def function(*args, mask=None, **kwargs):
        def at(params):
            full = list(args)
            params = (params,) if isinstance(argnums, int) else params
            for index, param in zip(indices, params, strict=True):
                full[index] = param
            return task_losses(*full, **kwargs)

        params = tuple(args[i] for i in indices)
        params = params[0] if isinstance(argnums, int) else params
        found = linearize(at, params, options, mask=mask, name=name)
        rows = task_rows(found)
        own = found.own(own_weights(found.losses, found.region.mask))
        grads = found.leaves.gradient(rows, own)
        return ((found.losses, found.aux) if has_aux else found.losses), grads

    return function
