"""The MultiMNIST family: two images on one canvas, a task for each."""

import os
from typing import Literal

import numpy as np

from mtljax.data import _overlay, catalogue, files
from mtljax.data.files import ImageParts
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Task

CANVAS = _overlay.Canvas(size=36, shift=4, offset=4)
_VAL_SHARE = 12  # one of 12 source images is held out for validation

Source = Literal["files", "tfds"]


def _read(
    name: str, source: Source, data_dir: str | os.PathLike[str] | None, download: bool
) -> ImageParts:
    if source == "tfds":
        return catalogue.read_tfds_images(name, data_dir, download=download)
    if source != "files":
        raise DataError(f"source must be 'files' or 'tfds', not {source!r}.")
    if download:
        raise DataError(
            "download=True works with source='tfds' only (--source tfds --download)."
        )
    if data_dir is None:
        raise MissingDataError(
            f"The {name} images are needed: pass --data-dir DIR with "
            f"DIR/{name}/train-images-idx3-ubyte.gz and the 3 other IDX files, or read "
            "them from tensorflow-datasets with --source tfds --download."
        )
    return files.read_images(data_dir, name)


def _split_pools(parts: ImageParts, val: bool) -> dict[str, np.ndarray]:
    """Returns indices by split. Test uses the test part, train and val the other."""
    count = len(parts.train_labels)
    order = _overlay.permutation(0, size=count)
    held_out = count // _VAL_SHARE if val else 0
    return {
        "train": order[held_out:],
        "val": order[:held_out],
        "test": np.arange(len(parts.test_labels)),
    }


def _side(parts: ImageParts, pools: dict[str, np.ndarray], split: str):
    if split == "test":
        return _overlay.Items(parts.test_images, parts.test_labels, pools[split])
    return _overlay.Items(parts.train_images, parts.train_labels, pools[split])


def _build(
    name: str,
    sources: tuple[str, str],
    task_names: tuple[str, str],
    *,
    data_dir: str | os.PathLike[str] | None,
    source: Source,
    download: bool,
    seed: int,
    train_size: int | None,
    val_size: int | None,
    test_size: int | None,
) -> Dataset:
    parts = {
        key: _read(key, source, data_dir, download) for key in dict.fromkeys(sources)
    }
    for key, part in parts.items():
        if part.train_images.shape[1:] != (28, 28):
            raise DataError(
                f"{name} overlays 28x28 images, but those of {key} are "
                f"{part.train_images.shape[1]}x{part.train_images.shape[2]}."
            )
    pools = {key: _split_pools(part, val_size != 0) for key, part in parts.items()}
    first, second = sources
    pairs = {}
    for split in SPLITS:
        one = _side(parts[first], pools[first], split)
        two = _side(parts[second], pools[second], split)
        pairs[split] = (one, one) if first == second else (one, two)

    part = parts[first]
    twice = {
        "train": 2 * len(part.train_labels),
        "val": 2 * len(pools[first]["val"]),
        "test": 2 * len(part.test_labels),
    }
    asked = {"train": train_size, "val": val_size, "test": test_size}
    sizes = twice | {split: n for split, n in asked.items() if n is not None}
    canvases, origin = _overlay.build_splits(pairs, CANVAS, sizes, seed)

    def with_targets(split: str) -> dict[str, np.ndarray]:
        index = origin[split]["source"]
        arrays = {"image": canvases[split]}
        for side, task in enumerate(task_names):
            arrays[task] = pairs[split][side].labels[index[:, side]]
        return arrays

    counts = ", ".join(
        f"{key} {len(pools[key]['train'])} / {len(pools[key]['val'])} / "
        f"{len(pools[key]['test'])}"
        for key in parts
    )
    return Dataset(
        name=name,
        tasks=tuple(Task(task, "classification", 10) for task in task_names),
        input_shape=(CANVAS.size, CANVAS.size, 1),
        train=with_targets("train"),
        val=with_targets("val"),
        test=with_targets("test"),
        origin=origin,
        notes=f"source images by split ({source}): {counts}",
    )


