"""Labels of parameters: shared by the tasks, own to one task, or frozen."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from mtljax import stack
from mtljax.types import Label, Params


def _paths(params: Params) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [stack.path_name(path) for path, _ in leaves]


def label_params(
    params: Params,
    *,
    own: str | Sequence[str] | None = None,
    frozen: str | Sequence[str] | None = None,
) -> Any:
    """Labels every parameter ``"shared"``, ``"own"`` or ``"frozen"`` by its path.

    Args:
      params: The parameters, any pytree.
      own: Paths of the parameters that belong to a single task: a prefix
        (``"heads"``, ``"params/head_a"``), a glob (``"*/decoder_*/*"``), or
        several of them. Paths are written with slashes, such as
        ``trunk/dense/kernel``. All other parameters are shared.
      frozen: Paths of the parameters that are not trained, in the same form. A
        parameter that matches both is frozen.

    Returns:
      A tree of strings with the structure of ``params``, for the ``labels`` of
      :func:`value_and_balanced_grad` and for ``optax.partition``.

    Raises:
      ValueError: If a pattern matches no parameter, or if no parameter remains shared.

    Examples:
      >>> import mtljax
      >>> params = {"trunk": {"w": 1.0}, "heads": {"a": 2.0, "b": 3.0}}
      >>> mtljax.label_params(params, own="heads")
      {'heads': {'a': 'own', 'b': 'own'}, 'trunk': {'w': 'shared'}}
    """
    paths = _paths(params)

    patterns: dict[str, list[str]] = {}
    for label, given in (("frozen", frozen), ("own", own)):
        patterns[label] = [given] if isinstance(given, str) else list(given or ())
        for pattern in patterns[label]:
            if not any(_matches(path, pattern) for path in paths):
                raise ValueError(
                    f"label_params: {label}={pattern!r} matches no parameter; the "
                    f"paths are {stack.listing(paths)}."
                )

    def label_of(path, _):
        name = stack.path_name(path)
        found = (k for k, ps in patterns.items() if any(_matches(name, p) for p in ps))
        return next(found, "shared")

    labels = jax.tree_util.tree_map_with_path(label_of, params)
    if "shared" not in jax.tree.leaves(labels):
        raise ValueError(
            f"label_params: own={own!r}"
            + (f" and frozen={frozen!r} match" if frozen else " matches")
            + " every parameter; nothing is shared, so there is nothing to balance."
        )
    return labels


def resolve_labels(labels: Any, params: Params) -> list[Any]:
    """Returns one label per leaf, from a tree, a prefix tree or a function of the path.

    Args:
      labels: Labels as for :func:`value_and_balanced_grad`.
      params: The parameters, any pytree.

    Returns:
      A list with the label of every leaf, in the order of ``jax.tree.leaves``.

    Raises:
      ValueError: If a label is unknown, if no parameter is shared, or if all are.

    Examples:
      >>> params = {"head": 1.0, "trunk": {"b": 2.0, "w": 3.0}}
      >>> resolve_labels({"head": "own", "trunk": "shared"}, params)
      ['own', 'shared', 'shared']
    """
    if isinstance(labels, str):
        raise ValueError(
            f"labels={labels!r} is a string; pass a tree of labels, a function "
            "of the path, or mtljax.label_params(params, own=...)."
        )
    if callable(labels):
        paths = jax.tree_util.tree_leaves_with_path(params)
        flat = [labels(stack.path_name(path)) for path, _ in paths]
    else:
        flat = stack.per_leaf(labels, params, "labels")
    for path, label in zip(_paths(params), flat, strict=True):
        if label not in get_args(Label):
            raise ValueError(
                f"labels: parameter {path!r} is labelled {label!r}; "
                "it must be 'shared', 'own' or 'frozen'."
            )
    if "shared" not in flat:
        raise ValueError(
            "labels mark no parameter as 'shared'; the paths are "
            f"{stack.listing(_paths(params))}."
        )
    if not {"own", "frozen"} & set(flat):
        raise ValueError(
            "labels mark no parameter as 'own' or 'frozen'; the paths are "
            f"{stack.listing(_paths(params))}. Leave labels out if all are shared."
        )
    return flat


def check_trained(paths: Sequence[str], marks: Sequence[Any], values: Sequence[Any]):
    """Checks that all leaves that are not frozen have a gradient.

    Args:
      paths: Path of every leaf.
      marks: Label of every leaf.
      values: The leaves.

    Raises:
      ValueError: If a leaf that is not frozen is not an array of real or complex
        floating-point numbers, or if a frozen leaf is not an array.
    """
    for path, mark, leaf in zip(paths, marks, values, strict=True):
        dtype = stack.dtype_of(leaf)
        if dtype is None:
            remedy = "Pass it in another argument."
        elif mark == "frozen" or jnp.issubdtype(dtype, jnp.inexact):
            continue
        else:
            remedy = "Label it 'frozen', or pass it in another argument."
        raise ValueError(f"parameter {path!r} {stack.why_unbalanced(leaf)} {remedy}")


def resolve_measure(measure: Any, params: Params, marks: Sequence[str]) -> list[int]:
    """Returns the numbers of the shared leaves that ``measure`` selects.

    Args:
      measure: Paths as for :func:`label_params`, a function of the path, or a tree of
        booleans with the structure of the parameters or a prefix of it.
      params: Parameters.
      marks: The label of every leaf.

    Raises:
      ValueError: If ``measure`` selects nothing, or a leaf that is not shared.
    """
    paths = _paths(params)
    if isinstance(measure, str) or (
        isinstance(measure, list | tuple) and all(isinstance(m, str) for m in measure)
    ):
        found = _any_matches(paths, measure)
    elif callable(measure):
        found = [bool(measure(path)) for path in paths]
    else:
        flags = stack.per_leaf(measure, params, "measure, if it is not paths,")
        found = [bool(flag) for flag in flags]
    for path, chosen, mark in zip(paths, found, marks, strict=True):
        if chosen and mark != "shared":
            raise ValueError(
                f"measure selects parameter {path!r}, which is labelled {mark!r}; only "
                "shared parameters can be measured."
            )
    if not any(found):
        raise ValueError(
            f"measure={measure!r} selects no parameter; the paths are "
            f"{stack.listing(paths)}."
        )
    return [i for i, chosen in enumerate(found) if chosen]


def _any_matches(paths: Sequence[str], patterns: Any) -> list[bool]:
    """Whether each path matches one of the prefixes or globs."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return [any(_matches(path, pattern) for pattern in patterns) for path in paths]


