"""Readers of data files with checks: npz, IDX, CSV, PNG and gzip.

Each reader compares the names, shapes, types and declared sizes of arrays with a table
of :class:`Field`, before it allocates memory. It compares their values afterwards. An
error is one sentence in a :class:`~mtljax.data.DataError`.
"""

import ast
import contextlib
import csv
import gzip
import io
import lzma
import math
import os
import pathlib
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

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
_IDX_NAMES = (  # of MNIST and of all sets in its format
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_DEFLATE = 1032  # maximum number of bytes that one compressed byte can expand to
_PIECE = 1 << 24
_MOST_BYTES = 1 << 34  # of one array, or of one table
_FAULTS = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, IndexError, SyntaxError),
    *(RuntimeError, MemoryError, OverflowError, NotImplementedError, AssertionError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, csv.Error),
)
"""Exceptions of the standard library, numpy and Pillow for a damaged file."""


class Field(NamedTuple):
    """Requirements on an array of a file.

    Attributes:
      kind: ``"uint8"``, ``"integer"``, ``"real"`` (finite, also in float32) or
        ``"text"``.
      shape: For each axis a number or a name. Axes with the same name, also in
        different arrays of a file, have the same size, which is at least 1.
      low: Smallest value.
      high: Largest value.
      missing: Value of a missing label. It may be outside the bounds. Each column
        (along the last axis of a matrix) must have a label that is not missing.
    """

    kind: Literal["uint8", "integer", "real", "text"]
    shape: tuple[int | str, ...]
    low: float = -math.inf
    high: float = math.inf
    missing: int | None = None


class ImageParts(NamedTuple):
    """A labelled image set with its two official parts.

    Attributes:
      train_images: Images ``[N, H, W]``, uint8.
      train_labels: Labels ``[N]``, int32.
      test_images: Images ``[M, H, W]``, uint8.
      test_labels: Labels ``[M]``, int32.
    """

    train_images: UInt8[np.ndarray, "n h w"]
    train_labels: Integer[np.ndarray, " n"]
    test_images: UInt8[np.ndarray, "m h w"]
    test_labels: Integer[np.ndarray, " m"]


