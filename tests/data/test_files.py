"""IDX and npz files: what is read back, and what is said of a damaged one."""

import gzip
import struct

import numpy as np
import pytest

from mtljax.data import (
    DataError,
    MissingDataError,
    checksum,
    load,
    read_idx,
    read_images,
    write_idx,
)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("name", ["a-idx", "a-idx.gz"])
def test_idx_round_trip(tmp_path, dtype, name):
    array = np.random.default_rng(0).integers(0, 99, (5, 3, 2)).astype(dtype)
    write_idx(tmp_path / name, array)
    read = read_idx(tmp_path / name)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_idx_header_is_the_published_one(tmp_path):
    write_idx(tmp_path / "labels", np.array([7, 2], np.uint8))
    expected = struct.pack(">II", 2049, 2) + b"\x07\x02"  # magic number of MNIST labels
    assert (tmp_path / "labels").read_bytes() == expected


def damaged(kind: str) -> bytes:
    good = struct.pack(">BBBBII", 0, 0, 8, 2, 3, 4) + bytes(range(12))
    zipped = gzip.compress(good, mtime=0)
    return {
        "empty": b"",
        "text": b"<html>not here</html>",
        "unknown type": b"\0\0\x07\x01" + bytes(8),
        "short header": good[:7],
        "short data": good[:-1],
        "long data": good + b"x",
        "huge": struct.pack(">BBBBIII", 0, 0, 8, 3, 2**31, 2**31, 2**31) + b"abc",
        "short gzip": zipped[:-9],
        "bad checksum": zipped[:-8] + bytes(8),
        "bad stream": zipped[:12] + bytes(10) + zipped[22:],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is not an IDX file"),
        ("text", "is not an IDX file: it starts with b'<htm'"),
        ("unknown type", "is not an IDX file"),
        ("short header", "ends inside its IDX header"),
        ("short data", r"shape \(3, 4\), 12 bytes, and holds only 11; fetch it again"),
        ("long data", "holds more"),
        ("huge", "holds only 3"),
        ("short gzip", "is a damaged gzip file"),
        ("bad checksum", "is a damaged gzip file"),
        ("bad stream", "is a damaged gzip file"),
    ],
)
def test_damaged_idx(tmp_path, kind, message):
    (tmp_path / "file").write_bytes(damaged(kind))
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


def test_missing_and_unwritable(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_idx(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot hold arrays of type int64"):
        write_idx(tmp_path / "file", np.arange(3, dtype=np.int64))


def copy_as_npz(fake_data_dir, tmp_path, **changes):
    parts = read_images(fake_data_dir, "mnist")
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays = dict(zip(keys, parts, strict=True)) | changes
    (tmp_path / "mnist").mkdir()
    path = tmp_path / "mnist" / "mnist.npz"
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


def test_idx_and_npz_make_the_same_set(fake_data_dir, tmp_path):
    copy_as_npz(fake_data_dir, tmp_path)
    one, two = (
        load("multi_mnist", data_dir=path) for path in (fake_data_dir, tmp_path)
    )
    assert checksum(one) == checksum(two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"it lacks \['y_test'\]"),
        (
            {"y_train": np.zeros(3, int)},
            r"'y_train' has shape \[3\], not \[240\]",
        ),
        (
            {"y_test": np.full(50, 10)},
            "values from 10 to 10, not from 0 to 9",
        ),
        (
            {"x_test": np.zeros((50, 28, 28))},
            "'x_test' has type float64, not uint8",
        ),
        ({"x_train": np.array([None])}, "array 'x_train' holds Python objects"),
    ],
)
def test_npz_with_wrong_contents(fake_data_dir, tmp_path, changes, message):
    copy_as_npz(fake_data_dir, tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path, "mnist")


def test_truncated_npz(fake_data_dir, tmp_path):
    path = copy_as_npz(fake_data_dir, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"is not a readable \.npz file"):
        read_images(tmp_path, "mnist")


def test_one_of_the_files_is_missing(fake_data_dir, tmp_path):
    (tmp_path / "mnist").mkdir()
    for path in (fake_data_dir / "mnist").iterdir():
        if "t10k-labels" not in path.name:
            (tmp_path / "mnist" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        MissingDataError, match=r"DIR/mnist/t10k-labels-idx1-ubyte.gz \("
    ):
        read_images(tmp_path, "mnist")
