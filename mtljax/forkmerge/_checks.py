"""Validation of arguments for the other modules of this subpackage."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.balancer import check_choice

Direction: TypeAlias = Literal["max", "min"]
Numbers: TypeAlias = ArrayLike | Sequence[Any]  # an array, or lists of numbers
BranchWeights: TypeAlias = Float[Array, "branches tasks"]


def positive(name: str, argument: str, value: Any) -> None:
    """Raises an error unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name}: {argument} must be a positive integer, not {value!r}."
        )


def task_index(name: str, num_tasks: int, target: Any) -> None:
    """Raises an error unless ``target`` is the index of a task."""
    positive(name, "num_tasks", num_tasks)
    whole = isinstance(target, int) and not isinstance(target, bool)
    if not (whole and 0 <= target < num_tasks):
        raise ValueError(
            f"{name}: target={target!r} is not the index of one of {num_tasks} tasks."
        )


def sign_of(name: str, direction: Any) -> int:
    """Returns 1 if a large score is good, and -1 if a small one is."""
    check_choice(name, "direction", direction, Direction)
    return 1 if direction == "max" else -1


def count_branches(name: str, branches: Any) -> int:
    """Returns B, the length of the leading axis of every leaf.

    Raises:
      ValueError: If a leaf has no such axis or another length. The message names it.
    """
    leaves = jax.tree_util.tree_leaves_with_path(branches)
    if not leaves:
        raise ValueError(f"{name}: the branches are an empty tree.")
    count = None
    for path, leaf in leaves:
        shape = jnp.shape(leaf)
        if count is None and shape:
            count = shape[0]
        if not shape or shape[0] != count:
            raise ValueError(
                f"{name}: leaf {stack.path_name(path)!r} of the branches has shape "
                f"{shape}; its first axis must be the {count} branches, as in the "
                "result of mtljax.forkmerge.fork."
            )
    assert count is not None
    return count


def branch_weights(name: str, branch_weights: Any, num_branches: int) -> Array:
    """Returns the weights as an array ``[num_branches, T]``."""
    found = jnp.asarray(branch_weights)
    if found.ndim != 2 or found.shape[0] != num_branches:
        raise ValueError(
            f"{name}: branch_weights has shape {found.shape}; with {num_branches} "
            f"branches it must be ({num_branches}, tasks), one row per branch."
        )
    return found


def merge_weights(name: str, weights: Numbers, num_branches: int) -> Array:
    """Returns Λ as an array ``[num_branches]``."""
    found = jnp.asarray(weights)
    if found.shape != (num_branches,):
        raise ValueError(
            f"{name}: the merge weights have shape {found.shape}; there are "
            f"{num_branches} branches, so it must be ({num_branches},)."
        )
    return found


def score_args(name: str, validation: Any) -> tuple[Any, ...]:
    """Returns the further arguments of a score, after checking the validation set."""
    if validation is None:
        return ()
    validation_set(name, validation)
    return (validation,)


def validation_set(name: str, validation: Any) -> None:
    """Raises an error if the validation set contains no example."""
    leaves = jax.tree_util.tree_leaves_with_path(validation)
    if not leaves:
        raise ValueError(f"{name}: the validation set holds no array.")
    for path, leaf in leaves:
        if jnp.ndim(leaf) and jnp.size(leaf) == 0:
            raise ValueError(
                f"{name}: the validation set is empty: array {stack.path_name(path)!r} "
                f"has shape {jnp.shape(leaf)}."
            )
