"""Linear algebra on stacked gradients, trees with leaves ``[T, ...]``."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Scalar

from mtljax import placement
from mtljax.types import Grads, Gramian, Mask, Update, Weights

# optax.MultiSteps and optax.flatten pass gradients of another shape to a balancer.
WRAPPED = "Wrappers such as optax.MultiSteps go around the rest of the chain only."

_SHOWN = 8  # maximum number of paths in an error message


def promoted(*dtypes: Any) -> Any:
    """Returns the dtype to which the dtypes are promoted.

    With ``jax_numpy_dtype_promotion="strict"``, ``jnp.promote_types`` raises an error
    for floating-point dtypes that differ.
    """
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def wide_dtype(*dtypes: Any) -> Any:
    """Returns the dtype in which sums are accumulated, float32 or a wider one."""
    return promoted(jnp.float32, *dtypes)


def path_name(path: tuple[Any, ...]) -> str:
    """Formats the path of a leaf, for example ``trunk/dense/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/") or "(root)"


def dtype_of(leaf: Any) -> Any:
    """Returns the dtype of an array or a number, and None for any other leaf."""
    # jnp.result_type does not accept float0, the dtype of integer gradients.
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    numbers = bool | int | float | complex
    return jnp.result_type(leaf) if isinstance(leaf, numbers) else None


def why_unbalanced(leaf: Any) -> str | None:
    """Returns why a leaf cannot be balanced, as the end of a sentence, or None.

    The inner products are those of real arrays, and JAX does not promote floating-point
    types of 8 bits.
    """
    dtype = dtype_of(leaf)
    if dtype is None:
        return f"is a {type(leaf).__name__}; only arrays can be balanced."
    if not jnp.issubdtype(dtype, jnp.floating):
        shown = "float0" if dtype == jax.dtypes.float0 else dtype
        return f"has dtype {shown}; only real floating-point leaves can be balanced."
    if jnp.finfo(dtype).bits < 16:
        return f"has dtype {dtype}; only leaves of at least 16 bits can be balanced."
    return None


def per_leaf(prefix: Any, tree: Any, name: str) -> list[Any]:
    """Returns one value per leaf of the parameters, from a tree or a prefix of it.

    Args:
      prefix: Values in a tree like the parameters, or in a prefix of it. None is a
        value.
      tree: The parameters.
      name: Name of the argument, with which the error message starts.

    Returns:
      A list in the order of ``jax.tree.leaves(tree)``.

    Raises:
      ValueError: If ``prefix`` is not a prefix of ``tree``. The message contains the
        first paths of both.

    Examples:
      >>> per_leaf({"a": 0, "b": None}, {"a": (5.0, 6.0), "b": 7.0}, "axes")
      [0, 0, None]
    """
    is_none = lambda x: x is None
    values: list[Any] = []

    def extend(value, sub):
        values.extend([value] * len(jax.tree.leaves(sub)))

    try:
        jax.tree.map(extend, prefix, tree, is_leaf=is_none)
    except (ValueError, TypeError):
        given = jax.tree_util.tree_leaves_with_path(prefix, is_leaf=is_none)
        known = jax.tree_util.tree_leaves_with_path(tree)
        raise ValueError(
            f"{name} must be a tree like the parameters, or a prefix of it. It has the "
            f"paths {listing([path_name(path) for path, _ in given])}, and the "
            f"parameters have {listing([path_name(path) for path, _ in known])}."
        ) from None
    return values


