"""Moving averages of stacked gradients, float32 trees ``[T, ...]``."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.types import Grads, Mask, Weights


def zeros_like_stacked(params: Any, num_tasks: int) -> Any:
    """Builds zeros ``[num_tasks, ...]`` for every parameter, at least in float32."""

    def leaf(p):
        dtype = stack.wide_dtype(jnp.result_type(p))
        # zeros_like keeps the sharding of the parameter.
        one = jnp.zeros_like(p, dtype)[None]
        return jnp.broadcast_to(one, (num_tasks, *jnp.shape(p)))

    return jax.tree.map(leaf, params)


def check_tracked(name: str, tracked: Any, grads: Grads) -> None:
    """Raises if the state was initialised for other gradients."""
    found, made = (
        {stack.path_name(path): jnp.shape(leaf) for path, leaf in flat}
        for flat in map(jax.tree_util.tree_leaves_with_path, (grads, tracked))
    )
    for path in found | made:
        if found.get(path) != made.get(path):
            raise ValueError(
                f"{name}: gradient {path!r} has shape {found.get(path)}, but the state "
                f"has shape {made.get(path)} for it. Initialise the state with the "
                "parameters that are balanced, balancer.init(params) or "
                "balancer.init(mtljax.shared_params(params, labels))."
            )


def per_task(vector: Float[Array, " tasks"], leaf: Float[Array, "tasks ..."]) -> Array:
    """Reshapes a vector to multiply the task axis of a leaf, in the leaf's dtype."""
    return vector.astype(leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))


def follow(
    tracked: Grads, grads: Grads, rates: Weights, mask: Mask, factors: Weights
) -> Grads:
    """Computes ``y_i + r_i (f_i g_i − y_i)`` for present tasks, else ``y_i``."""

    def leaf(y, g):
        g = g.astype(y.dtype) * per_task(factors, y)
        new = y + per_task(rates, y) * (g - y)
        return jnp.where(mask.reshape((-1,) + (1,) * (y.ndim - 1)), new, y)

    return jax.tree.map(leaf, tracked, grads)


def row_norms(grads: Grads) -> Weights:
    """Computes the norm of each task gradient over all leaves, shape ``[T]``."""

    def squares(g):
        wide = g.astype(stack.wide_dtype(g.dtype))
        return jnp.square(wide).sum(tuple(range(1, g.ndim)))

    return jnp.sqrt(sum(map(squares, jax.tree.leaves(grads)), jnp.zeros(())))