def find(data_dir: Path | None, name: str, file: str) -> pathlib.Path:
    """Returns the path ``data_dir/name/file``.

    Raises:
      MissingDataError: If no folder is given, or the file does not exist.
    """
    advice = f"pass --data-dir DIR with DIR/{name}/{file}."
    if data_dir is None:
        raise MissingDataError(f"The {name} files are needed: {advice}")
    path = pathlib.Path(data_dir) / name / file
    if not path.is_file():
        raise MissingDataError(f"File {str(path)!r} does not exist: {advice}")
    return path


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Converts each error of a damaged file to one sentence."""
    if not pathlib.Path(path).is_file():
        raise MissingDataError(f"File {str(path)!r} does not exist.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"File {str(path)!r} may not be read.") from error
    except _FAULTS as error:
        text = f"is not a readable {kind} file"
        if isinstance(error, gzip.BadGzipFile | zlib.error | EOFError):
            text = "is a damaged gzip file" if kind in ("IDX", "CSV") else text
        raise DataError(f"File {str(path)!r} {text}; fetch it again.") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file and recognises gzip by its first two bytes."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if zipped:
            with gzip.open(raw) as stream:
                yield stream
        else:
            yield raw


def _read_bytes(stream: Any, most: int) -> bytearray:
    """Reads at most ``most + 1`` bytes in pieces, so that memory follows the file."""
    data = bytearray()
    while len(data) <= most:
        piece = stream.read(min(_PIECE, most + 1 - len(data)))
        if not piece:
            break
        data += piece
    return data


def check_layout(
    where: str,
    field: Field,
    dtype: np.dtype,
    shape: tuple[int, ...],
    sizes: dict[str, int],
) -> None:
    """Compares type and shape with a field. ``sizes`` collects the named axes.

    Raises:
      DataError: If they differ. The message starts with ``where``.
    """
    kinds = {"uint8": "u", "integer": "iu", "real": "iuf", "text": "U"}[field.kind]
    if dtype.kind not in kinds or (field.kind == "uint8" and dtype.itemsize != 1):
        raise DataError(f"{where} has type {dtype.name}, not {field.kind}.")
    wanted = [sizes.get(n, n) if isinstance(n, str) else n for n in field.shape]
    fits = len(shape) == len(wanted) and all(
        have == want or (isinstance(want, str) and have > 0)
        for have, want in zip(shape, wanted, strict=True)
    )
    if not fits:
        axes = ", ".join(map(str, wanted))
        raise DataError(f"{where} has shape {list(shape)}, not [{axes}].")
    sizes |= {
        n: have
        for n, have in zip(field.shape, shape, strict=True)
        if isinstance(n, str)
    }


def check_values(where: str, field: Field, array: np.ndarray) -> None:
    """Compares the values of an array with a field.

    Raises:
      DataError: If a value is not allowed. The message starts with ``where``.
    """
    if field.kind == "text" or not array.size:
        return
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(array.astype(np.float32))
        if bad.any():
            raise DataError(
                f"{where} has {int(bad.sum())} values that are NaN, infinite or beyond "
                "float32."
            )
    known = np.ones(array.shape, bool)
    if field.missing is not None:
        known = array != field.missing
        columns = known.reshape(len(known), -1) if known.ndim > 1 else known[:, None]
        void = np.flatnonzero(~columns.any(0))
        if len(void):
            raise DataError(
                f"{where} has no label in column {int(void[0])}: all {len(array)} are "
                "missing."
            )
    values = array[known]
    low, high = values.min(), values.max()
    if low < field.low or high > field.high:
        raise DataError(
            f"{where} has values from {low} to {high}, not from {field.low:g} to "
            f"{field.high:g}."
        )


def read_npz(path: Path, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Reads the named arrays of an ``.npz`` file.

    Args:
      path: The file.
      fields: Requirements on each array, by name. Other arrays are not read.

    Returns:
      The arrays, in the byte order of the machine.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, lacks an array, or an array differs from its
        field.

    Examples:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from mtljax.data import DataError, Field, read_npz
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "set.npz")
      ...     np.savez(path, x=np.zeros((3, 2)), y=np.array([0, 1, 7]))
      ...     x = read_npz(path, {"x": Field("real", ("n", 2))})["x"]
      ...     try:
      ...         read_npz(path, {"y": Field("integer", ("n",), 0, 1)})
      ...     except DataError as error:
      ...         print(str(error).replace(folder, ""))
      File '/set.npz': array 'y' has values from 0 to 7, not from 0 to 1.
    """
    sizes: dict[str, int] = {}
    with _reading(path, ".npz"), zipfile.ZipFile(path) as archive:
        members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        missing = [key for key in fields if key not in members]
        if missing:
            raise DataError(
                f"File {str(path)!r} holds {sorted(members)}; it lacks {missing}."
            )
        found = {}
        for key, field in fields.items():
            where = f"File {str(path)!r}: array {key!r}"
            with archive.open(members[key]) as stream:
                array = _read_npy(stream, members[key], where, field, sizes)
            check_values(where, field, array)
            found[key] = array
        return found


