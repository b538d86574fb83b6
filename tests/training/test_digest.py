"""The digest of trees against NumPy, and what it must notice."""

import contextlib
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.training import tree_digest


def mix(x):
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def reference(name, array):
    """The digest of ``{name: array}`` for words of 32 bits."""
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    shape = ",".join(map(str, array.shape))
    digest = hashlib.sha256(f"['{name}'] {array.dtype}[{shape}]\n".encode())
    for stream in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344):
        mixed = mix(words ^ mix(index ^ np.uint32(stream)))
        digest.update(np.uint32(mixed.astype(np.uint64).sum() % 2**32).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 4), (0, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint32, np.complex64])
def test_against_numpy(shape, dtype):
    array = np.asarray(100 * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    assert tree_digest({"a": array}) == reference("a", array)
    assert tree_digest({"a": jnp.asarray(array)}) == reference("a", array)


DTYPES = [
    jnp.bool_, jnp.int8, jnp.uint8, jnp.int16, jnp.bfloat16, jnp.float16,
    jnp.float8_e4m3fn, jnp.float64, jnp.int64, jnp.complex128,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_jax_agree_and_each_element_counts(dtype):
    wide = np.dtype(dtype).itemsize >= 8
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        array = np.asarray(np.random.default_rng(0).normal(size=(4, 3)) > 0, dtype)
        digests = {tree_digest(array), tree_digest(jnp.asarray(array))}
        assert len(digests) == 1
        for place in np.ndindex(4, 3):
            other = array.copy()
            other[place] = not bool(other[place])
            digests.add(tree_digest(jnp.asarray(other)))
        assert len(digests) == 13


def test_every_bit_and_every_place_counts():
    array = np.random.default_rng(0).normal(size=40).astype(np.float32)
    seen = {tree_digest(array)}
    for place in range(40):
        for bit in (0, 15, 30, 31):
            other = array.copy()
            other.view(np.uint32)[place] ^= np.uint32(1 << bit)
            seen.add(tree_digest(other))
        seen.add(tree_digest(np.roll(array, place + 1)) if place < 39 else "")
    for i, j in ((0, 1), (3, 30)):  # an exchange, also of numbers of opposite sign
        for sign in (1, -1):
            pair = array.copy()
            pair[j] = sign * pair[i]
            swapped = pair.copy()
            swapped[[i, j]] = pair[[j, i]]
            assert (tree_digest(pair) == tree_digest(swapped)) == (sign == 1)
    assert len(seen) == 1 + 40 * 4 + 39 + 1


def test_paths_dtypes_shapes_and_keys_count():
    zeros = jnp.zeros((2, 3))
    trees = [
        {"a": zeros}, {"b": zeros}, {"a": zeros.reshape(3, 2)}, {"a": zeros.ravel()},
        {"a": zeros.astype(jnp.int32)}, {"a": zeros, "b": None}, [zeros],
        {"a": jax.random.key(0)}, {"a": jax.random.key(1)},
        {"a": jax.random.key_data(jax.random.key(0))},
    ]  # fmt: skip
    found = [tree_digest(tree) for tree in trees]
    assert found[0] == found[5]  # None is no leaf
    assert len(set(found)) == len(trees) - 1