def _matches(path: str, pattern: str) -> bool:
    prefix = pattern.rstrip("/")
    return (
        path == prefix
        or path.startswith(prefix + "/")
        or fnmatch.fnmatchcase(path, pattern)
    )


def shared_params(params: Params, labels: Any) -> Params:
    """Returns the parameters with ``optax.MaskedNode()`` for all but shared leaves.

    With ``labels``, a balancer receives this tree. If the state of the balancer has the
    structure of the gradients, initialise it with
    ``balancer.init(shared_params(params, labels))``.

    Args:
      params: The parameters, any pytree.
      labels: Labels as for :func:`value_and_balanced_grad`.

    Returns:
      A tree with the structure of ``params``.

    Examples:
      >>> import mtljax
      >>> params = {"trunk": 1.0, "head": 2.0}
      >>> mtljax.shared_params(params, {"trunk": "shared", "head": "own"})
      {'head': MaskedNode(), 'trunk': 1.0}
    """
    flat = iter(resolve_labels(labels, params))
    return jax.tree.map(
        lambda leaf: leaf if next(flat) == "shared" else optax.MaskedNode(), params
    )


def check_labels(
    task_losses: Callable[..., Any], labels: Any, params: Params, *args: Any
) -> None:
    """Checks on one batch that every own parameter affects at most one task.

    The check costs T backward passes. Call it once before training, outside ``jit``.

    Args:
      task_losses: See :func:`value_and_task_grads` (without ``has_aux``). It may return
        a dictionary of losses.
      labels: See :func:`value_and_balanced_grad`.
      params: Parameters.
      *args: Further arguments of ``task_losses``.

    Raises:
      ValueError: If several tasks depend on an own parameter. The message names the
        first such parameter.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> params = {"trunk": jnp.ones(2), "heads": jnp.ones((2, 2))}
      >>> def task_losses(params):
      ...     return params["heads"] @ params["trunk"]
      >>> mtljax.check_labels(task_losses, {"trunk": "shared", "heads": "own"}, params)
      Traceback (most recent call last):
        ...
      ValueError: labels: parameter 'heads' is labelled 'own' but tasks [0, 1] ...
    """
    flat = resolve_labels(labels, params)
    paths, (values, treedef) = _paths(params), jax.tree.flatten(params)
    check_trained(paths, flat, values)
    own = [i for i, label in enumerate(flat) if label == "own"]

    def losses(parts):
        full = list(values)
        for i, part in zip(own, parts, strict=True):
            full[i] = part
        found = task_losses(jax.tree.unflatten(treedef, full), *args)
        if isinstance(found, Mapping):
            names.extend(found)
            found = jnp.stack([jnp.asarray(loss) for loss in found.values()])
        return found

    names: list[str] = []
    rows = jax.jacrev(losses)([values[i] for i in own]) if own else []
    for i, row in zip(own, rows, strict=True):
        touched = (jnp.abs(row) > 0).any(tuple(range(1, row.ndim)))
        tasks = [names[t] if names else t for t in jnp.flatnonzero(touched).tolist()]
        if len(tasks) > 1:
            raise ValueError(
                f"labels: parameter {paths[i]!r} is labelled 'own' but tasks {tasks} "
                "all depend on it; label it 'shared'."
            )
