"""Algebra on stacked trees: pytrees whose leaves lead with the task axis."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax import placement
from mtljax.types import Grads, Gramian, Mask, Update, Weights


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as people write it: ``trunk/dense/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def check(
    grads: Any, num_tasks: int, name: str = "balancer", params: Any = None
) -> None:
    """Raises unless every leaf is a float array with ``num_tasks`` leading rows.

    Args:
      grads: Stacked gradients.
      num_tasks: Length that the first axis of every leaf must have.
      name: Method on whose behalf the check is made; the error starts with it.
      params: Parameters, if known. The leaf of each must be ``[T, *parameter.shape]``,
        which finds a gradient that is not stacked but whose first axis happens to
        have the length T.

    Raises:
      ValueError: Naming the first offending leaf, its shape and ``num_tasks``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    if not leaves:
        raise ValueError(f"{name}: the gradients are an empty tree.")
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_tasks:
            raise ValueError(
                f"{name}: gradient {path_name(path)!r} has shape {jnp.shape(leaf)}; "
                f"its first axis must be num_tasks={num_tasks} (one row per task, as "
                "mtljax.value_and_task_grads returns them)."
            )
        # The dtype itself: float0, the gradient of an integer, is no dtype of jax.
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            shown = "float0" if dtype == jax.dtypes.float0 else dtype
            raise ValueError(
                f"{name}: gradient {path_name(path)!r} has dtype {shown}; only real "
                "floating-point leaves can be balanced."
            )
    shapes = {
        path: jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for path, leaf in leaves:
        expected = (num_tasks, *shapes.get(path, jnp.shape(leaf)[1:]))
        if jnp.shape(leaf) != expected:
            raise ValueError(
                f"{name}: gradient {path_name(path)!r} has shape {jnp.shape(leaf)}, "
                f"but its parameter has shape {expected[1:]}; stacked gradients have "
                f"the shape {expected}, as mtljax.value_and_task_grads returns them."
            )


def gramian(grads: Grads) -> Gramian:
    """Computes the inner products of the task gradients over all leaves.

    Accumulated in float32 (float64 where a leaf is) at the highest matmul
    precision, whatever the dtype of the leaves.
    """
    return cross_gramian(grads, grads)


def cross_gramian(left: Grads, right: Grads) -> Gramian:
    """Computes ``J₁ J₂ᵀ`` of the task gradients of two batches, not symmetric.

    Without the noise that :func:`gramian` has on its diagonal. Precision as there.
    """

    def leaf(a, b):
        # Over the axes of the leaf itself: a reshape would gather sharded ones.
        wide = jnp.promote_types(a.dtype, jnp.float32)
        axes = tuple(range(1, a.ndim))
        return jax.lax.dot_general(
            a.astype(wide),
            b.astype(wide),
            ((axes, axes), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=placement.replicated((a, b), 2),
        )

    return functools.reduce(
        operator.add, map(leaf, jax.tree.leaves(left), jax.tree.leaves(right))
    )


def all_finite(tree: Any) -> Scalar:
    """Whether every entry of every leaf is finite."""
    return functools.reduce(
        operator.and_, (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    )


def combine(grads: Grads, weights: Weights) -> Update:
    """Weighted sum of the task gradients; each leaf keeps its own dtype."""

    def leaf_sum(g):
        wide = jnp.promote_types(g.dtype, jnp.float32)
        out = jnp.tensordot(
            weights.astype(wide), g.astype(wide), 1, precision="highest"
        )
        return out.astype(g.dtype)

    return jax.tree.map(leaf_sum, grads)


def select(grads: Grads, mask: Mask) -> Grads:
    """Zeroes the rows of absent tasks, also where they hold NaN or infinity."""

    def leaf_select(g):
        return jnp.where(
            mask.reshape((-1,) + (1,) * (g.ndim - 1)), g, jnp.zeros_like(g)
        )

    return jax.tree.map(leaf_select, grads)
