"""Damaged files, generated from a table with a seed: each is one sentence."""

import functools
import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from data import made_up

from mtljax.data import DataError, checksum, load

SEED, NUMBER, FAST = 0, 300, 60


def bytes_of(kind: str, good: bytes, rng: np.random.Generator) -> bytes:
    """Damage that needs no knowledge of the format."""
    if kind == "truncated":
        return good[: int(rng.integers(1, len(good)))]
    if kind == "flipped":
        at, damaged = int(rng.integers(len(good))), bytearray(good)
        damaged[at] ^= 1 << int(rng.integers(8))
        return bytes(damaged)
    if kind == "noise":
        return rng.bytes(len(good))
    fixed = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html>404: not here</html>",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "zeros": bytes(len(good)),
    }
    return fixed[kind]


BYTES = ("empty", "html", "pointer", "zeros", "noise", *["truncated", "flipped"] * 3)


def arrays_of(kind: str, arrays: dict, rng: np.random.Generator) -> dict | None:
    """Another array in place of one of the file; None if the kind does not apply."""
    key = str(rng.choice(list(arrays)))
    array = arrays[key]
    place = int(rng.integers(array.size))
    values = {"nan": np.nan, "infinite": -np.inf, "beyond float32": 1e39}
    labels = ("y_train", "y_test", "task", "person", "pose", "adj")
    other = None
    if kind in values and array.dtype.kind in "iuf":
        other = array.astype(np.float64)
        other.flat[place] = values[kind]
    elif kind == "void labels" and key == "y" and array.dtype == np.uint8:
        other = array.copy()
        other[:, place % array.shape[1]] = 255
    elif kind == "out of range" and key in labels:
        other = array.astype(np.int64)
        other.flat[place] = int(rng.choice([-1, 200]))
    elif kind == "lacking":
        return {k: v for k, v in arrays.items() if k != key}
    else:
        other = {
            "objects": np.array([None] * len(array)),
            "complex": np.zeros(array.shape, np.complex64),
            "records": np.zeros(array.shape, [("a", "u1")]),
            "one row less": array[:-1],
            "no rows": array[:0],
            "one axis more": array[None],
            "flat": array.ravel() if array.ndim > 1 else None,
            "scalar": np.uint8(3),
            "dates": np.zeros(array.shape, "M8[s]"),
        }.get(kind)
    return None if other is None else arrays | {key: other}


ARRAYS = (
    *("lacking", "nan", "infinite", "beyond float32", "void labels", "out of range"),
    *("objects", "complex", "records", "one row less", "no rows", "one axis more"),
    *("flat", "scalar", "dates"),
)


def with_header(good: bytes, rng: np.random.Generator) -> bytes:
    """One array whose header lies; the checksum of the archive is that of the lie."""
    shape = str(rng.choice(["(1000000000000,)", "(-3, 2)", "(3.5,)", "99", "()"]))
    descr = str(rng.choice(["'|u1'", "'|O'", "'<f8'", "'nothing'", "None"]))
    lies = [
        f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}",
        "__import__('os').getcwd()",
        "(" * 300,
        "{'descr': '|u1'}",
        "\0\xff",
    ]
    text = str(rng.choice(lies)).encode("latin1")
    source, target = zipfile.ZipFile(io.BytesIO(good)), io.BytesIO()
    chosen = str(rng.choice(source.namelist()))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            data = source.read(name)
            if name == chosen:
                size = int(rng.choice([len(text), 2**16 - 1]))
                data = (
                    b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + text + data[-64:]
                )
            archive.writestr(name, data)
    return target.getvalue()


@functools.cache
def sets():
    return made_up.npz_sets()


def npz_cases(rng):
    """(set, options, file, its bytes), for ever."""
    names = list(sets())
    while True:
        name = str(rng.choice(names))
        file, options, arrays = sets()[name]
        kind = str(rng.choice([*BYTES, *ARRAYS, "header", "header", "header"]))
        good = made_up.npz_bytes(arrays, small=bool(rng.integers(2)))
        if kind in BYTES:
            found = bytes_of(kind, good, rng)
        elif kind == "header":
            found = with_header(good, rng)
        else:
            other = arrays_of(kind, arrays, rng)
            if other is None:
                continue
            found = made_up.npz_bytes(other)
        yield kind, name, options, file, found


