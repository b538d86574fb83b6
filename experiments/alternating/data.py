"""The five data sets as arrays: training, validation and test."""

import itertools
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.alternating.config import ConfigError
from mtljax import data

MISSING = -1  # a label that is not there


class Arrays(NamedTuple):
    """Splits of a set; the leading axis of every array is that of examples."""

    tasks: tuple[str, ...]
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def _read(data_dir: str | os.PathLike[str] | None, folder: str, file: str) -> Any:
    path = pathlib.Path(data_dir or "") / folder / file
    if not path.is_file():
        raise ConfigError(f"--data-dir: there is no file {str(path)!r}.")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def digits() -> Arrays:
    """Two digits on a canvas (embedded): 10 + 10 classes against the rest, the ink."""
    found = data.load("multidigits", train_size=4000)

    def split(arrays, size: int | None = 1000):
        return {
            "x": np.asarray(data.to_float(arrays["image"], found.image_max))[:size],
            "left": arrays["left"][:size],
            "right": arrays["right"][:size],
            "ink": arrays["ink"][:size],
        }

    tasks = [f"{side} {k}" for side in ("left", "right") for k in range(10)]
    splits = split(found.train, None), split(found.val), split(found.test)
    return Arrays((*tasks, "ink"), *splits)


FACE_LABELS = ("person", "pose", "expression", "sunglasses")


def faces(data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Who, where to, how, with what on, and the face itself, at half the resolution.

    A face of a known person is nearest to faces of other expressions of that person, so
    that pose, expression and sunglasses are judged on persons who are not in training.
    Who somebody is can only be asked of persons who are: it is judged on left-out faces
    of those. A label that a face is not judged by is missing.
    """
    found = _read(data_dir, "cmu_faces", "cmu_faces_q.npz")
    rng = np.random.default_rng(0)
    people = rng.permutation(20)
    of = {
        split: np.isin(found["person"], people[part])
        for split, part in (("test", slice(4)), ("val", slice(4, 7)))
    }
    known = rng.permutation(np.flatnonzero(~(of["test"] | of["val"])))
    held = {"test": known[:60], "val": known[60:120]}
    x = found["x"].astype(np.float32).reshape(-1, 15, 2, 16, 2).mean((2, 4)) / 255
    # Numbers 0 to 12 for those who can be named.
    names = np.full(20, MISSING)
    names[np.sort(people[7:])] = np.arange(13)
    labels = {k: found[k].astype(np.int32) for k in FACE_LABELS}
    labels["person"] = names[labels["person"]].astype(np.int32)

    def split(new, old):
        rows = np.concatenate([new, old])
        taken = {k: v[rows].copy() for k, v in labels.items()}
        for k in FACE_LABELS[1:]:
            taken[k][len(new) :] = MISSING
        return {"x": x[rows][..., None], **taken}

    train = {k: v[known[120:]] for k, v in labels.items()}
    return Arrays(
        (*FACE_LABELS, "image"),
        {"x": x[known[120:]][..., None], **train},
        *(split(np.flatnonzero(of[s]), held[s]) for s in ("val", "test")),
    )


CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)
PATCH = 6


def camvid(data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Road scenes, 36 x 48 pixels, as 48 patches of 6 x 6.

    An example is an image. A patch comes with the mean colours of all patches and its
    place, which stand for what a convolutional network would see of the rest.
    """
    found = _read(data_dir, "camvid_72x96", "camvid_72x96.npz")

    def patches(a):
        n, h, w = a.shape[:3]
        a = a.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, -1)
        return a.transpose(0, 1, 3, 2, 4, 5).reshape(n, 48, PATCH * PATCH, -1)

    def split(name, size=None):
        x = found[f"x_{name}"][:size].astype(np.float32) / 255 - 0.5
        x = patches(x.reshape(len(x), 36, 2, 48, 2, 3).mean((2, 4)))
        around = np.broadcast_to(x.mean(2).reshape(len(x), 1, -1), (len(x), 48, 144))
        place = np.stack(np.meshgrid(np.arange(6) / 6, np.arange(8) / 8), -1)
        place = np.broadcast_to(
            place.transpose(1, 0, 2).reshape(48, 2), (len(x), 48, 2)
        )
        seen = np.concatenate([x.reshape(len(x), 48, -1), around, place], -1)
        labels = patches(found[f"seg_{name}"][:size, ::2, ::2])[..., 0].astype(np.int32)
        grey = x.mean(-1)
        return {"x": seen.astype(np.float32), "label": labels, "grey": grey}

    # Every second test image: neighbours of a video differ little.
    test = {k: v[::2] for k, v in split("test").items()}
    val = {k: v[::2] for k, v in split("val").items()}
    return Arrays((*CLASSES, "brightness"), split("train"), val, test)