def multi_mnist(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: Source = "files",
    download: bool = False,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Builds 36x36 canvases with two MNIST digits of different classes.

    The construction is that of Pareto-MTL and FS-MTL. The corner of the first digit is
    uniform in ``{0..4}^2``, that of the second in ``{4..8}^2``. Overlapping pixels take
    the maximum. The generator of these papers is not published, so this set is a
    re-creation. Compare differences between methods with the papers, and do not compare
    levels.

    Each training image is the first digit equally often. The papers' 120,000 training
    canvases are two passes over 60,000 digits. The second digit is uniform over the
    images of other classes. One twelfth of the training images (5,000 of 60,000) is
    held out for validation, independently of the seed. The test canvases use the test
    part only. With ``val_size=0``, no image is held out, as in the papers.

    Args:
      data_dir: With ``source="files"``, the folder that contains ``mnist/``, see
        :func:`mtljax.data.read_images`. With ``source="tfds"``, the folder of
        tensorflow-datasets, or a folder that contains it as ``tfds/``. None is its
        default folder.
      source: ``"files"`` or ``"tfds"``. The order of the images differs between the
        two, and so do the canvases of a seed.
      download: Whether tensorflow-datasets may download absent files. This needs the
        network and TensorFlow.
      seed: Seed of the pairs and the offsets.
      train_size: Number of training canvases. None is twice the number of training
        images, 120,000. A smaller set is a prefix of a larger one.
      val_size: Number of validation canvases. None is twice the number of held-out
        images, 10,000.
      test_size: Number of test canvases. None is twice the number of test images,
        20,000.

    Returns:
      A :class:`Dataset` with images ``[N, 36, 36, 1]`` uint8 in 0..255 and int32 labels
      ``left`` and ``right``.

    Raises:
      MissingDataError: If the files do not exist.
      DataError: If a file is damaged or an argument is out of range.

    Examples:
      >>> from mtljax.data import multi_mnist
      >>> multi_mnist()
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The mnist images are needed: pass...

    References:
      Lin et al., `Pareto Multi-Task Learning <https://arxiv.org/abs/1912.12854>`_,
      2019; Phan et al., `Beyond Losses Reweighting: Empowering Multi-Task Learning via
      the Generalization Perspective <https://arxiv.org/abs/2211.13723>`_, ICCV 2025.
      MNIST: LeCun and Cortes,
      CC BY-SA 3.0.
    """
    return _build(
        "multi_mnist",
        ("mnist", "mnist"),
        ("left", "right"),
        data_dir=data_dir,
        source=source,
        download=download,
        seed=seed,
        train_size=train_size,
        val_size=val_size,
        test_size=test_size,
    )


def multi_fashion(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: Source = "files",
    download: bool = False,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Builds 36x36 canvases with two Fashion-MNIST garments of different classes.

    The construction is that of :func:`multi_mnist`, from ``fashion_mnist/``. If only
    ``fashion_mnist_subset.npz`` exists, the default sizes are 20,000 / 1,666 / 8,406.
    This subset has 10,000 training and 4,203 test images that are not the official test
    part. Levels are then not comparable with the papers. ``notes`` records the number
    of source images of each split.

    Args:
      data_dir: Folder that contains ``fashion_mnist/``, see :func:`multi_mnist`.
      source: ``"files"`` or ``"tfds"``.
      download: Whether tensorflow-datasets may download absent files.
      seed: Seed of the pairs and the offsets.
      train_size: Number of training canvases. None is twice the number of training
        images.
      val_size: Number of validation canvases. None is twice the number of held-out
        images.
      test_size: Number of test canvases. None is twice the number of test images.

    Returns:
      A :class:`Dataset` with images ``[N, 36, 36, 1]`` uint8 in 0..255 and int32 labels
      ``left`` and ``right``.

    Raises:
      MissingDataError: If the files do not exist.
      DataError: If a file is damaged or an argument is out of range.

    Examples:
      >>> from mtljax.data import multi_fashion
      >>> multi_fashion()
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The fashion_mnist images are needed: pass...

    References:
      As :func:`multi_mnist`. Xiao et al., `Fashion-MNIST
      <https://arxiv.org/abs/1708.07747>`_, 2017 (MIT licence).
    """
    return _build(
        "multi_fashion",
        ("fashion_mnist", "fashion_mnist"),
        ("left", "right"),
        data_dir=data_dir,
        source=source,
        download=download,
        seed=seed,
        train_size=train_size,
        val_size=val_size,
        test_size=test_size,
    )


def multi_fashion_mnist(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: Source = "files",
    download: bool = False,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Builds 36x36 canvases with a MNIST digit and a Fashion-MNIST garment.

    The construction is that of :func:`multi_mnist`. The digit is the first item, at the
    top left, and the garment is the second. All pairs are allowed, because digits and
    garments have no common class. The sizes are determined by the digits. With the
    Fashion-MNIST subset of :func:`multi_fashion`, each garment occurs about twelve
    times in 120,000 canvases.

    Args:
      data_dir: Folder that contains ``mnist/`` and ``fashion_mnist/``, see
        :func:`multi_mnist`.
      source: ``"files"`` or ``"tfds"``.
      download: Whether tensorflow-datasets may download absent files.
      seed: Seed of the pairs and the offsets.
      train_size: Number of training canvases. None is twice the number of training
        digits.
      val_size: Number of validation canvases. None is twice the number of held-out
        digits.
      test_size: Number of test canvases. None is twice the number of test digits.

    Returns:
      A :class:`Dataset` with images ``[N, 36, 36, 1]`` uint8 in 0..255 and int32 labels
      ``digit`` and ``fashion``.

    Raises:
      MissingDataError: If the files do not exist.
      DataError: If a file is damaged or an argument is out of range.

    Examples:
      >>> from mtljax.data import multi_fashion_mnist
      >>> multi_fashion_mnist()
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The mnist images are needed: pass...

    References:
      As :func:`multi_mnist` and :func:`multi_fashion`.
    """
    return _build(
        "multi_fashion_mnist",
        ("mnist", "fashion_mnist"),
        ("digit", "fashion"),
        data_dir=data_dir,
        source=source,
        download=download,
        seed=seed,
        train_size=train_size,
        val_size=val_size,
        test_size=test_size,
    )
