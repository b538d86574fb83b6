"""Per-task gradients: one backward pass per task, with several strategies."""

from collections.abc import Callable, Sequence
from typing import Any

from mtljax.gradients.linearized import (
    AxisName,
    Strategy,
    VectorLosses,
    linearize,
    make_options,
    own_weights,
)
from mtljax.gradients.micro import accumulate
from mtljax.gradients.separate import Separate, linearize_separate, ordered
from mtljax.placement import Backward


def value_and_task_grads(
    task_losses: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    labels: Any = None,
    strategy: Strategy | int = "auto",
    micro_batches: int | None = None,
    axis_name: AxisName = None,
    grad_shardings: Any = None,
    backward: Backward = "auto",
    names: Sequence[str] | None = None,
) -> Callable[..., Any]:
    """Returns a function that computes the losses and their stacked gradients.

    The function generalises ``jax.value_and_grad`` to T losses. It runs one forward
    pass, and T backward passes from the same residuals.

    Args:
      task_losses: A function ``task_losses(params, *args, **kwargs)`` that returns the
        losses, an array of shape ``[T]`` or a dictionary ``{name: scalar}``. With
        ``has_aux=True`` it returns ``(losses, aux)``. The other arguments may be one
        batch for all tasks, or a dictionary with one batch of any shape per task. Use
        :func:`mtljax.separate` for tasks with separate inputs.
      argnums: Index or indices of the positional arguments to differentiate.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``.
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``. Pass a tree of
        strings, a prefix of one, or a function of the path (see :func:`label_params`).
        Own leaves are not stacked. Their gradient is that of the sum of the losses,
        which equals that of the loss of their own task. Frozen leaves have a gradient
        of zeros with their own shape and cost no backward pass.
      strategy: How the T backward passes are run. All strategies give the same numbers
        up to rounding.

        - ``"unrolled"`` runs T separate passes.
        - ``"vmap"`` runs one batched pass.
        - ``"map"`` runs a loop, with the least memory in addition to the result.
        - An integer k runs a loop of batched passes of k tasks. ``"chunked"`` is 4.
        - ``"auto"`` unrolls up to 16 passes on CPU, or fewer for long programs.
          Otherwise it uses vmap, or a loop if the values of all tasks would be large
          and for convolutions on CPU.
      micro_batches: M. The leading axes of all positional arguments after the first are
        split into M micro-batches. A loop accumulates losses and gradients. The result
        equals that of the whole batch if every loss is a mean over the examples. The
        auxiliary output is stacked, ``[M, ...]``. The memory is that of one micro-batch
        and T gradients.
      axis_name: The mapped axis of ``jax.pmap`` or ``jax.shard_map``, if
        ``task_losses`` returns the losses of this device's part of the batch. Losses
        and gradients are then the means over the axis. Without it, ``jax.shard_map``
        returns sums over the devices, as ``jax.jacrev`` does.
      grad_shardings: Tree of ``NamedSharding`` with the structure of the parameters,
        for a mesh with Auto axes. It sets the sharding of the gradient of every leaf.
      backward: ``"jax"`` runs the backward passes of ``jax.vjp`` unchanged.
        ``"rewritten"`` rewrites them for XLA:CPU. ``"auto"`` rewrites them if the
        program runs on one CPU device.
      names: Order of the tasks in the stacked gradients if ``task_losses`` returns a
        dictionary, such as ``balancer.names``. By default it is the order of the
        dictionary. In an ``optax.chain`` with a balancer that has names, the two orders
        must be the same, because stacked gradients have no names. With ``names``, the
        losses are a dictionary.

    Returns:
      A function of the same arguments and of ``mask=``. It returns ``(losses, grads)``,
      or ``((losses, aux), grads)`` with ``has_aux=True``. Every shared leaf of
      ``grads`` has shape ``[T, *leaf]``. The boolean array ``mask`` of shape ``[T]``,
      or a dictionary with the names of the tasks, marks the present tasks. Stacked and
      own gradients of absent tasks are zero. The loss of an absent task may be NaN, but
      its derivative must be finite. Otherwise the gradients of the other tasks are not
      finite either, because ``0 * NaN`` is NaN in the backward pass.

    Raises:
      ValueError: If the losses are not a vector, if the names of the losses are not
        ``names``, if a label is unknown or matches no parameter, or if a parameter that
        is not frozen is not a floating-point array.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> def task_losses(params, x):
      ...     h = params["w"] * x
      ...     return jnp.stack([jnp.mean(h**2), jnp.mean((h - 1) ** 2)])
      >>> x = jnp.array([1.0, 3.0])
      >>> grad_fn = mtljax.value_and_task_grads(task_losses)
      >>> losses, grads = grad_fn({"w": jnp.array(1.0)}, x)
      >>> losses.tolist(), grads["w"].tolist()
      ([5.0, 2.0], [10.0, 6.0])
    """
    name = "value_and_task_grads"
    if labels is not None and not isinstance(argnums, int):
        raise ValueError(
            "labels go with a single differentiated argument. Pass an integer argnums, "
            f"not {argnums!r}."
        )
    options = make_options(
        name,
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
        grad_shardings=grad_shardings,
    )
    if not isinstance(argnums, int) and (
        micro_batches is not None or isinstance(task_losses, Separate)
    ):
        raise ValueError(
            f"{name}: micro_batches and mtljax.separate go with a single "
            "differentiated argument. Pass an integer argnums."
        )
    if isinstance(task_losses, Separate):
        task_losses = ordered(task_losses, names)
    indices = (argnums,) if isinstance(argnums, int) else argnums

    def function(*args, mask=None, **kwargs):
        params = tuple(args[i] for i in indices)
        others = [arg for i, arg in enumerate(args) if i not in indices]

        def at(params, *others, **kwargs):
            params = (params,) if isinstance(argnums, int) else params
            given, rest = iter(params), iter(others)
            chosen = dict(zip(indices, given, strict=True))
            full = [chosen[i] if i in chosen else next(rest) for i in range(len(args))]
            return task_losses(*full, **kwargs)

        params = params[0] if isinstance(argnums, int) else params
        call = VectorLosses(at, others, kwargs, names)
        shared_options = {"mask": mask, "name": name}
        if micro_batches is not None:
            found = accumulate(
                task_losses, call, params, options, micro_batches, **shared_options
            )
        elif isinstance(task_losses, Separate):
            call.names = task_losses.names
            found = linearize_separate(
                task_losses, params, others, kwargs, options, **shared_options
            )
        else:
            found = linearize(call, params, options, **shared_options)
        rows = found.stacked()
        own = found.own(own_weights(found.losses, found.region.mask))
        grads = found.leaves.gradient(rows, own)
        losses = call.named(found.losses)
        return ((losses, found.aux) if has_aux else losses), grads

    return function
