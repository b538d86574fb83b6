"""Optimiser states, several of one kind: stacked, one read and written at a time."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax import placement, stack

Moments: TypeAlias = Literal["full", "bfloat16"]

# Their count says how far a schedule is, not how many gradients a moment holds. By
# name, since optax does not export all of them.
_CLOCKS = {"ScaleByScheduleState", "WrappedScheduleState", "WeightDecaySchedule"}


def at_batch(opt_state: Any, batch: Int[Array, ""]) -> Any:
    """The state with every schedule set to the number of the batch.

    A state that is used once in several batches, or several times in one, would run
    through a schedule of the learning rate at its own pace. Bias corrections keep their
    own counts: they belong to the moments.
    """

    def is_clock(node):
        return type(node).__name__ in _CLOCKS

    def visit(node):
        if not is_clock(node):
            return node
        return node._replace(count=batch.astype(jnp.asarray(node.count).dtype))

    return jax.tree.map(visit, opt_state, is_leaf=is_clock)


def step(
    optimizer: optax.GradientTransformation,
    grad: Any,
    opt_state: Any,
    params: Any,
    *,
    batch: Int[Array, ""],
    value: Any,
) -> tuple[Any, Any]:
    """``optimizer.update`` in batch time; ``value`` is for those that read the loss."""
    update = optax.with_extra_args_support(optimizer).update
    return update(grad, at_batch(opt_state, batch), params, value=value)


def check(name: str, optimizer: Any, params: Any) -> None:
    """Raises unless the states of ``optimizer`` can be stacked.

    Raises:
      ValueError: If it is no optax optimiser, or its state holds what is no array, or
        an update changes the structure or the shapes of its state.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"{name}: the optimiser must be an optax.GradientTransformation, not a "
            f"{type(optimizer).__name__}."
        )
    state = optimizer.init(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float)):
            raise ValueError(
                f"{name}: the optimiser's state cannot be stacked, one copy per task: "
                f"{stack.path_name(path)!r} is a {type(leaf).__name__}, not an array."
            )
    value = jnp.zeros(())
    try:
        new = jax.eval_shape(
            lambda g, s, p: step(
                optimizer, g, s, p, batch=jnp.zeros((), jnp.int32), value=value
            )[1],
            params,
            state,
            params,
        )
    except TypeError as error:
        raise ValueError(
            f"{name}: the optimiser's update cannot be called as update(grads, state, "
            f"params, value=loss): {error}"
        ) from error
    old = jax.eval_shape(lambda s: s, state)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(s)] for s in (old, new)]
    if jax.tree.structure(old) != jax.tree.structure(new) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: the optimiser's state cannot be stacked, one copy per task: an "
            f"update turns {jax.tree.structure(old)} with shapes {shapes[0]} into "
            f"{jax.tree.structure(new)} with shapes {shapes[1]}."
        )


def copies(
    init: Callable[[Any], Any], params: Any, count: int, axis: Any = None
) -> Any:
    """``count`` fresh states, every leaf ``[count, ...]``, of params or of their rows.

    Copies of a random state draw from keys of their own.
    """
    if axis is None:
        # Not by vmap, so that moments lie as their parameters do.
        states = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (count, *jnp.shape(x))),
            init(params),
        )
    else:
        # Compiled with its arguments, used or not: these say what mesh there is.
        each = jax.vmap(lambda _, p: init(p), in_axes=(0, axis))
        states = jax.jit(each, keep_unused=True)(jnp.arange(count), params)

    def leaf(path, x):
        old_kind = x.dtype == jnp.uint32 and "key" in stack.path_name(path[-1:])
        if not (old_kind or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)):
            return x
        return jax.vmap(jax.random.fold_in)(x, jnp.arange(count))

    return jax.tree_util.tree_map_with_path(leaf, states)


def shrink(states: Any, moments: Moments) -> Any:
    """Stacked states in the types they are kept in."""

    def leaf(x):
        # Scalars (step counts, learning rates) are not worth their rounding.
        wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 2
        small = moments == "bfloat16" and wide and x.ndim > 1
        return x.astype(jnp.bfloat16) if small else x

    return jax.tree.map(leaf, states)


def round_randomly(x: Array, key: PRNGKeyArray) -> Array:
    """Rounds float32 to bfloat16, up or down at random, so that the mean is exact.

    A moving average with decay 0.999 changes by less than bfloat16 can show; rounding
    to nearest would stop it.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def read(states: Any, index: Array) -> Any:
    """One of the stacked states, as it is kept; the only one if there is but one."""

    def leaf(x):
        if x.shape[0] == 1:  # no slice: XLA would copy around it in a loop
            return x[0]
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

    return jax.tree.map(leaf, states)


def widen(optimizer: optax.GradientTransformation, params: Any, state: Any) -> Any:
    """A state in the types that the optimiser gave it."""
    kinds = jax.eval_shape(optimizer.init, params)

    def leaf(x, kind):
        return x if x.dtype == kind.dtype else x.astype(kind.dtype)

    return jax.tree.map(leaf, state, kinds)


def narrow(new: Any, old: Any, key: PRNGKeyArray | None) -> Any:
    """A new state in the types of an old one, which are those it is kept in."""
    leaves, treedef = jax.tree.flatten(new)

    def leaf(number, n, o):
        n = jnp.asarray(n)
        if n.dtype == o.dtype:
            return n
        if o.dtype == jnp.bfloat16 and key is not None:
            return round_randomly(n, jax.random.fold_in(key, number))
        return n.astype(o.dtype)

    pairs = zip(leaves, treedef.flatten_up_to(old), strict=True)
    return jax.tree.unflatten(treedef, [leaf(i, *p) for i, p in enumerate(pairs)])


def after(index: Int[Array, ""], done: Any) -> Int[Array, ""]:
    """The index, which XLA cannot tell before all of ``done`` is there.

    Where a state is written in place, what is computed from its old value must be
    there. XLA would rather copy the whole stack than see to that order, and drops
    ``jax.lax.optimization_barrier`` before it decides; it does not see that the number
    added here is zero.
    """
    for leaf in jax.tree.leaves(done):
        # Where a device has a part of a leaf, an entry of it would have to be sent.
        if leaf.size and placement.plain(leaf):
            first = leaf[(0,) * leaf.ndim].real.astype(jnp.float32)
            bits = jax.lax.bitcast_convert_type(first, jnp.int32)
            zero = jnp.minimum(bits, 0) ^ jnp.maximum(bits, 0) ^ bits
            index = index + zero.astype(index.dtype)
    return index


def write(states: Any, index: Array, new: Any) -> Any:
    """The stacked states with one replaced; in place if ``index`` is :func:`after`."""

    def leaf(x, n):
        if x.shape[0] == 1:
            return n[None]
        return jax.lax.dynamic_update_index_in_dim(x, n, index, 0)

    return jax.tree.map(leaf, states, new)
