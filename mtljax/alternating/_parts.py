"""Division of the parameters into shared leaves and leaves of one task.

The labels of :func:`mtljax.label_params` are "shared" and "own". An alternating step
concerns one task, so the label of an own leaf must also identify the task. The label
``"own"`` marks stacked heads of equal shape with one row per task. An integer label is
the number of the task that owns a leaf of any shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from mtljax import placement, stack
from mtljax.balancer import check_num_tasks
from mtljax.types import Params


def _is_task(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool)


def _flat_labels(name: str, labels: Any, params: Params) -> list[Any]:
    """Returns one label per leaf, from a tree, a prefix or a function of the path."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    if labels is None:
        return ["shared"] * len(paths)
    if callable(labels):
        return [labels(stack.path_name(path)) for path, _ in paths]
    if isinstance(labels, str) or _is_task(labels):
        raise ValueError(
            f"{name}: labels={labels!r} is not a tree. Pass a tree of labels with the "
            "structure of the parameters, a prefix of it, or a function of the path."
        )
    return stack.per_leaf(labels, params, f"{name}: labels")


def _check(name: str, path: str, label: Any, leaf: Any, num_tasks: int):
    dtype, shape = stack.dtype_of(leaf), jnp.shape(leaf)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{name}: parameter {path!r} has dtype {dtype}, but only floating-point "
            "arrays have a gradient. Pass it to the loss in the batch."
        )
    if label == "shared":
        return
    if label == "own":
        if not shape or shape[0] != num_tasks:
            raise ValueError(
                f"{name}: parameter {path!r} is labelled 'own' but has shape {shape}; "
                f"its first axis must be num_tasks={num_tasks}, one row per task. "
                "Label a leaf of a single task with the number of the task."
            )
    elif not _is_task(label):
        raise ValueError(
            f"{name}: parameter {path!r} is labelled {label!r}; it must be 'shared', "
            "'own' (one row per task) or the number of the task that owns it."
        )
    elif not 0 <= label < num_tasks:
        raise ValueError(
            f"{name}: parameter {path!r} is labelled {label}, but the tasks are "
            f"0 to {num_tasks - 1}."
        )


class Parts:
    """Division of a parameter tree. Results have holes in place of other leaves."""

    def __init__(self, treedef: Any, labels: list[Any]):
        self._treedef = treedef
        self._labels = labels
        self.owners = sorted({x for x in labels if _is_task(x)})
        self.has_rows = "own" in labels

    def _select(self, tree: Any, wanted: Callable[[Any], bool]) -> Any:
        leaves = self._treedef.flatten_up_to(tree)
        kept = [
            leaf if wanted(label) else optax.MaskedNode()
            for leaf, label in zip(leaves, self._labels, strict=True)
        ]
        return jax.tree.unflatten(self._treedef, kept)

    def shared(self, tree: Any) -> Any:
        """Selects the leaves that all tasks share."""
        return self._select(tree, lambda label: label == "shared")

    def own(self, tree: Any) -> Any:
        """Selects the leaves that belong to one task each."""
        return self._select(tree, lambda label: label != "shared")

    def rows(self, tree: Any) -> Any:
        """Selects the stacked own leaves."""
        return self._select(tree, lambda label: label == "own")

    def owned(self, tree: Any, task: int) -> Any:
        """Selects the leaves labelled with the number of a task."""
        return self._select(tree, lambda label: label == task)

    def merge(self, *trees: Any) -> Any:
        """Merges trees that fill each other's holes."""
        columns = zip(*map(self._treedef.flatten_up_to, trees), strict=True)
        leaves = [
            next(x for x in column if not isinstance(x, optax.MaskedNode))
            for column in columns
        ]
        return jax.tree.unflatten(self._treedef, leaves)

    def map_rows(self, function: Callable[[Any], Any], tree: Any) -> Any:
        """Applies ``function`` to stacked own leaves; other leaves are unchanged."""
        leaves = self._treedef.flatten_up_to(tree)
        pairs = zip(leaves, self._labels, strict=True)
        new = [function(x) if label == "own" else x for x, label in pairs]
        return jax.tree.unflatten(self._treedef, new)

    def axes(self) -> Any:
        """Returns the axis of the tasks in every leaf, for ``jax.vmap``."""
        axes = [0 if label == "own" else None for label in self._labels]
        return jax.tree.unflatten(self._treedef, axes)

    def marks(self) -> Any:
        """Returns the labels "shared" and "own" of the core, or None without rows."""
        marks = ["shared" if x == "shared" else "own" for x in self._labels]
        return jax.tree.unflatten(self._treedef, marks) if "own" in marks else None

    def where(self, active: Bool[Array, " tasks"], new: Any, old: Any) -> Any:
        """Selects new shared leaves if any task is active, and own ones per task."""

        def leaf(label, n, o):
            if label == "shared":
                keep = active.any()
            elif label == "own":
                keep = active.reshape((-1,) + (1,) * (n.ndim - 1))
            else:
                keep = active[label]
            return jnp.where(keep, n, o)

        columns = zip(
            self._labels,
            self._treedef.flatten_up_to(new),
            self._treedef.flatten_up_to(old),
            strict=True,
        )
        leaves = [leaf(*column) for column in columns]
        return jax.tree.unflatten(self._treedef, leaves)

    def view(self, params: Params, tasks: Int[Array, " members"]) -> Params:
        """Returns the parameters with the rows of some tasks only."""
        return self.map_rows(lambda x: take_rows(x, tasks), params)


