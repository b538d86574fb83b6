"""The settings of the paper as arrays of images and labels."""

import dataclasses
import itertools
import pathlib

import numpy as np

from experiments.common import problem as common
from experiments.common.config import ConfigError, check_batch
from experiments.trajectories.config import SETTINGS, Config, Scale
from mtljax import data

Split = dict[str, np.ndarray]

TARGET, OTHER, NOISY, DOMAIN = "fashion", "other half", "noisy labels", "mnist"
COPY = "copy"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Tasks with equally many images.

    Images have shape ``[N, H, W, C]`` if all tasks use the same images (``shared``),
    otherwise ``[N, T, H, W, C]``. Labels have shape ``[N, T]``.
    """

    name: str
    tasks: tuple[str, ...]
    classes: tuple[int, ...]
    shared: bool
    train: Split
    val: Split
    test: Split
    width: int = 10  # of each head: the most classes of a task of the setting
    metric: str = "accuracy"  # or "f1" of class 1
    image_max: int = 255

    def select(self, names: tuple[str, ...]) -> "Problem":
        """Returns the same images with a subset of the tasks."""
        at = [self.tasks.index(name) for name in names]

        def of(split: Split) -> Split:
            image = split["image"] if self.shared else split["image"][:, at]
            return {"image": image, "label": split["label"][:, at]}

        return dataclasses.replace(
            self,
            tasks=names,
            classes=tuple(self.classes[i] for i in at),
            train=of(self.train),
            val=of(self.val),
            test=of(self.test),
        )


def load(config: Config, setting: str) -> Problem:
    """Loads a setting by name."""
    build = {"fashion_mtl": fashion_mtl, "cifar100": cifar100, "celeba": celeba}
    scale = config.scale(setting)
    if setting in build:
        found = build[setting](config, scale)
        parts = {part: getattr(found, part) for part in data.SPLITS}
        common.note_arrays(setting, parts)
    else:
        found = named(config, setting, scale)
    option = setting if setting in SETTINGS else "other"
    check_batch(f"{option}.batch_size", scale.batch_size, len(found.train["label"]))
    return found


def _folder(config: Config, name: str) -> pathlib.Path:
    if config.data_dir is None:
        raise data.MissingDataError(
            f"{name} is read from files. Pass --data-dir DIR with DIR/{name}/."
        )
    return config.data_dir


def fashion_mtl(config: Config, scale: Scale) -> Problem:
    """FashionMNIST in two halves, the second also with wrong labels; MNIST; a copy.

    Both halves use the same validation and test images. The noisy task is evaluated on
    true labels, so that its scores measure generalisation to the true labels.
    """
    folder = _folder(config, "fashion_mnist")
    fashion = data.read_images(folder, "fashion_mnist")
    mnist = data.read_images(folder, "mnist")
    order = np.random.default_rng(0).permutation(len(fashion.train_labels))
    spare = len(order) - scale.val_size
    size = spare // 2 if scale.train_size is None else scale.train_size
    if size < 1 or 2 * size > spare or size + scale.val_size > len(mnist.train_labels):
        raise data.DataError(
            f"Twice --fashion-mtl.train-size {size} plus --fashion-mtl.val-size "
            f"{scale.val_size} exceeds the {len(order)} images."
        )
    val = order[: scale.val_size]
    halves = order[scale.val_size :][:size], order[scale.val_size + size :][:size]
    images, labels = fashion.train_images, fashion.train_labels
    noisy = np.random.default_rng(1).permutation(labels[halves[1]])
    digits = np.random.default_rng(2).permutation(len(mnist.train_labels))
    digits, digits_val = digits[:size], digits[size : size + scale.val_size]
    tests = min(len(fashion.test_labels), len(mnist.test_labels))
    tests = tests if scale.test_size is None else min(tests, scale.test_size)

    def stacked(parts) -> Split:
        image, label = zip(*parts, strict=True)
        return {"image": np.stack(image, 1)[..., None], "label": np.stack(label, 1)}

    def evaluation(split, digit_split) -> Split:
        return stacked([split, split, split, digit_split, split])

    return Problem(
        "fashion_mtl",
        (TARGET, OTHER, NOISY, DOMAIN, COPY),
        (10,) * 5,
        shared=False,
        train=stacked(
            [
                (images[halves[0]], labels[halves[0]]),
                (images[halves[1]], labels[halves[1]]),
                (images[halves[1]], noisy),
                (mnist.train_images[digits], mnist.train_labels[digits]),
                (images[halves[0]], labels[halves[0]]),
            ]
        ),
        val=evaluation(
            (images[val], labels[val]),
            (mnist.train_images[digits_val], mnist.train_labels[digits_val]),
        ),
        test=evaluation(
            (fashion.test_images[:tests], fashion.test_labels[:tests]),
            (mnist.test_images[:tests], mnist.test_labels[:tests]),
        ),
    )


def named(config: Config, name: str, scale: Scale) -> Problem:
    """Loads a classification set whose tasks share images, such as ``cmu_faces``."""
    sizes = {}
    if name == "cmu_faces":
        parts = data.SPLITS
        sizes = {f"{part}_size": getattr(scale, f"{part}_size") for part in parts}
    found = common.load(config, name, ("classification",), **sizes)
    tasks = [task.name for task in found.tasks]

    def split(part: str) -> Split:
        arrays = getattr(found, part)
        label = np.stack([arrays[task] for task in tasks], 1).astype(np.int32)
        if (label == data.MISSING).any():
            raise ConfigError(f"{name} has missing labels. The probes need all labels.")
        return {"image": arrays["image"], "label": label}

    classes = tuple(task.size for task in found.tasks)
    train, val, test = map(split, data.SPLITS)
    made = Problem(name, tuple(tasks), classes, True, train, val, test)
    return dataclasses.replace(made, width=max(classes), image_max=found.image_max)


def _rows(config: Config, name: str, split: str, keys: tuple[str, ...], limit=None):
    source = data.tfds_source(
        name, split, data_dir=config.data_dir, download=config.download
    )
    count = len(source) if limit is None else min(limit, len(source))
    rows = [source[i] for i in range(count)]
    return {key: [row[key] for row in rows] for key in keys}


def cifar100(config: Config, scale: Scale) -> Problem:
    """Loads CIFAR-100. Each superclass is a task with five classes."""
    raw = {
        part: _rows(config, "cifar100", part, ("image", "label", "coarse_label"))
        for part in ("train", "test")
    }
    fine = np.concatenate([raw[p]["label"] for p in raw])
    coarse = np.concatenate([raw[p]["coarse_label"] for p in raw])
    tasks = sorted(set(coarse.tolist()))

    def images_of(part: str, task: int) -> tuple[np.ndarray, np.ndarray]:
        inside = {c: i for i, c in enumerate(sorted(set(fine[coarse == task])))}
        mine = np.flatnonzero(np.asarray(raw[part]["coarse_label"]) == task)
        image = np.stack([raw[part]["image"][i] for i in mine])
        return image, np.array([inside[raw[part]["label"][i]] for i in mine], np.int32)

    whole = [images_of("train", task) for task in tasks]
    cut = scale.val_size
    splits = {
        "train": [(image[cut:], label[cut:]) for image, label in whole],
        "val": [(image[:cut], label[:cut]) for image, label in whole],
        "test": [images_of("test", task) for task in tasks],
    }
    limits = {"train": scale.train_size, "val": None, "test": scale.test_size}

    def stacked(part: str) -> Split:
        length = min(len(label) for _, label in splits[part])
        length = length if limits[part] is None else min(length, limits[part])
        if length == 0:
            raise data.DataError(
                f"--cifar100.val-size {scale.val_size} leaves a superclass without "
                f"images in the {part} split."
            )
        return {
            "image": np.stack([image[:length] for image, _ in splits[part]], 1),
            "label": np.stack([label[:length] for _, label in splits[part]], 1),
        }

    names = tuple(f"superclass {task}" for task in tasks)
    parts = map(stacked, data.SPLITS)
    return Problem("cifar100", names, (5,) * len(names), False, *parts, width=5)


def celeba(config: Config, scale: Scale) -> Problem:
    """Loads forty attributes of faces at 64 by 64 pixels, scored by F1."""
    from PIL import Image

    def small(image: np.ndarray) -> np.ndarray:
        side = min(image.shape[:2])
        top, left = ((n - side) // 2 for n in image.shape[:2])
        crop = Image.fromarray(image[top : top + side, left : left + side])
        return np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR))

    sizes = (scale.train_size, scale.val_size, scale.test_size)
    limits = dict(zip(("train", "validation", "test"), sizes, strict=True))
    splits, names = {}, ()
    for part, limit in limits.items():
        rows = _rows(config, "celeb_a", part, ("image", "attributes"), limit)
        names = tuple(sorted(rows["attributes"][0]))
        label = [[int(row[name]) for name in names] for row in rows["attributes"]]
        splits[part] = {
            "image": np.stack([small(image) for image in rows["image"]]),
            "label": np.array(label, np.int32),
        }
    parts, classes = splits.values(), (2,) * len(names)
    return Problem("celeba", names, classes, True, *parts, width=2, metric="f1")


def single_tasks(problem: Problem) -> list[tuple[str, ...]]:
    """Returns tasks with a single-task baseline: FashionMTL's target, or all tasks."""
    tasks = problem.tasks[:1] if problem.name == "fashion_mtl" else problem.tasks
    return [(task,) for task in tasks]


