"""Digests of pytrees that are independent of devices and processes."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from mtljax.training._hosts import is_key

_STREAMS = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # digits of pi


def tree_spec(tree: PyTree) -> dict[str, str]:
    """Returns ``dtype[shape]`` of each leaf by its path.

    Examples:
      >>> tree_spec({"w": jnp.zeros((2, 3)), "key": jax.random.key(0)})
      {"['key']": 'key<fry>[]', "['w']": 'float32[2,3]'}
    """
    spec = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        shape = ",".join(map(str, array.shape))
        spec[jax.tree_util.keystr(path)] = f"{array.dtype}[{shape}]"
    return spec


def _mix(x):
    """A bijection of 32-bit words that mixes their bits (finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(array):
    """Returns the bits of an array as 32-bit words. 64-bit types use an extra axis."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], -1)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if jnp.issubdtype(array.dtype, jnp.integer) and array.dtype.itemsize == 1:
        array = array.astype(jnp.int8)  # also converts 4-bit integers
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, kind).astype(jnp.uint32)


def _sums(array):
    """Computes four sums over all words modulo 2^32, each mixed with its position.

    A change of a single word always changes each sum. Integer sums do not depend on
    their order. They therefore do not depend on the sharding of the array.
    """

    def sums(array):
        words = _words(array)
        index, stride = jnp.zeros((), jnp.uint32), 1
        for axis in reversed(range(words.ndim)):
            place = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            index = index + place * np.uint32(stride % 2**32)
            stride *= words.shape[axis]
        mixed = [_mix(words ^ _mix(index ^ np.uint32(s))) for s in _STREAMS]
        return jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in mixed])

    sharding = jax.typeof(array).sharding
    if AxisType.Explicit in getattr(sharding.mesh, "axis_types", ()):
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.sharding.auto_axes(sums, out_sharding=replicated)(array)
    return sums(array)


@functools.lru_cache(maxsize=16)
def _compiled(mesh: Any):
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(_sums, out_shardings=replicated)


def _leaf_sums(leaf: Any):
    if is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        if leaf.dtype.itemsize >= 8:  # jax would truncate 64 bits to 32
            leaf = np.ascontiguousarray(leaf).reshape(-1).view(np.uint32)
    sharding = getattr(leaf, "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return _compiled(mesh)(leaf)


def tree_digest(tree: PyTree) -> str:
    """Computes a digest of the paths, dtypes, shapes and bits of all leaves.

    The digest is computed on the devices of the arrays. It is equal for all shardings,
    numbers of devices and numbers of processes. It detects errors, but does not protect
    against deliberate changes.

    Args:
      tree: JAX or NumPy arrays, including typed keys.

    Returns:
      A string of 64 hexadecimal digits.

    Examples:
      >>> import jax.numpy as jnp, numpy as np
      >>> from mtljax.training import tree_digest
      >>> a = tree_digest({"w": jnp.zeros(3)})
      >>> a == tree_digest({"w": np.zeros(3, np.float32)})
      True
      >>> a == tree_digest({"w": jnp.zeros(3).at[1].set(1e-45)})
      False
    """
    digest = hashlib.sha256()
    for name, text in tree_spec(tree).items():
        digest.update(f"{name} {text}\n".encode())
    for sums in jax.device_get([_leaf_sums(leaf) for leaf in jax.tree.leaves(tree)]):
        digest.update(np.asarray(sums, "<u4").tobytes())
    return digest.hexdigest()
