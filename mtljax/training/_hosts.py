"""Meshes and processes: placement, and agreement between processes."""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtljax.training import errors

T = TypeVar("T")


class Placement(NamedTuple):
    """Hashable description of the placement of the state, batches and metrics."""

    mesh: Mesh
    structure: Any  # tree structure of the state
    shardings: tuple[NamedSharding, ...]  # one per leaf of the state
    batch: NamedSharding

    @property
    def explicit(self) -> bool:
        """Whether shardings are part of the types."""
        return AxisType.Explicit in self.mesh.axis_types

    @property
    def replicated(self) -> NamedSharding:
        """Sharding that replicates an array on all devices."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def outputs(self) -> tuple[Any, NamedSharding]:
        """Shardings of ``(state, metrics)``."""
        return jax.tree.unflatten(self.structure, self.shardings), self.replicated


def mesh_of(tree: PyTree) -> Mesh | None:
    """Returns the mesh of the first leaf that has one."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
            mesh = sharding.mesh
            return mesh if isinstance(mesh, Mesh) else None
    return None


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf is an array of typed keys."""
    return jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)


def place(mesh: Mesh | None, tree: PyTree, spec: PartitionSpec | None = None) -> PyTree:
    """Puts leaves without a mesh onto ``mesh``, by default replicated.

    All processes pass the same values. If ``mesh`` is None, the leaves are put on the
    default device.
    """

    def put(leaf):
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf
        if mesh is None:
            return jax.device_put(leaf)
        if is_key(leaf):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, spec or PartitionSpec())
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    with jax.transfer_guard("allow"):
        return jax.tree.map(put, tree)


@functools.lru_cache(maxsize=16)
def _replicate(mesh: Mesh):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def fetch(tree: PyTree) -> PyTree:
    """Returns host copies, also of arrays on devices of other processes."""

    def whole(leaf):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not leaf.is_fully_addressable:
            return _replicate(sharding.mesh)(leaf)
        return leaf

    return jax.device_get(jax.tree.map(whole, tree))


def is_main() -> bool:
    """Returns whether this process writes, deletes and decides."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """Returns the plain-JSON values of all processes, in order, on all processes."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(np.max(sizes)) - len(text)))
    rows = np.asarray(multihost_utils.process_allgather(padded)).astype(np.uint8)
    pairs = zip(rows, np.ravel(sizes), strict=True)
    return [json.loads(row[:size].tobytes()) for row, size in pairs]


def on_main(function: Callable[[], T]) -> T:
    """Runs a function in the main process. All processes get its value or its error."""
    if jax.process_count() == 1:
        return function()
    value, error = None, None
    if is_main():
        try:
            value = function()
        except (errors.TrainingError, ValueError, OSError) as caught:
            error = caught
    found = gather([value, error and [type(error).__name__, str(error)]])[0]
    if error is not None:
        raise error
    if found[1] is not None:
        kind = getattr(errors, found[1][0], ValueError)
        raise kind(found[1][1])
    return found[0]


def boundary(signal: int | None, limit: int) -> tuple[int | None, int]:
    """Returns the signal of any process and the chunk length of the main process."""
    both = gather([signal, limit])
    return max(number or 0 for number, _ in both) or None, both[0][1]
