"""Missing labels, and parameters of absent tasks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtljax import stack
from mtljax.balancer import choose, task_vector


def masked_task_means(values: Any, present: Any) -> tuple[Any, Any]:
    """Averages the losses of the labelled examples, separately for each task.

    The gradients are finite, unlike those of ``jnp.nanmean``. A task without labelled
    examples has loss zero and is marked as absent.

    Args:
      values: Losses of the examples, shape ``[N, T]`` or ``[N, ..., T]``, or a dict of
        arrays by task. Values without a label are ignored, but their derivatives must
        be finite, because ``0 * NaN`` is NaN in a backward pass.
      present: Booleans of the same shape that mark the available labels, or a dict of
        such arrays.

    Returns:
      The losses and the mask, each of shape ``[T]`` or a dict by task. Pass the mask to
      the balancer.

    Raises:
      ValueError: If the shapes or the names of ``values`` and ``present`` differ.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> values = jnp.array([[1.0, 5.0], [3.0, jnp.nan]])
      >>> labelled = jnp.array([[True, False], [True, False]])
      >>> losses, mask = mtljax.masked_task_means(values, labelled)
      >>> losses.tolist(), mask.tolist()
      ([2.0, 0.0], [True, False])
    """

    def mean(values, present, axes):
        if jnp.shape(values) != jnp.shape(present):
            raise ValueError(
                f"masked_task_means: values has shape {jnp.shape(values)} and present "
                f"has shape {jnp.shape(present)}, but the shapes must be equal."
            )
        present = jnp.asarray(present, bool)
        count = present.sum(axes)
        # A sum or a count may overflow in half precision. jnp.mean also uses float32.
        wide = stack.wide_dtype(jnp.result_type(values))
        total = jnp.where(present, values, 0).sum(axes, dtype=wide)
        found = total / jnp.maximum(count, 1).astype(wide)
        dtype = stack.promoted(jnp.result_type(values), jnp.float16)
        return found.astype(dtype), count > 0

    if isinstance(values, Mapping):
        if not isinstance(present, Mapping) or set(values) != set(present):
            raise ValueError(
                "masked_task_means: values and present must be dicts with the same "
                "names."
            )
        found = {name: mean(x, present[name], None) for name, x in values.items()}
        losses = {name: loss for name, (loss, _) in found.items()}
        return losses, {name: here for name, (_, here) in found.items()}
    return mean(values, present, tuple(range(jnp.ndim(values) - 1)))


class SkipAbsentState(NamedTuple):
    """State of :func:`skip_absent`, one optimizer state per group of parameters."""

    shared: Any
    tasks: dict[int, Any]


def skip_absent(
    optimizer: optax.GradientTransformation,
    owner: Callable[[str], int | str | None],
    *,
    names: tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Leaves the parameters of absent tasks and their optimizer states unchanged.

    An absent task has zero gradients. An optimizer with momentum nevertheless takes a
    step and decays its moments. With this wrapper, the parameters of each task have
    their own optimizer state and step count. They change only if the task is present.

    The optimizer receives the shared parameters and those of each task separately.
    Place transformations that read all parameters together, such as
    ``optax.clip_by_global_norm``, before this wrapper in an ``optax.chain``.

    Args:
      optimizer: Any optax optimizer.
      owner: Function ``owner(path) -> task`` that returns the index or the name of the
        task of a parameter, or None for a shared parameter. A path has the form
        ``heads/0/kernel``.
      names: Names of the tasks. Required if ``owner`` returns names or if the mask is a
        dict.

    Returns:
      A transformation whose ``update`` accepts ``mask=``, booleans of shape ``[T]``.
      None marks all tasks as present. Other extra arguments are passed to the
      optimizer. The state contains one optimizer state per group of parameters.

    Raises:
      ValueError: If ``owner`` returns an unknown name, a negative index or an index
        outside the mask.

    Examples:
      >>> import jax.numpy as jnp, mtljax, optax
      >>> params = {"trunk": jnp.ones(1), "heads": [jnp.ones(1), jnp.ones(1)]}
      >>> def owner(path):
      ...     return int(path.split("/")[1]) if path.startswith("heads") else None
      >>> optimizer = mtljax.skip_absent(optax.sgd(0.1, momentum=0.9), owner)
      >>> state = optimizer.init(params)
      >>> mask = jnp.array([True, False])
      >>> updates, state = optimizer.update(params, state, params, mask=mask)
      >>> [float(u[0]) for u in updates["heads"]]
      [-0.1, -0.0]
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def number(task):
        if not isinstance(task, str):
            return task
        if names is None or task not in names:
            raise ValueError(
                f"skip_absent: owner returned {task!r}, which is not one of "
                f"names={names!r}."
            )
        return names.index(task)

    def owners(tree):
        """Returns the number of the task of every leaf, or None."""
        paths = jax.tree_util.tree_leaves_with_path(tree)
        return [number(owner(stack.path_name(path))) for path, _ in paths]

    def tasks_of(marks):
        return sorted({task for task in marks if task is not None})

    def part(tree, marks, task):
        leaves, treedef = jax.tree.flatten(tree)
        kept = [
            leaf if mark == task else optax.MaskedNode()
            for leaf, mark in zip(leaves, marks, strict=True)
        ]
        return jax.tree.unflatten(treedef, kept)

    def init(params):
        marks = owners(params)
        tasks = tasks_of(marks)
        if any(task < 0 for task in tasks):
            raise ValueError(
                "skip_absent: owner returned a negative index, but an index of at "
                "least 0 is required."
            )
        return SkipAbsentState(
            optimizer.init(part(params, marks, None)),
            {t: optimizer.init(part(params, marks, t)) for t in tasks},
        )

    def update(updates, state, params=None, *, mask=None, **extra_args):
        marks, mask = owners(updates), task_vector(mask, names)
        found = state.tasks if isinstance(state, SkipAbsentState) else None
        if found is None or not set(marks) <= {None, *found}:
            raise ValueError(
                f"skip_absent: owner returned tasks {tasks_of(marks)}, but "
                f"the state is a {type(state).__name__} of tasks {sorted(found or ())}."
                " Create it with init(params) of this optimizer."
            )
        if mask is not None and state.tasks and max(state.tasks) >= len(mask):
            raise ValueError(
                f"skip_absent: owner returned task {max(state.tasks)}, but the mask "
                f"has {len(mask)} entries."
            )

        def step(task, old):
            given = None if params is None else part(params, marks, task)
            return optimizer.update(
                part(updates, marks, task), old, given, **extra_args
            )

        found, shared = step(None, state.shared)
        found, tasks = [found], {}
        for task, old in state.tasks.items():
            moved, new = step(task, old)
            if mask is not None:
                here = mask[task]
                moved = jax.tree.map(lambda u, here=here: jnp.where(here, u, 0), moved)
                new = jax.tree.map(lambda n, o, here=here: choose(here, n, o), new, old)
            found.append(moved)
            tasks[task] = new

        def pick(*parts):
            # A leaf that optax.partition or optax.masked took away is in no part.
            return next((x for x in parts if not masked(x)), optax.MaskedNode())

        def masked(x):
            return isinstance(x, optax.MaskedNode)

        merged = jax.tree.map(pick, *found, is_leaf=masked)
        return merged, SkipAbsentState(shared, tasks)

    return optax.GradientTransformationExtraArgs(init, update)
