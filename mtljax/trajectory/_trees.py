"""Operations on trees as vectors, and means over batches.

A *loss* is ``loss(params, batch) -> ()``, a mean over the examples of the batch in
evaluation mode. It closes over frozen running averages of batch normalisation, over
heads and over all other values that are not differentiated. *Batches* are a pytree of
arrays ``[n, ...]``: n batches of one size. They are processed one after another with
the memory of one.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import stack


def check_positive(name: str, argument: str, value: Any) -> None:
    """Raises an error unless ``value`` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name}: {argument} must be a positive integer, not {value!r}."
        )


def check_length(name: str, argument: str, tree: Any) -> int:
    """Returns the common length of the first axis of all leaves.

    Raises:
      ValueError: If there is no leaf, if a leaf is a scalar or empty, or if the lengths
        differ.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{name}: {argument} hold no array.")
    lengths = {}
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{name}: leaf {stack.path_name(path)!r} of {argument} is a scalar; "
                "it needs a leading axis."
            )
        lengths.setdefault(jnp.shape(leaf)[0], stack.path_name(path))
    if len(lengths) > 1:
        found = ", ".join(f"{n} ({path!r})" for n, path in lengths.items())
        raise ValueError(
            f"{name}: the leaves of {argument} have different lengths: {found}."
        )
    (length,) = lengths
    if length == 0:
        raise ValueError(f"{name}: {argument} are empty.")
    return length


def check_params(name: str, params: Any) -> None:
    """Raises an error unless every leaf is a real floating-point array."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{name}: params hold no array.")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"{name}: parameter {stack.path_name(path)!r} has dtype "
                f"{jnp.result_type(leaf)}; only real floating-point leaves can be "
                "differentiated."
            )


def wide(leaf: Any) -> Array:
    """Converts to at least float32."""
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def widen(tree: Any) -> Any:
    """Converts every leaf to at least float32."""
    return jax.tree.map(wide, tree)


def dot(a: Any, b: Any) -> Array:
    """Returns ``<a, b>`` over all leaves, at least float32."""
    products = jax.tree.map(
        lambda x, y: jnp.vdot(wide(x), wide(y), precision="highest"), a, b
    )
    return functools.reduce(operator.add, jax.tree.leaves(products))


def square_norm(tree: Any) -> Array:
    """Returns ``‖tree‖²`` over all leaves, at least float32."""
    return dot(tree, tree)


def shifted(params: Any, step: Any, scale: Any = 1.0) -> Any:
    """Returns ``params + scale · step`` in the dtypes of ``params``."""
    return jax.tree.map(lambda p, d: (p + scale * d).astype(p.dtype), params, step)


def difference(a: Any, b: Any) -> Any:
    """Returns ``a − b``, at least float32."""
    return jax.tree.map(lambda x, y: wide(x) - wide(y), a, b)


def mean_over(function: Callable[[Any], Any], batches: Any, length: int) -> Any:
    """Averages ``function(batch)`` over the leading axis, one batch at a time.

    The sum is compensated (Kahan), so that small late terms are not lost in float32.
    """
    first = jax.tree.map(lambda x: x[0], batches)
    shapes = jax.eval_shape(lambda batch: widen(function(batch)), first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry, batch):
        total, lost = carry
        fresh = jax.tree.map(operator.sub, widen(function(batch)), lost)
        larger = jax.tree.map(operator.add, total, fresh)
        lost = jax.tree.map(lambda new, old, x: (new - old) - x, larger, total, fresh)
        return (larger, lost), None

    (total, _), _ = jax.lax.scan(body, (zeros, zeros), batches)
    return jax.tree.map(lambda x: x / length, total)