def take_rows(x: Array, tasks: Int[Array, " members"]) -> Array:
    """Reads the rows of some tasks."""
    return placement.like_first(lambda x, tasks: x[tasks], x, tasks)


def put_rows(x: Array, tasks: Int[Array, " members"], new: Array) -> Array:
    """Replaces some rows of the stack; a row number past the last is ignored."""
    new = new if new.dtype == x.dtype else new.astype(x.dtype)
    return placement.like_first(
        lambda x, tasks, new: x.at[tasks].set(new, mode="drop"), x, tasks, new
    )


def make_parts(name: str, labels: Any, params: Params, num_tasks: int) -> Parts:
    """Divides the parameters into parts.

    Raises:
      ValueError: If a label is invalid (the message names its path), or if no
        parameter is shared.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    flat = _flat_labels(name, labels, params)
    for (path, leaf), label in zip(leaves, flat, strict=True):
        _check(name, stack.path_name(path), label, leaf, num_tasks)
    if "shared" not in flat:
        paths = ", ".join(stack.path_name(path) for path, _ in leaves)
        raise ValueError(
            f"{name}: no parameter is shared; the parameters are {paths or 'none'}."
        )
    return Parts(jax.tree.structure(params), flat)


def check_owners(
    task_loss: Callable[..., Any],
    labels: Any,
    params: Params,
    batch: Any,
    *,
    num_tasks: int,
    **kwargs: Any,
) -> None:
    """Checks on one batch that a leaf with a task number affects that task only.

    If the loss of task 1 depends on a leaf labelled 0, task 1 does not update the leaf.
    No error occurs, but the network learns less. Stacked own leaves need no check,
    because a task loss receives only its own row. The check costs T passes. Call it
    once before training.

    Args:
      task_loss: See :func:`alternate`.
      labels: See :func:`alternate`.
      params: Parameters.
      batch: A batch.
      num_tasks: T.
      **kwargs: Further keywords of ``task_loss`` (``batch_stats``, ``key``).

    Raises:
      ValueError: If another task depends on such a leaf. The message names the first.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.alternating import check_owners
      >>> params = {"trunk": jnp.ones(2), "a": jnp.ones(2), "b": jnp.ones(2)}
      >>> labels = {"trunk": "shared", "a": 0, "b": 1}
      >>> def task_loss(params, task, batch):
      ...     return jnp.where(task == 0, params["a"], params["b"]) @ params["trunk"]
      >>> check_owners(task_loss, labels, params, None, num_tasks=2)
    """
    name = "check_owners"
    check_num_tasks(name, num_tasks)
    parts = make_parts(name, labels, params, num_tasks)
    flat = _flat_labels(name, labels, params)

    def loss(params, task):
        row = parts.map_rows(lambda x: x[task], params)
        out = task_loss(row, task, batch, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    gradient = jax.jit(jax.grad(loss))
    for task in range(num_tasks):
        grads = gradient(params, jnp.int32(task))
        paths = jax.tree_util.tree_leaves_with_path(grads)
        for (path, grad), label in zip(paths, flat, strict=True):
            if _is_task(label) and label != task and bool((grad != 0).any()):
                raise ValueError(
                    f"labels: parameter {stack.path_name(path)!r} is labelled {label} "
                    f"but the loss of task {task} depends on it too; label it 'shared'."
                )
