"""Small files in the layout of every set that is read from files."""

import gzip
import io
import pathlib

import numpy as np

from mtljax.data import write_idx
from mtljax.data._qm9 import _SUBSET_KEYS


def npz_sets() -> dict[str, tuple[str, dict, dict[str, np.ndarray]]]:
    """Set -> its file, the options that load it, and the arrays of the file."""
    rng = np.random.default_rng(0)
    digits = np.arange(700, dtype=np.uint8) % 10
    image = lambda n, *shape: rng.integers(0, 200, (n, *shape), np.uint8)
    molecules = np.zeros((3100, 9), np.uint8)
    molecules[:, :2] = 6
    schools = np.repeat(np.arange(139), 8)
    known = rng.integers(0, 2, (60, 12)).astype(np.uint8)
    known[::7] = 255
    scenes = {}
    for part in ("train", "val", "test"):
        scenes[f"x_{part}"] = image(2, 72, 96, 3)
        scenes[f"seg_{part}"] = rng.integers(0, 12, (2, 72, 96)).astype(np.uint8)
    person = (np.arange(400) % 20).astype(np.uint8)
    return {
        "digit_domains": (
            "usps/usps.npz",
            {"domain": "usps", "val_size": 50},
            {
                "x_train": image(700, 16, 16),
                "y_train": digits,
                "x_test": image(700, 16, 16),
                "y_test": digits,
            },
        ),
        "mulan_mtr": (
            "mulan_mtr/enb.npz",
            {"subset": "enb"},
            {
                "x": rng.normal(size=(50, 4)),
                "y": rng.normal(size=(50, 2)),
                "y_names": np.array(["heating", "cooling"]),
            },
        ),
        "mulan_multilabel": (
            "mulan_multilabel/emotions.npz",
            {"subset": "emotions"},
            {
                "x_train": rng.normal(size=(50, 4)),
                "y_train": rng.integers(0, 2, (50, 6)),
                "x_test": rng.normal(size=(20, 4)),
                "y_test": rng.integers(0, 2, (20, 6)),
                "y_names": np.array(list("abcdef")),
            },
        ),
        "tox21": (
            "tox21/tox21_ecfp1024.npz",
            {},
            {
                "fp_bits": image(60, 128),
                "y": known,
                "group": np.arange(60, dtype=np.int32),
                "y_names": np.array([f"NR-{i}" for i in range(12)]),
            },
        ),
        "school": (
            "school/school.npz",
            {},
            {
                "x": rng.normal(size=(len(schools), 28)).astype(np.float32),
                "y": rng.uniform(1, 70, len(schools)).astype(np.float32),
                "task": schools.astype(np.int16),
            },
        ),
        "cmu_faces": (
            "cmu_faces/cmu_faces_q.npz",
            {"persons": "mixed"},
            {
                "x": image(400, 30, 32),
                "person": person,
                "pose": person % 4,
                "expression": person // 4 % 4,
                "sunglasses": person % 2,
            },
        ),
        "camvid": ("camvid_72x96/camvid_72x96.npz", {}, scenes),
        "qm9_subset": (
            "qm9_subset/qm9_graphs.npz",
            {},
            {
                **{
                    name: molecules // 6
                    for name in ("num_h", "charge", "hyb", "in_ring")
                },
                "z": molecules,
                "adj": np.zeros((3100, 9, 9), np.uint8),
                "y": rng.normal(size=(3100, 11)),
                "y_names": np.array([key for key, _ in _SUBSET_KEYS.values()]),
            },
        ),
    }


def adult_text(count: int, stop: str = "") -> str:
    """Rows of the census."""
    line = "{}, Private, 77516, {}, {}, {}, Sales, Husband, White, Male, 0, 0, 40, Cuba"
    married = ("Never-married", "Divorced")
    schooling = ("Bachelors", "10th")
    return "".join(
        line.format(20 + i % 50, schooling[i % 2], i % 16, married[i % 3 % 2])
        + f", {('<=50K', '>50K')[i % 2]}{stop}\n"
        for i in range(count)
    )


def write_adult(folder: pathlib.Path) -> None:
    """Both parts of the census."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = adult_text(120), "|1x3 Cross validator\n" + adult_text(60, ".")
    for name, text in (("adult.data.gz", first), ("adult.test.gz", second)):
        (folder / name).write_bytes(gzip.compress(text.encode(), mtime=0))


def write_mnist(folder: pathlib.Path) -> None:
    """Four IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count, end in (("train", 240, ".gz"), ("t10k", 60, "")):
        images = rng.integers(1, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{end}", labels)


def write_frames(folder: pathlib.Path) -> None:
    """The seven PNGs of the two frames."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    colour = np.full((480, 640, 3), 200, np.uint8)
    for frame in ("000433", "000464"):
        Image.fromarray(colour).save(folder / f"{frame}_rgb.png")
        label = np.full((480, 640), 3, np.uint8)
        label[:5] = 255
        Image.fromarray(label).save(folder / f"{frame}_segm.png")
        depth = np.full((480, 640), 5000, np.uint16)
        depth[:, :9] = 0
        Image.fromarray(depth).save(folder / f"{frame}_depth.png")
    Image.fromarray(colour).save(folder / "000433_normal.png")


def npz_bytes(arrays: dict[str, np.ndarray], *, small: bool = False) -> bytes:
    """The bytes of an ``.npz``."""
    buffer = io.BytesIO()
    (np.savez_compressed if small else np.savez)(buffer, **arrays)
    return buffer.getvalue()
