"""Shardings and varying axes of values: the only module that knows about them.

JAX records two facts in the type of an array: its sharding, if the axes of the mesh are
Explicit, and the mapped axes over which it varies, inside ``jax.shard_map`` with
``check_vma=True``. Cotangents, zeros and contractions have to agree with both. The
names of these features differ between JAX versions; no other module of mtljax uses
them.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import AbstractValue
from jax.sharding import NamedSharding, PartitionSpec

Axes: TypeAlias = tuple[str, ...]
Backward: TypeAlias = Literal["auto", "jax", "rewritten"]


def _type(x: Any) -> Any:
    """The type of an array, or an abstract value itself."""
    return x if isinstance(x, AbstractValue) else jax.typeof(x)


def _varying(x: Any) -> frozenset[str]:
    aval = _type(x)
    found = getattr(aval, "vma", None)
    if found is None:
        found = getattr(getattr(aval, "mat", None), "varying", ())
    return frozenset(found or ())


def varying(tree: Any) -> frozenset[str]:
    """The mapped axes over which some leaf varies; empty if nothing tracks them."""
    return frozenset().union(*map(_varying, jax.tree.leaves(tree)))


def cast(tree: Any, axes: Any) -> Any:
    """Marks every leaf as varying over the given axes, without communication."""

    def leaf(x):
        missing = tuple(sorted(frozenset(axes) - _varying(x)))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]

    return jax.tree.map(leaf, tree) if axes else tree


def tracks(axis: str) -> bool:
    """Whether the surrounding mapped region records varying axes."""
    return axis in _varying(cast(jnp.zeros(()), (axis,)))


def _explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type, if it names an Explicit axis of a mesh."""
    sharding = getattr(_type(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return None
    explicit = jax.sharding.AxisType.Explicit in (mesh.axis_types or ())
    return sharding if explicit else None


def explicit_mesh(tree: Any) -> Any:
    """The mesh with Explicit axes in the types of the leaves; None if there is none."""
    for leaf in jax.tree.leaves(tree):
        sharding = _explicit_sharding(leaf)
        if sharding is not None:
            return sharding.mesh
    return None


def plain(tree: Any) -> bool:
    """Whether no leaf has an Explicit sharding or varies over a mapped axis."""
    return not varying(tree) and explicit_mesh(tree) is None


def replicated(tree: Any, ndim: int) -> NamedSharding | None:
    """The ``out_sharding`` of a contraction with a replicated result; None if Auto."""
    mesh = explicit_mesh(tree)
    return mesh and NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def like(x: Any, y: Any) -> Any:
    """``x`` with the varying axes and the Explicit sharding of ``y``, leaf by leaf."""

    def leaf(x, y):
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            return x
        wanted = _explicit_sharding(y)
        if wanted is not None and _type(x).sharding != wanted:
            x = jax.sharding.reshard(x, wanted)
        return cast(x, _varying(y))

    return jax.tree.map(leaf, x, y)


def zeros(aval: Any) -> Any:
    """Zeros with shape, dtype, varying axes and Explicit sharding of a type."""
    return like(jnp.zeros(aval.shape, aval.dtype), aval)


def free(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, with a replicated result if an argument is Explicit.

    The function may reshape and slice without a word about shardings: the compiler
    chooses them inside.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.sharding.auto_axes(function, out_sharding=sharding)(*args)


def like_first(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """``function(x, *args)``, whose result lies as ``x`` does if that is Explicit.

    For indexing along an axis that is not sharded, and writing there.
    """
    sharding = _explicit_sharding(x)
    if sharding is None:
        return function(x, *args)
    free_function = jax.sharding.auto_axes(function, out_sharding=sharding)
    return free_function(x, *args)


def total(tree: Any, axes: Axes) -> Any:
    """Sums over mapped axes; every leaf is marked as varying first."""
    return jax.lax.psum(cast(tree, axes), axes) if axes else tree


def largest(x: Any, axes: Axes) -> Any:
    """The largest value over mapped axes."""
    return jax.lax.pmax(cast(x, axes), axes) if axes else x


def agreed(flag: Any, state: Any) -> Any:
    """The flag, set only if it is set on all devices that share a state.

    In a mapped region a device judges its own losses and its part of the gradients. A
    state that is equal on all devices has to be kept or replaced on all of them.
    """
    axes = tuple(sorted(_varying(flag) - varying(state)))
    return total((~flag).astype(jnp.int32), axes) == 0 if axes else flag


def gathered(x: Any, axes: Axes, axis: int) -> Any:
    """The parts of all devices along an axis of the array."""
    if not axes:
        return x
    return jax.lax.all_gather(cast(x, axes), axes, axis=axis, tiled=True)


def scattered(x: Any, axes: Axes, axis: int) -> Any:
    """The sum over the devices, of which each keeps a part along an axis."""
    return jax.lax.psum_scatter(cast(x, axes), axes, scatter_dimension=axis, tiled=True)


def assembled(x: Any, axes: Axes) -> Any:
    """The parts of all devices along the first axis, known to be equal everywhere."""
    try:
        return jax.lax.all_gather(x, axes, tiled=True, to="invarying")  # pyright: ignore[reportCallIssue]
    except TypeError:
        # JAX 0.7 has no gather whose result is known to be the same on all devices.
        at = jax.lax.axis_index(axes) * x.shape[0]
        shape = (x.shape[0] * size(axes), *x.shape[1:])
        whole = cast(jnp.zeros(shape, x.dtype), axes)
        return total(jax.lax.dynamic_update_slice_in_dim(whole, x, at, 0), axes)


def size(axes: Axes) -> int:
    """Number of devices along mapped axes."""
    found = 1
    for axis in axes:
        found *= jax.lax.axis_size(axis)
    return found


def constrain(tree: Any, shardings: Any, *, stacked: bool = False) -> Any:
    """Applies ``grad_shardings``, with the task axis replicated if stacked."""
    if shardings is None:
        return tree

    def leaf(x, sharding):
        if stacked:
            spec = PartitionSpec(None, *sharding.spec)
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(leaf, tree, shardings)


def rewrites(backward: Backward, tree: Any) -> bool:
    """Whether backward passes are rewritten for XLA:CPU.

    Raises:
      ValueError: If ``"rewritten"`` is asked for and cannot be done.
    """
    on_cpu = jax.default_backend() == "cpu"
    if backward == "rewritten" and not (on_cpu and plain(tree)):
        raise ValueError(
            "backward='rewritten' rewrites passes for one CPU device; the backend is "
            f"{jax.default_backend()!r}, or the parameters have Explicit shardings or "
            "vary over a mapped axis. Use backward='auto' or 'jax'."
        )
    if backward != "auto":
        return backward == "rewritten"
    return on_cpu and jax.device_count() == 1 and plain(tree)