def adult_line(kind: str) -> bytes:
    text = made_up.adult_text(120)
    return {
        "a column less": text.replace(", Cuba", "", 1).encode(),
        "no number": text.replace("77516", "many", 1).encode(),
        "negative": text.replace("20,", "-20,", 1).encode(),
        "nan": text.replace("20,", "nan,", 1).encode(),
        "another label": text.replace(">50K", ">60K", 1).encode(),
        "zero byte": text.replace("Sales", "Sa\0les", 1).encode(),
        "no utf-8": text.encode().replace(b"Cuba", b"\xff\xfe", 1),
        "open quote": text.replace("Sales", '"Sales', 1).replace(", S", ',"S').encode(),
        "long field": text.replace("Sales", "S" * 200_000, 1).encode(),
        "no rows": b"\n\n",
    }[kind]


ADULT = (
    *("a column less", "no number", "negative", "nan", "another label", "no utf-8"),
    *("open quote", "long field", "no rows"),
)


def other_cases(rng, folder):
    """The same for IDX, CSV and PNG."""
    where = {"adult": "adult", "multi_mnist": "mnist", "nyuv2_frames": "nyuv2_frames"}
    while True:
        name = str(rng.choice(list(where)))
        files = sorted((folder / where[name]).iterdir())
        path = files[int(rng.integers(len(files)))]
        kind = str(rng.choice([*BYTES, *(ADULT if name == "adult" else ())]))
        if kind in ADULT:
            found = gzip.compress(adult_line(kind), mtime=0)
        else:
            found = bytes_of(kind, path.read_bytes(), rng)
        options = {"val_size": 20} if name != "nyuv2_frames" else {}
        yield kind, name, options, str(path.relative_to(folder)), found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for file, _, arrays in sets().values():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(made_up.npz_bytes(arrays))
    made_up.write_adult(root / "adult")
    made_up.write_mnist(root / "mnist")
    made_up.write_frames(root / "nyuv2_frames")
    return root


def test_the_files_are_good_before(folder):
    for name, (_, options, _) in sets().items():
        assert len(load(name, data_dir=folder, **options).train["image"])
    for name in ("adult", "multi_mnist"):
        assert load(name, data_dir=folder, val_size=20).num_tasks in (2, 3)
    frames = load("nyuv2_frames", data_dir=folder)
    assert np.nanmax(frames.train["depth"]) == 1


@pytest.mark.parametrize(
    ("number", "seed"),
    [(FAST, SEED), pytest.param(NUMBER, SEED + 1, marks=pytest.mark.deep)],
)
@pytest.mark.usefixtures("as_users")
def test_every_damage_is_one_sentence(folder, number, seed, record_property, capsys):
    """Or it changes no number: a flipped bit in a time stamp of an archive."""
    rng = np.random.default_rng(seed)
    first, second = npz_cases(rng), other_cases(rng, folder)
    refused, harmless, wrong = 0, 0, []
    for count in range(number):
        kind, name, options, file, damaged = next(second if count % 3 == 0 else first)
        path = folder / file
        good = path.read_bytes()
        path.write_bytes(damaged)
        try:
            found = load(name, data_dir=folder, **options)
        except DataError as error:
            text = str(error)
            refused += 1
            if "\n" in text or "pickle" in text or len(text) > 500:
                wrong.append((kind, name, file, text))
        except Exception as error:
            wrong.append((kind, name, file, repr(error)))
        else:
            path.write_bytes(good)
            same = checksum(load(name, data_dir=folder, **options)) == checksum(found)
            # IDX has no checksum: a flipped pixel is an image like any other.
            plain = kind == "flipped" and "idx" in file and not file.endswith("gz")
            harmless += same or plain
            if not (same or plain):
                wrong.append((kind, name, file, "accepted"))
        finally:
            path.write_bytes(good)
    with capsys.disabled():
        print(
            f"\n{number} damaged files: {refused} refused, {harmless} harmless, "
            f"{len(wrong)} wrong"
        )
    record_property("corrupt_files", number)
    assert not wrong
    assert refused > 0.9 * number