def _read_npy(
    stream: Any,
    member: zipfile.ZipInfo,
    where: str,
    field: Field,
    sizes: dict[str, int],
) -> np.ndarray:
    """Reads one array after comparing its header with the field."""
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2):
        raise DataError(f"{where} is not a numpy array.")
    width = "<H" if magic[6] == 1 else "<I"
    (length,) = struct.unpack(width, stream.read(struct.calcsize(width)))
    if length > 10_000:
        raise DataError(f"{where} has a header of {length} bytes.")
    header = ast.literal_eval(stream.read(length).decode("latin1").strip())
    descr, shape = header["descr"], header["shape"]
    if not isinstance(descr, str) or np.dtype(descr).hasobject:
        path, _, name = where.partition(": ")
        raise DataError(
            f"{path} is not a readable .npz file: {name} holds Python objects."
        )
    dtype = np.dtype(descr)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise DataError(f"{where} has an impossible shape.")
    check_layout(where, field, dtype, shape, sizes)
    expected = math.prod(shape) * dtype.itemsize
    most = _DEFLATE * member.compress_size + 64
    if expected > min(most, _MOST_BYTES):
        raise DataError(
            f"{where} announces {expected} bytes, more than its "
            f"{member.compress_size} stored bytes can hold."
        )
    data = _read_bytes(stream, expected)  # to the end, to verify the checksum
    if len(data) != expected:
        raise DataError(
            f"{where} announces {expected} bytes and holds "
            f"{'more' if len(data) > expected else f'only {len(data)}'}."
        )
    order = "F" if header["fortran_order"] else "C"
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_csv(path: Path, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """Reads a table without a header, with one column per field, separated by commas.

    Blank lines and lines that start with ``|`` are skipped. Texts are stripped of
    surrounding blanks.

    Args:
      path: The file. gzip is recognised by its first bytes.
      fields: The columns in order, ``"text"`` or ``"real"``, each of shape ``("n",)``.

    Returns:
      An array ``[N]`` of texts or float64 per column.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged or empty, or a line has other columns.

    Examples:
      >>> import pathlib, tempfile
      >>> from mtljax.data import Field, read_csv
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "table.csv")
      ...     _ = path.write_text("39, Private")
      ...     table = read_csv(path, {"age": Field("real", ("n",), 0, 120),
      ...                             "work": Field("text", ("n",))})
      >>> table["age"].tolist(), table["work"].tolist()
      ([39.0], ['Private'])
    """
    with _reading(path, "CSV"):
        with _opened(path) as stream:
            data = _read_bytes(stream, _MOST_BYTES // 64)
        if len(data) > _MOST_BYTES // 64:
            raise DataError(f"File {str(path)!r} is longer than 256 MiB.")
        rows = csv.reader(io.StringIO(data.decode("utf-8")), strict=True)
        lines = []
        for row in rows:
            if not row or row[0].startswith("|"):
                continue
            if len(row) != len(fields):
                raise DataError(
                    f"File {str(path)!r} has {len(row)} columns in line "
                    f"{rows.line_num}, not {len(fields)}."
                )
            lines.append(row)
        if not lines:
            raise DataError(f"File {str(path)!r} holds no rows.")
        found = {}
        for (key, field), column in zip(
            fields.items(), zip(*lines, strict=True), strict=True
        ):
            where = f"File {str(path)!r}: column {key!r}"
            array = np.array([text.strip() for text in column])
            if field.kind != "text":
                try:
                    array = array.astype(np.float64)
                except ValueError as error:
                    raise DataError(f"{where} holds texts, not numbers.") from error
            check_values(where, field, array)
            found[key] = array
        return found


def read_png(path: Path, field: Field) -> np.ndarray:
    """Reads a PNG of 8 or 16 bits. The size is compared before pixels are decoded.

    Args:
      path: The file.
      field: Its kind and its shape, ``(H, W)`` or ``(H, W, 3)``.

    Returns:
      The pixels, uint8 or int32.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If it is damaged, or not an image of this size.

    Examples:
      >>> from mtljax.data import Field, read_png
      >>> read_png("nowhere.png", Field("uint8", (4, 4)))
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: File 'nowhere.png' does not exist.
    """
    from PIL import Image

    where = f"File {str(path)!r}"
    with _reading(path, "PNG"):
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # checks the chunk checksums, which decoding skips
        return _pixels(Image.open(path, formats=["PNG"]), where, field)


def _pixels(opened: Any, where: str, field: Field) -> np.ndarray:
    with opened as image:
        wide = image.mode.startswith("I")
        shape = (image.height, image.width, *([3] if image.mode == "RGB" else []))
        dtype = np.dtype(np.int32 if wide else np.uint8)
        check_layout(where, field, dtype, shape, {})
        array = np.asarray(image).astype(dtype)
        check_layout(where, field, array.dtype, array.shape, {})
        check_values(where, field, array)
        return array


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file, the format of MNIST. gzip is recognised by its first bytes.

    At most the declared number of bytes is decompressed. A manipulated file therefore
    cannot use more memory than it declares and contains.

    Args:
      path: The file.

    Returns:
      The array, in the byte order of the machine.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the header is not IDX, the data are shorter or longer than declared,
        or the gzip stream is damaged.

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
    with _reading(path, "IDX"), _opened(path) as stream:
        return _parse_idx(stream, str(path))


def _parse_idx(stream: Any, path: str) -> np.ndarray:
    header = stream.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in _IDX_DTYPES:
        raise DataError(f"File {path!r} is not an IDX file: it starts with {header!r}.")
    dtype, ndim = _IDX_DTYPES[header[2]], header[3]
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"File {path!r} ends inside its IDX header.")
    shape = struct.unpack(f">{ndim}I", sizes)
    expected = math.prod(shape) * dtype.itemsize
    data = _read_bytes(stream, expected)
    if len(data) != expected:
        found = "more" if len(data) > expected else f"only {len(data)}"
        raise DataError(
            f"File {path!r} announces an array of shape {shape}, {expected} "
            f"bytes, and holds {found}; fetch it again."
        )
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes an array as an IDX file, with gzip if the name ends in ``.gz``.

    Args:
      path: The file.
      array: Array of type uint8, int8, int16, int32, float32 or float64.

    Raises:
      DataError: If IDX does not support the type of the array.

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


def read_images(data_dir: Path, name: str) -> ImageParts:
    """Reads a labelled image set in the layout of MNIST from ``data_dir/name``.

    The folder contains the four IDX files of MNIST (``train-images-idx3-ubyte``,
    ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``,
    ``t10k-labels-idx1-ubyte``), each plain or with ``.gz``. Alternatively it contains
    ``name.npz`` or ``name_subset.npz`` with arrays ``x_train``, ``y_train``,
    ``x_test``, ``y_test``, the keys of Keras's ``mnist.npz``. IDX files take
    precedence.

    Args:
      data_dir: Folder that contains one folder per set.
      name: ``"mnist"``, ``"fashion_mnist"``, or another set in this layout.

    Returns:
      Images ``[N, H, W]`` uint8 and labels ``[N]`` int32 of both parts.

    Raises:
      MissingDataError: If the folder or one of the files does not exist.
      DataError: If a file is damaged, or images and labels are inconsistent.

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
        found = read_npz(npz, image_fields())
        arrays = tuple(found[key] for key in _NPZ_KEYS)
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


def image_fields(*axes: int | str, official: bool = True) -> dict[str, Field]:
    """Returns the fields of images ``[N, H, W, ...]`` and their classes 0 to 9."""
    parts = ("_train", "_test") if official else ("",)
    axes = axes or ("height", "width")
    found = {}
    for part in parts:
        found[f"x{part}"] = Field("uint8", (f"n{part}", *axes))
        found[f"y{part}"] = Field("integer", (f"n{part}",), 0, 9)
    return found


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
    """Checks that images are ``[N, H, W]`` uint8 and labels are N classes 0 to 9."""
    arrays = (train_images, train_labels, test_images, test_labels)
    sizes: dict[str, int] = {}
    for (key, field), array in zip(image_fields().items(), arrays, strict=True):
        kind = "images" if key[0] == "x" else "labels"
        where = f"The array of the {key[2:]} {kind} of {name}"
        check_layout(where, field, array.dtype, array.shape, sizes)
        check_values(where, field, array)
    return ImageParts(
        train_images,
        train_labels.astype(np.int32),
        test_images,
        test_labels.astype(np.int32),
    )
