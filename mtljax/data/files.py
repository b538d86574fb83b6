"""Reading and writing image files: IDX (plain or gzipped) and ``.npz``."""

import gzip
import math
import os
import pathlib
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from mtljax.data.types import DataError, MissingDataError

Path = str | os.PathLike[str]

_IDX_DTYPES = {
    0x08: np.dtype("u1"),
    0x09: np.dtype("i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_IDX_NAMES = (  # of MNIST and of every set that copies its format
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


class ImageParts(NamedTuple):
    """A labelled image set with its two official parts.

    Attributes:
      train_images: ``[N, H, W]``, uint8.
      train_labels: ``[N]``, int32.
      test_images: ``[M, H, W]``, uint8.
      test_labels: ``[M]``, int32.
    """

    train_images: UInt8[np.ndarray, "n h w"]
    train_labels: Integer[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m h w"]
    test_labels: Integer[np.ndarray, " m"]


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file, the format of MNIST; gzip is recognised by its first bytes.

    No more is decompressed than the header announces, so a hostile file cannot fill
    the memory beyond the size it declares and has the bytes for.

    Args:
      path: File to read.

    Returns:
      The array, in the byte order of the machine.

    Raises:
      MissingDataError: If there is no such file.
      DataError: If the header is not IDX, or the data are shorter or longer than the
        header says, or the gzip stream is damaged.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from mtljax.data import read_idx, write_idx
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "a-idx1-ubyte.gz")
      ...     write_idx(path, np.arange(3, dtype=np.uint8))
      ...     read_idx(path)
      array([0, 1, 2], dtype=uint8)

    References:
      LeCun, Cortes and Burges, `The MNIST database of handwritten digits
      <http://yann.lecun.com/exdb/mnist/>`_, section "File formats".
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise MissingDataError(f"There is no file {str(path)!r}.")
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                return _parse_idx(raw, path)
            with gzip.open(raw) as stream:
                return _parse_idx(stream, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"File {str(path)!r} is a damaged gzip file ({error}); fetch it again."
        ) from error


def _parse_idx(stream, path: pathlib.Path) -> np.ndarray:
    header = stream.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in _IDX_DTYPES:
        raise DataError(
            f"File {str(path)!r} is not an IDX file: it starts with {header!r}."
        )
    dtype, ndim = _IDX_DTYPES[header[2]], header[3]
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"File {str(path)!r} ends inside its IDX header.")
    shape = struct.unpack(f">{ndim}I", sizes)
    expected = math.prod(shape) * dtype.itemsize
    data = bytearray()
    while len(data) <= expected:  # in pieces: memory follows the bytes that exist
        piece = stream.read(min(1 << 24, expected + 1 - len(data)))
        if not piece:
            break
        data += piece
    if len(data) != expected:
        found = "more" if len(data) > expected else f"only {len(data)}"
        raise DataError(
            f"File {str(path)!r} announces an array of shape {shape}, {expected} "
            f"bytes, and holds {found}; fetch it again."
        )
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes an array as an IDX file, gzipped when the name ends in ``.gz``.

    Args:
      path: File to write.
      array: uint8, int8, int16, int32, float32 or float64.

    Raises:
      DataError: If IDX has no code for the type of the array.

    Examples:
      See :func:`read_idx`.
    """
    codes = {dtype.newbyteorder("="): code for code, dtype in _IDX_DTYPES.items()}
    code = codes.get(array.dtype.newbyteorder("="))
    if code is None:
        raise DataError(f"IDX cannot hold arrays of type {array.dtype.name}.")
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    data = header + array.astype(_IDX_DTYPES[code], copy=False).tobytes()
    if str(path).endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    pathlib.Path(path).write_bytes(data)


def _read_npz(path: pathlib.Path) -> tuple[np.ndarray, ...]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            missing = [key for key in _NPZ_KEYS if key not in file]
            if missing:
                raise DataError(
                    f"File {str(path)!r} holds {sorted(file)}; it lacks {missing}."
                )
            return tuple(file[key] for key in _NPZ_KEYS)
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        raise DataError(
            f"File {str(path)!r} is not a readable .npz file ({error})."
        ) from error


def read_images(data_dir: Path, name: str) -> ImageParts:
    """Reads a labelled image set in the layout of MNIST from ``data_dir/name``.

    The folder holds the four IDX files of MNIST (``train-images-idx3-ubyte``,
    ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``,
    ``t10k-labels-idx1-ubyte``; each plain or with ``.gz``), or else ``name.npz`` or
    ``name_subset.npz`` with arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``
    (the keys of Keras's ``mnist.npz``). IDX wins when both are there.

    Args:
      data_dir: Folder that holds one folder per set.
      name: ``"mnist"``, ``"fashion_mnist"``, or any other set stored alike.

    Returns:
      Images ``[N, H, W]`` uint8 and labels ``[N]`` int32 of both parts.

    Raises:
      MissingDataError: If the folder or one of the files is not there.
      DataError: If a file is damaged, or images and labels do not fit together.

    Examples:
      >>> from mtljax.data import read_images
      >>> read_images("nowhere", "mnist")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: No mnist files below 'nowhere': ...
    """
    folder = pathlib.Path(data_dir) / name
    idx = [_first(folder / f"{file}.gz", folder / file) for file in _IDX_NAMES]
    npz = _first(folder / f"{name}.npz", folder / f"{name}_subset.npz")
    if npz is not None and None in idx:
        arrays = _read_npz(npz)
    else:
        missing = [
            f"{file}.gz"
            for file, path in zip(_IDX_NAMES, idx, strict=True)
            if path is None
        ]
        if missing:
            raise MissingDataError(
                f"No {name} files below {os.fspath(data_dir)!r}: pass "
                f"--data-dir DIR with DIR/{name}/{missing[0]}"
                f"{_and_more(len(missing) - 1)} (or DIR/{name}/{name}.npz with arrays "
                f"{', '.join(_NPZ_KEYS)}), or read it from tensorflow-datasets with "
                "--source tfds --download."
            )
        arrays = tuple(read_idx(path) for path in idx if path is not None)
    return check_parts(name, *arrays)


def _first(*paths: pathlib.Path) -> pathlib.Path | None:
    return next((path for path in paths if path.is_file()), None)


def _and_more(count: int) -> str:
    return f" and the {count} other IDX files" if count > 1 else ""


def check_parts(
    name: str,
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
) -> ImageParts:
    """Checks that images are ``[N, H, W]`` uint8 and labels are N small integers."""
    parts = [(train_images, train_labels), (test_images, test_labels)]
    for (images, labels), part in zip(parts, ("training", "test"), strict=True):
        if images.ndim != 3 or images.dtype != np.uint8:
            raise DataError(
                f"The {part} images of {name} must be uint8 of shape [N, H, W], not "
                f"{images.dtype.name} of shape {list(images.shape)}."
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise DataError(
                f"The {part} part of {name} has {len(images)} images and labels of "
                f"shape {list(labels.shape)} and type {labels.dtype.name}; it needs "
                "one integer per image."
            )
        if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
            raise DataError(
                f"The {part} labels of {name} must be classes 0 to 9, at least one."
            )
    return ImageParts(
        train_images,
        train_labels.astype(np.int32),
        test_images,
        test_labels.astype(np.int32),
    )
