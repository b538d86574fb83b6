"""Loads the data sets as arrays with training, validation and test splits."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments.alternating.config import Config
from experiments.common import problem as common
from mtljax import data
from mtljax.data import MISSING

PATCH = 6


class Arrays(NamedTuple):
    """Splits of a data set, ``[examples, splits, ...]``. A run uses one split."""

    tasks: tuple[str, ...]
    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    dataset: data.Dataset


def _make(dataset: data.Dataset, split, tasks: tuple[str, ...] | None = None) -> Arrays:
    """Builds the splits by calling ``split(arrays, part)`` for each part."""
    tasks = tasks or tuple(task.name for task in dataset.tasks)
    train, val, test = (
        {k: v[:, None] for k, v in split(getattr(dataset, part), part).items()}
        for part in data.SPLITS
    )
    return Arrays(tasks, train, val, test, dataset)


def digits(config: Config) -> Arrays:
    """Two embedded digits on a canvas: 10 + 10 classes against the rest, and ink."""
    found = common.load(config, "multidigits", train_size=4000)

    def split(arrays, part):
        size = None if part == "train" else 1000
        x = np.asarray(data.to_float(arrays["image"], found.image_max))
        return {
            "x": x[:size],
            **{k: arrays[k][:size] for k in ("left", "right", "ink")},
        }

    tasks = [f"{side} {k}" for side in ("left", "right") for k in range(10)]
    return _make(found, split, (*tasks, "ink"))


def by_seed(config: Config, name: str, make: Callable[..., Arrays]) -> Arrays:
    """Stacks one split per seed. Longer splits lose their first examples."""
    sets = [make(config, seed) for seed in config.seeds_of(name)]

    def stack(*arrays):
        count = min(map(len, arrays))
        return np.stack([array[len(array) - count :, 0] for array in arrays], 1)

    parts = ([getattr(found, part) for found in sets] for part in data.SPLITS)
    train, val, test = ({k: stack(*(s[k] for s in p)) for k in p[0]} for p in parts)
    return Arrays(sets[0].tasks, train, val, test, sets[0].dataset)


def faces_of(config: Config, seed: int) -> Arrays:
    """Person, pose, expression, sunglasses and reconstruction, at half resolution."""
    found = common.load(config, "cmu_faces", persons="mixed", seed=seed)

    def split(arrays, _):
        x = arrays["image"].astype(np.float32).reshape(-1, 15, 2, 16, 2).mean((2, 4))
        return arrays | {"x": x[..., None] / 255}

    return _make(found, split, (*(task.name for task in found.tasks), "image"))


def camvid(config: Config) -> Arrays:
    """Road scenes of 36 x 48 pixels, as 48 patches of 6 x 6 pixels.

    An example is an image. The input of a patch also contains the mean colours of all
    patches and the position of the patch. They replace the context that a convolutional
    network would have.
    """
    found = common.load(config, "camvid", ("segmentation",))

    def patches(a):
        n, h, w = a.shape[:3]
        a = a.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, -1)
        return a.transpose(0, 1, 3, 2, 4, 5).reshape(n, 48, PATCH * PATCH, -1)

    def split(arrays, part):
        x = arrays["image"].astype(np.float32) / 255 - 0.5
        x = patches(x.reshape(len(x), 36, 2, 48, 2, 3).mean((2, 4)))
        around = np.broadcast_to(x.mean(2).reshape(len(x), 1, -1), (len(x), 48, 144))
        place = np.stack(np.meshgrid(np.arange(6) / 6, np.arange(8) / 8), -1)
        place = np.broadcast_to(
            place.transpose(1, 0, 2).reshape(48, 2), (len(x), 48, 2)
        )
        seen = np.concatenate([x.reshape(len(x), 48, -1), around, place], -1)
        labels = patches(arrays["class"][:, ::2, ::2])[..., 0]
        made = {"x": seen.astype(np.float32), "label": labels, "grey": x.mean(-1)}
        # Evaluation uses every second image, because neighbouring frames are similar.
        return made if part == "train" else {k: v[::2] for k, v in made.items()}

    classes = found.origin["classes"]["names"].tolist()
    return _make(found, split, (*classes, "brightness"))


def tox21(config: Config) -> Arrays:
    """Twelve assays of molecules, with substructure fingerprints folded to 256 bits."""
    found = common.load(config, "tox21", bits=256)

    def split(arrays, _):
        labels = np.stack([arrays[task.name] for task in found.tasks], 1)
        return {"x": arrays["image"][:, :, 0, 0].astype(np.float32), "y": labels}

    return _make(found, split)


def school_of(config: Config, seed: int) -> Arrays:
    """Exam scores, with one task per school.

    An example of the training split contains one pupil of each school. Pupils of small
    schools therefore occur more often. Each school has its own order of pupils.
    """
    found = common.load(config, "school", seed=seed)
    names = [task.name for task in found.tasks]

    def split(arrays, part):
        at = found.origin[part]["task"]
        x, every = arrays["image"][:, :, 0, 0], np.arange(len(at))
        y = np.stack([arrays[name] for name in names])[at, every]
        if part == "train":
            rounds = found.origin[part]["rounds"]
            return {"x": x[rounds], "y": y[rounds]}
        sizes = np.bincount(at, minlength=len(names))
        pupils = np.full((len(names), sizes.max()), MISSING)
        pupils[at, every - (np.cumsum(sizes) - sizes)[at]] = every
        return {"x": x, "y": y, "pupils": pupils}

    return _make(found, split)


def named(config: Config, name: str) -> Arrays:
    """Loads any data set whose tasks share their inputs, including your own."""
    found = common.load(config, name)

    def split(arrays, _):
        return arrays | {
            "x": np.asarray(data.to_float(arrays["image"], found.image_max))
        }

    return _make(found, split)


_BY_SEED = {"faces": faces_of, "school": school_of}  # a split for every seed
_MAKE = {"digits": digits, "camvid": camvid, "tox21": tox21}


def load(name: str, config: Config) -> Arrays:
    """Loads a data set by name."""
    if name in _BY_SEED:
        return by_seed(config, name, _BY_SEED[name])
    return _MAKE[name](config) if name in _MAKE else named(config, name)