def task_sets(config: Config, problem: Problem) -> list[tuple[str, ...]]:
    """Returns sets of at least two tasks: all sets, or random sets of many tasks.

    Each set of FashionMTL contains the target. The set of all tasks comes last.
    """
    fashion = problem.name == "fashion_mtl"
    tasks = problem.tasks[:4] if fashion else problem.tasks
    if fashion and config.sets == "pairs":
        return [(TARGET, other) for other in (NOISY, OTHER, COPY)]
    if config.sets == "largest":
        return [tasks]
    if len(tasks) <= 4:
        sizes = range(2, len(tasks) + 1)
        found = [s for size in sizes for s in itertools.combinations(tasks, size)]
        if fashion:
            found = [(TARGET, COPY), *(s for s in found if TARGET in s)]
        return found
    rng = np.random.default_rng(0)
    targets = rng.choice(len(tasks), min(config.num_targets, len(tasks)), replace=False)
    found = []
    for target in targets:
        others = [i for i in range(len(tasks)) if i != target]
        for size in config.random_sets:
            if size < len(others):
                chosen = sorted([target, *rng.choice(others, size, replace=False)])
                found.append(tuple(tasks[i] for i in chosen))
    return [*dict.fromkeys(found), tasks]


def optimiser_sets(problem: Problem) -> list[tuple[str, ...]]:
    """Returns the sets for optimizers: all tasks, and the target with the domain."""
    if problem.name == "fashion_mtl":
        return [(TARGET, DOMAIN), problem.tasks[:4]]
    return [problem.tasks]