def listing(paths: Sequence[str]) -> str:
    """Returns the first paths of a tree as text for an error message.

    Args:
      paths: Names of all leaves.

    Returns:
      At most 8 paths, and their number if there are more.
    """
    more = f", … ({len(paths)} in all)" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def check(
    grads: Any, num_tasks: int, name: str = "balancer", params: Any = None
) -> None:
    """Raises if a leaf is not a float array with a leading axis of ``num_tasks``.

    Args:
      grads: Stacked gradients.
      num_tasks: Required length of the first axis of every leaf.
      name: Name of the method, with which the error message starts.
      params: Parameters, if known. Every gradient must then have the shape
        ``[T, *parameter.shape]``. This detects a gradient that is not stacked, but
        whose first axis has length T by coincidence.

    Raises:
      ValueError: If the tree is empty, or a leaf has a wrong shape or dtype. The
        message names the first such leaf, its shape and ``num_tasks``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    if not leaves:
        raise ValueError(f"{name}: the gradients are an empty tree.")
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != num_tasks:
            raise ValueError(
                f"{name}: gradient {path_name(path)!r} has shape {jnp.shape(leaf)}; "
                f"its first axis must be num_tasks={num_tasks}. Pass stacked gradients "
                f"as mtljax.value_and_task_grads returns them. {WRAPPED}"
            )
        why = why_unbalanced(leaf)
        if why is not None:
            raise ValueError(f"{name}: gradient {path_name(path)!r} {why}")
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
                f"shape {expected}, as mtljax.value_and_task_grads returns them. "
                f"{WRAPPED}"
            )


def gramian(grads: Grads) -> Gramian:
    """Computes the Gramian, the inner products of the task gradients over all leaves.

    The sums are accumulated in float32, or in float64 if a leaf is float64, with the
    highest matmul precision. This does not depend on other dtypes of the leaves.

    Args:
      grads: Stacked gradients, leaves of shape ``[T, ...]``.

    Returns:
      The Gramian, shape ``[T, T]``.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> grads = {"w": jnp.array([[1.0, 0.0], [1.0, 2.0]])}
      >>> mtljax.stack.gramian(grads).tolist()
      [[1.0, 1.0], [1.0, 5.0]]
    """
    return cross_gramian(grads, grads)


def cross_gramian(left: Grads, right: Grads) -> Gramian:
    """Computes ``J₁ J₂ᵀ``, the inner products of the task gradients of two batches.

    The matrix is not symmetric. If the batches are independent, it is an unbiased
    estimate, whereas the gradient noise adds a bias to the diagonal of
    :func:`gramian`. The precision is that of :func:`gramian`.

    Args:
      left: Stacked gradients of the first batch, leaves of shape ``[T, ...]``.
      right: Stacked gradients of the second batch, with the same shapes.

    Returns:
      The cross Gramian, shape ``[T, T]``.

    Raises:
      ValueError: If a tree is empty, or if a leaf is not a real floating-point array.
    """
    if not jax.tree.leaves(left):
        raise ValueError("gramian: the gradients are an empty tree.")
    for path, row in jax.tree_util.tree_leaves_with_path((left, right)):
        why = why_unbalanced(row)
        if why is not None:
            raise ValueError(f"gramian: gradient {path_name(path[1:])!r} {why}")

    def leaf(a, b):
        # Contract all axes of the leaf. A reshape would gather sharded axes.
        wide = wide_dtype(a.dtype)
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
    """Returns whether every entry of the tree is finite. Integers always are."""

    def leaf(x):
        # x - x is 0 if x is finite and NaN otherwise, and a sum of zeros is exact. On a
        # CPU, sums of columns are vectorised and a conjunction of booleans is not.
        zeros = (x - x).sum(tuple(range(x.ndim - 1 or x.ndim)))
        return (zeros == 0).all()

    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    found = (leaf(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))
    return functools.reduce(operator.and_, found, jnp.asarray(True))


def combine(grads: Grads, weights: Weights) -> Update:
    """Computes the weighted sum of the task gradients. Each leaf keeps its dtype.

    Args:
      grads: Stacked gradients, leaves of shape ``[T, ...]``.
      weights: Task weights, shape ``[T]``.

    Returns:
      The update ``Σ_i w_i g_i``, leaves of shape ``[...]``.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> grads = {"w": jnp.array([[1.0, 0.0], [1.0, 2.0]])}
      >>> mtljax.stack.combine(grads, jnp.array([0.5, 1.0]))["w"].tolist()
      [1.5, 2.0]
    """

    def leaf_sum(g):
        wide = wide_dtype(g.dtype)
        out = jnp.tensordot(
            weights.astype(wide), g.astype(wide), 1, precision="highest"
        )
        return out.astype(g.dtype)

    return jax.tree.map(leaf_sum, grads)


def select(grads: Grads, mask: Mask) -> Grads:
    """Sets the gradients of absent tasks to zero, including NaN and infinite entries.

    Args:
      grads: Stacked gradients, leaves of shape ``[T, ...]``.
      mask: Present tasks, shape ``[T]``.

    Returns:
      Stacked gradients with the same shapes.
    """

    def leaf_select(g):
        return jnp.where(
            mask.reshape((-1,) + (1,) * (g.ndim - 1)), g, jnp.zeros_like(g)
        )

    return jax.tree.map(leaf_select, grads)
