"""Shardings of arrays, and the mapped axes over which they vary.

JAX records two properties in the type of an array. The first is its sharding, if the
axes of the mesh are Explicit. The second is the set of mapped axes over which it varies
inside ``jax.shard_map`` with ``check_vma=True``. Cotangents, zeros and contractions
must agree with both. The names of these features differ between JAX versions, so no
other module of mtljax uses them.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import AbstractValue
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

Axes: TypeAlias = tuple[str, ...]
Backward: TypeAlias = Literal["auto", "jax", "rewritten"]


def _type(x: Any) -> Any:
    """Returns the type of an array. An abstract value is returned unchanged."""
    return x if isinstance(x, AbstractValue) else jax.typeof(x)


def _varying(x: Any) -> frozenset[str]:
    aval = _type(x)
    found = getattr(aval, "vma", None)
    if found is None:
        found = getattr(getattr(aval, "mat", None), "varying", ())
    return frozenset(found or ())


def varying(tree: Any) -> frozenset[str]:
    """Returns the mapped axes over which a leaf varies. Empty if JAX tracks none."""
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
    """Returns whether the surrounding mapped region records varying axes."""
    return axis in _varying(cast(jnp.zeros(()), (axis,)))


def _explicit_sharding(x: Any) -> NamedSharding | None:
    """Returns the sharding in the type if its mesh has an Explicit axis, else None."""
    sharding = getattr(_type(x), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty:
        return None
    explicit = jax.sharding.AxisType.Explicit in (mesh.axis_types or ())
    return sharding if explicit else None


def explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with Explicit axes in the types of the leaves, else None."""
    for leaf in jax.tree.leaves(tree):
        sharding = _explicit_sharding(leaf)
        if sharding is not None:
            return sharding.mesh
    return None


def plain(tree: Any) -> bool:
    """Returns whether no leaf has an Explicit sharding or varies over a mapped axis."""
    return not varying(tree) and explicit_mesh(tree) is None


def replicated(tree: Any, ndim: int) -> NamedSharding | None:
    """Returns the ``out_sharding`` of a contraction with a replicated result.

    The value is None if all axes are Auto.
    """
    mesh = explicit_mesh(tree)
    return mesh and NamedSharding(mesh, PartitionSpec(*[None] * ndim))


def like(x: Any, y: Any) -> Any:
    """Gives each leaf of ``x`` the varying axes and the Explicit sharding of ``y``."""

    def leaf(x, y):
        if getattr(x, "dtype", None) == jax.dtypes.float0:
            return x
        wanted = _explicit_sharding(y)
        if wanted is not None and _type(x).sharding != wanted:
            x = jax.sharding.reshard(x, wanted)
        return cast(x, _varying(y))

    return jax.tree.map(leaf, x, y)


def zeros(aval: Any) -> Any:
    """Builds zeros with the shape, dtype, varying axes and sharding of a type."""
    return like(jnp.zeros(aval.shape, aval.dtype), aval)


def free(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function(*args)`` with a replicated result if an argument is Explicit.

    The function may reshape and slice without naming shardings, because the compiler
    chooses the shardings inside it.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    return _auto(function, NamedSharding(mesh, PartitionSpec()))(*args)


def _auto(function: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
    """Runs a function with Auto axes in place of the Explicit axes of a mesh.

    Other axes are unchanged. Axes of ``shard_map`` are Manual and must remain so.
    """
    mesh = sharding.mesh
    axes = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Explicit
    )
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)


def like_first(function: Callable[..., Any], x: Any, *args: Any) -> Any:
    """Calls ``function(x, *args)`` with the sharding of ``x`` if that is Explicit.

    Use it to read or write at an index along an axis that is not sharded.
    """
    sharding = _explicit_sharding(x)
    if sharding is None:
        return function(x, *args)
    return _auto(function, sharding)(x, *args)


def divisible(x: Any, length: int) -> Any:
    """Replicates axis 0 if it is Explicit and its devices do not divide ``length``."""
    sharding = _explicit_sharding(x)
    if sharding is None:
        return x
    devices = x.shape[0] // sharding.shard_shape(x.shape)[0]
    if length % devices == 0:
        return x
    spec = PartitionSpec(None, *sharding.spec[1:])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def total(tree: Any, axes: Axes) -> Any:
    """Sums every leaf over mapped axes, after marking it as varying."""
    return jax.lax.psum(cast(tree, axes), axes) if axes else tree


def largest(x: Any, axes: Axes) -> Any:
    """Returns the largest value over mapped axes."""
    return jax.lax.pmax(cast(x, axes), axes) if axes else x


def agreed(flag: Any, state: Any) -> Any:
    """Returns True only if the flag is True on all devices that share a state.

    In a mapped region, each device checks its own losses and its part of the gradients.
    A state that is equal on all devices must be kept or replaced on all of them.
    """
    axes = tuple(sorted(_varying(flag) - varying(state)))
    return total((~flag).astype(jnp.int32), axes) == 0 if axes else flag


def gathered(x: Any, axes: Axes, axis: int) -> Any:
    """Concatenates the parts of all devices along an axis of the array."""
    if not axes:
        return x
    return jax.lax.all_gather(cast(x, axes), axes, axis=axis, tiled=True)


def scattered(x: Any, axes: Axes, axis: int) -> Any:
    """Sums over the devices. Each device keeps one part along an axis."""
    return jax.lax.psum_scatter(cast(x, axes), axes, scatter_dimension=axis, tiled=True)


def assembled(x: Any, axes: Axes) -> Any:
    """Concatenates the parts of all devices along axis 0, as an invarying array."""
    try:
        return jax.lax.all_gather(x, axes, tiled=True, to="invarying")  # pyright: ignore[reportCallIssue]
    except TypeError:
        # In JAX 0.7 no gather has a result that is marked as equal on all devices.
        at = jax.lax.axis_index(axes) * x.shape[0]
        shape = (x.shape[0] * size(axes), *x.shape[1:])
        whole = cast(jnp.zeros(shape, x.dtype), axes)
        return total(jax.lax.dynamic_update_slice_in_dim(whole, x, at, 0), axes)


def size(axes: Axes) -> int:
    """Returns the number of devices along mapped axes."""
    found = 1
    for axis in axes:
        found *= jax.lax.axis_size(axis)
    return found


def constrain(tree: Any, shardings: Any, *, stacked: bool = False) -> Any:
    """Applies ``grad_shardings``. With ``stacked`` the task axis is replicated."""
    if shardings is None:
        return tree

    def leaf(x, sharding):
        if isinstance(sharding, SingleDeviceSharding):
            return x  # on one device there is nothing to divide
        if stacked:
            spec = PartitionSpec(None, *sharding.spec)
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(leaf, tree, shardings)


def rewrites(backward: Backward, tree: Any) -> bool:
    """Returns whether backward passes are rewritten for XLA:CPU.

    Raises:
      ValueError: If ``backward="rewritten"`` is requested on another backend, with
        Explicit shardings, or in a mapped region.
    """
    on_cpu = jax.default_backend() == "cpu"
    if backward == "rewritten" and not (on_cpu and plain(tree)):
        raise ValueError(
            "backward='rewritten' requires one CPU device. The backend is "
            f"{jax.default_backend()!r}, or the parameters have Explicit shardings or "
            "vary over a mapped axis. Use backward='auto' or 'jax'."
        )
    if backward != "auto":
        return backward == "rewritten"
    return on_cpu and jax.device_count() == 1 and plain(tree)
