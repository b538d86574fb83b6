"""tensorflow-datasets without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from mtljax.data import (
    Dataset,
    MissingDataError,
    Task,
    load,
    save_tfds,
    stream,
    tfds_source,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    digits = load("multidigits", train_size=150, val_size=0, test_size=10)
    return digits, folder, save_tfds(digits, folder, version="2.0.1")


def test_written_set_is_read_back_in_order(saved):
    digits, folder, path = saved
    assert path == folder / "multidigits" / "2.0.1"
    for split, size in (("train", 150), ("test", 10)):
        rows = tfds_source("multidigits", split, data_dir=folder)
        assert len(rows) == size
        for i, row in enumerate(rows.__getitems__(range(size))):
            for key, array in getattr(digits, split).items():
                np.testing.assert_array_equal(row[key], array[i])


def test_written_set_streams_like_the_arrays(saved):
    digits, folder, _ = saved
    rows = stream(tfds_source("multidigits", "train", data_dir=folder), 32, seed=0)
    arrays = stream(digits.train, 32, seed=0)
    for _ in range(6):
        one, two = next(rows), next(arrays)
        for key in digits.train:
            np.testing.assert_array_equal(one[key], two[key])


def test_a_folder_that_holds_tfds_will_do(saved, tmp_path):
    (tmp_path / "tfds").symlink_to(saved[1])
    assert len(tfds_source("multidigits", "train[:10]", data_dir=tmp_path)) == 10


def test_set_that_is_not_there(tmp_path):
    with pytest.raises(MissingDataError, match=r"no 'mnist' prepared.*--download"):
        tfds_source("mnist", "train", data_dir=tmp_path)
    with pytest.raises(MissingDataError, match=r"no 'no_such_set' prepared"):
        tfds_source("no_such_set", "train", data_dir=tmp_path)


def test_mock_catalogue(mock_catalogue):
    rows = tfds_source("fashion_mnist", "train")
    batch = next(stream(rows, 4, seed=0))
    assert batch["image"].shape == (4, 28, 28, 1)
    assert batch["label"].shape == (4,)


def test_heavy_packages_are_imported_when_needed():
    heavy = "sklearn", "grain", "tensorflow_datasets", "tensorflow", "orbax"
    code = f"import sys, mtljax.data; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_label_maps_are_written_and_read_back(tmp_path):
    rng = np.random.default_rng(0)

    def split(n):
        return {
            "image": rng.integers(0, 255, (n, 4, 5, 3)).astype(np.uint8),
            "segmentation": rng.integers(0, 3, (n, 4, 5)).astype(np.int32),
            "depth": rng.random((n, 4, 5)).astype(np.float32),
        }

    tasks = (Task("segmentation", "segmentation", 3), Task("depth", "regression", 1))
    frames = Dataset("frames", tasks, (4, 5, 3), split(3), split(0), split(2))
    save_tfds(frames, tmp_path)
    rows = tfds_source("frames", "train", data_dir=tmp_path)
    for i, row in enumerate(rows.__getitems__(range(3))):
        for key, array in frames.train.items():
            np.testing.assert_array_equal(row[key], array[i])
            assert row[key].dtype == array.dtype
