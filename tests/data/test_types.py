"""Datasets: consistency, checksum, scaling."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.data import DataError, Dataset, Task, checksum, to_float


def make(**changes):
    split = {
        "image": np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1),
        "left": np.array([3, 1], np.int32),
    }
    fields = {"train": split, "val": split, "test": split} | changes
    return Dataset("set", (Task("left", "classification", 10),), (4, 4, 1), **fields)


def test_checksum_sees_every_array_and_nothing_else():
    dataset = make()
    assert checksum(dataset) == checksum(make())
    assert checksum(dataset) == checksum(dataclasses.replace(dataset, notes="new"))
    for split in ("train", "val", "test"):
        arrays = {k: v.copy() for k, v in getattr(dataset, split).items()}
        arrays["left"][1] = 2
        assert checksum(make(**{split: arrays})) != checksum(dataset)


def test_checksum_does_not_depend_on_memory_layout():
    image = make().train["image"]
    strided = np.asfortranarray(image)
    big_endian = make().train["left"].astype(">i4")
    other = make(train={"left": big_endian, "image": strided})
    assert checksum(other) == checksum(make())


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"image": np.zeros((2, 4, 4, 1))}, "its tasks ask for"),
        ({"image": np.zeros((2, 5, 4, 1)), "left": np.zeros(2)}, "have shape"),
        ({"image": np.zeros((2, 4, 4, 1)), "left": np.zeros(3)}, "differ in length"),
    ],
)
def test_inconsistent_splits_are_refused(split, message):
    with pytest.raises(DataError, match=f"val split of 'set'.*{message}"):
        make(val=split)


def test_to_float_in_numpy_and_in_jit():
    images = np.array([[0, 128, 255]], np.uint8)
    scaled = to_float(images)
    assert isinstance(scaled, np.ndarray)
    assert scaled.dtype == np.float32
    assert scaled.max() == 1
    jitted = jax.jit(to_float)(jnp.asarray(images))
    assert jitted.dtype == jnp.float32
    np.testing.assert_allclose(jitted, scaled, rtol=1e-6)
