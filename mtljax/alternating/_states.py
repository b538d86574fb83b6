"""Stacked optimizer states, of which one at a time is read and written."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax import placement, stack
from mtljax.balancer import clone_keys

Moments: TypeAlias = Literal["full", "bfloat16"]

# The count of these states is the position in a schedule, and not the number of
# gradients in a moment. They are identified by name, because optax does not export all.
_CLOCKS = {"ScaleByScheduleState", "WrappedScheduleState", "WeightDecaySchedule"}


def at_batch(opt_state: Any, batch: Int[Array, ""]) -> Any:
    """Returns the state with the count of every schedule set to the batch number.

    A state may be used once in several batches, or several times in one batch. Its
    schedules would then advance at a different rate. Bias corrections keep their own
    counts, because these belong to the moments.
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
    """Calls ``optimizer.update`` with schedules at ``batch`` and the loss ``value``."""
    update = optax.with_extra_args_support(optimizer).update
    return update(grad, at_batch(opt_state, batch), params, value=value)


def check(name: str, optimizer: Any, params: Any) -> None:
    """Raises an error unless the states of ``optimizer`` can be stacked.

    Raises:
      ValueError: If ``optimizer`` is not an optax optimizer, if its state contains a
        leaf that is not an array, or if an update changes the structure or the shapes
        of the state.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"{name}: the optimizer must be an optax.GradientTransformation, not a "
            f"{type(optimizer).__name__}."
        )
    state = optimizer.init(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float)):
            raise ValueError(
                f"{name}: the optimizer state cannot be stacked, one copy per task: "
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
            f"{name}: the optimizer's update cannot be called as update(grads, state, "
            f"params, value=loss): {error}"
        ) from error
    old = jax.eval_shape(lambda s: s, state)
    shapes = [[leaf.shape for leaf in jax.tree.leaves(s)] for s in (old, new)]
    if jax.tree.structure(old) != jax.tree.structure(new) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: the optimizer state cannot be stacked, one copy per task: an "
            f"update turns {jax.tree.structure(old)} with shapes {shapes[0]} into "
            f"{jax.tree.structure(new)} with shapes {shapes[1]}."
        )


def copies(
    init: Callable[[Any], Any], params: Any, count: int, axis: Any = None
) -> Any:
    """Creates ``count`` initial states of the parameters or of their rows.

    Every leaf has shape ``[count, ...]``. Each copy of a random state has its own key.
    """
    if axis is None:
        # Broadcasting keeps the sharding of the parameters for their moments.
        states = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (count, *jnp.shape(x))),
            init(params),
        )
    else:
        # The compiler takes the mesh from the arguments, so unused ones are kept too.
        each = jax.vmap(lambda _, p: init(p), in_axes=(0, axis))
        states = jax.jit(each, keep_unused=True)(jnp.arange(count), params)

    def leaf(path, x):
        old_kind = x.dtype == jnp.uint32 and "key" in stack.path_name(path[-1:])
        if not (old_kind or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)):
            return x
        return jax.vmap(jax.random.fold_in)(x, jnp.arange(count))

    return jax.tree_util.tree_map_with_path(leaf, states)


def shrink(states: Any, moments: Moments) -> Any:
    """Converts stacked states to the dtypes in which they are stored."""

    def leaf(x):
        # Scalars (step counts, learning rates) use little memory and stay exact.
        wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 2
        small = moments == "bfloat16" and wide and x.ndim > 1
        return x.astype(jnp.bfloat16) if small else x

    return jax.tree.map(leaf, states)


def round_randomly(x: Array, key: PRNGKeyArray) -> Array:
    """Rounds float32 to bfloat16, up or down at random, so that the mean is exact.

    A moving average with decay 0.999 changes by less than the resolution of bfloat16.
    Rounding to nearest would therefore stop it.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    cut = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)


def read(states: Any, index: Array) -> Any:
    """Reads one of the stacked states, in the dtypes in which it is stored."""

    def leaf(x):
        if x.shape[0] == 1:  # XLA would copy the stack for a slice in a loop
            return x[0]
        return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

    return clone_keys(jax.tree.map(leaf, states))  # the step replaces the keys it reads


def widen(optimizer: optax.GradientTransformation, params: Any, state: Any) -> Any:
    """Converts a state to the dtypes of ``optimizer.init``."""
    kinds = jax.eval_shape(optimizer.init, params)

    def leaf(x, kind):
        return x if x.dtype == kind.dtype else x.astype(kind.dtype)

    return jax.tree.map(leaf, state, kinds)


def narrow(new: Any, old: Any, key: PRNGKeyArray | None) -> Any:
    """Converts a new state to the dtypes of the old one, which is stored."""
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
    """Returns the index with a data dependency on all of ``done``.

    A state may be overwritten in place once all values computed from its old value are
    available. XLA does not enforce this order but copies the whole stack. It also
    removes ``jax.lax.optimization_barrier`` before this decision. It cannot detect that
    the number added here is zero.
    """
    for leaf in jax.tree.leaves(done):
        # Reading one entry of a leaf that is split over devices needs communication.
        if leaf.size and placement.plain(leaf):
            first = leaf[(0,) * leaf.ndim].real.astype(jnp.float32)
            bits = jax.lax.bitcast_convert_type(first, jnp.int32)
            zero = jnp.minimum(bits, 0) ^ jnp.maximum(bits, 0) ^ bits
            index = index + zero.astype(index.dtype)
    return index


def write(states: Any, index: Array, new: Any) -> Any:
    """Replaces one stacked state; in place if ``index`` is from :func:`after`."""

    def leaf(x, n):
        if x.shape[0] == 1:
            return n[None]
        return jax.lax.dynamic_update_index_in_dim(x, n, index, 0)

    return jax.tree.map(leaf, states, new)