def tox21(data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Twelve assays of molecules by their substructures, folded to 256 bits."""
    found = _read(data_dir, "tox21", "tox21_ecfp1024.npz")
    bits = np.unpackbits(found["fp_bits"], axis=1)
    x = bits.reshape(len(bits), 4, 256).max(1).astype(np.float32)
    y = np.where(found["y"] == 255, MISSING, found["y"]).astype(np.int32)
    # All records of a molecule are on one side.
    drawn = np.random.default_rng(0).permutation(found["group"].max() + 1)
    part = drawn[found["group"]] / len(drawn)
    rows = {"test": part < 0.2, "val": (part >= 0.2) & (part < 0.35)}
    rows["train"] = part >= 0.35
    splits = ({"x": x[rows[s]], "y": y[rows[s]]} for s in ("train", "val", "test"))
    return Arrays(tuple(str(n) for n in found["y_names"]), *splits)


def school(data_dir: str | os.PathLike[str] | None) -> Arrays:
    """Exam scores, a task for every school.

    An example of the training split is one pupil of each school: the pupils of smaller
    schools come up more often, in orders of their own.
    """
    found = _read(data_dir, "school", "school.npz")
    rng = np.random.default_rng(0)
    task, count = found["task"].astype(np.int32), int(found["task"].max()) + 1
    rows: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    for t in range(count):
        mine = rng.permutation(np.flatnonzero(task == t))
        a, b = len(mine) // 4, len(mine) // 4 + max(2, len(mine) // 7)
        rows["test"].append(mine[:a])
        rows["val"].append(mine[a:b])
        rows["train"].append(mine[b:])
    train = np.concatenate(rows["train"])
    x, y = found["x"][:, :-1], found["y"]  # the last feature is constant
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-3)
    y = (y - y[train].mean()) / y[train].std()
    x = np.clip(x, -5, 5).astype(np.float32)
    length = max(map(len, rows["train"]))

    def repeated(mine):
        rounds = [rng.permutation(mine) for _ in range(-(-length // len(mine)))]
        return np.concatenate(rounds)[:length]

    columns = np.stack([repeated(mine) for mine in rows["train"]], 1)

    def split(name):
        at = np.concatenate(rows[name])
        ends = np.cumsum([0, *map(len, rows[name])])
        pupils = np.full((count, max(map(len, rows[name]))), MISSING)
        for t, (start, stop) in enumerate(itertools.pairwise(ends)):
            pupils[t, : stop - start] = np.arange(start, stop)
        return {"x": x[at], "y": y[at].astype(np.float32), "pupils": pupils}

    first = {"x": x[columns], "y": y[columns].astype(np.float32)}
    names = tuple(f"school {t}" for t in range(count))
    return Arrays(names, first, split("val"), split("test"))


def load(name: str, data_dir: str | os.PathLike[str] | None) -> Arrays:
    """A set by its name."""
    if name == "digits":
        return digits()
    return {"faces": faces, "camvid": camvid, "tox21": tox21, "school": school}[name](
        data_dir
    )
