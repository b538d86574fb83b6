"""The MultiMNIST family: two 28x28 images on a 36x36 canvas, one task each."""

import os
from typing import Literal

import numpy as np

from mtljax.data import _overlay, catalogue, files
from mtljax.data.files import ImageParts
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Task

CANVAS = _overlay.Canvas(size=36, shift=4, offset=4)
_VAL_SHARE = 12  # one source image in so many is held out for validation

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
    """Indices by split; train and val into the training part, test into the test."""
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
                f"{name} overlays 28x28 images; those of {key} are "
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
    """Two MNIST digits of different classes on a 36x36 canvas; name both.

    The construction that Pareto-MTL states and FS-MTL uses: the corner of the first
    digit is uniform in ``{0..4}^2``, of the second in ``{4..8}^2``; where they overlap
    the maximum is kept. The generator of those papers is not published, so this is a
    re-creation: compare differences between methods with theirs, not levels.

    Every training image is the first digit equally often (the papers' 120,000 training
    canvases are two passes over 60,000 digits); the partner is uniform over the images
    of other classes. A fixed twelfth of the training images is held out for validation
    (5,000 of MNIST's 60,000; which ones does not depend on the seed); the test part
    makes the test canvases and nothing else. ``val_size=0`` holds nothing out, as the
    papers do.

    Args:
      data_dir: With ``source="files"``, the folder that holds ``mnist/`` (see
        :func:`mtljax.data.read_images` for the files). With ``source="tfds"``, the
        folder of tensorflow-datasets, or one that holds it as ``tfds/``; None is its
        default folder.
      source: ``"files"`` or ``"tfds"``. The order of the images differs between the
        two, hence the canvases of a seed do too; the code is the same.
      download: Let tensorflow-datasets fetch what is not there (needs the network and
        TensorFlow).
      seed: Of the pairs and the offsets.
      train_size: Number of training canvases; None is twice the images of the training
        part, 120,000. A smaller set is a prefix of a larger one.
      val_size: None is twice the images held out, 10,000.
      test_size: None is twice the images of the test part, 20,000.

    Returns:
      Images ``[N, 36, 36, 1]`` uint8 in 0..255, int32 labels ``left`` and ``right``.

    Raises:
      MissingDataError: If the files are not there.
      DataError: If a file is damaged or an argument is out of range.

    Examples:
      >>> from mtljax.data import multi_mnist
      >>> multi_mnist()
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The mnist images are needed: pass...

    References:
      Lin et al., `Pareto Multi-Task Learning <https://arxiv.org/abs/1912.12854>`_,
      2019; Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
      Regions <https://arxiv.org/abs/2211.13723>`_, 2022. MNIST: LeCun and Cortes,
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
    """Two Fashion-MNIST garments of different classes on a 36x36 canvas; name both.

    Built like :func:`multi_mnist`, from ``fashion_mnist/``. When only a subset of
    Fashion-MNIST is at hand (``fashion_mnist_subset.npz``, 10,000 training and 4,203
    test images that are not the official test part), the default sizes follow it,
    20,000 / 1,666 / 8,406, and levels are not comparable with the papers; ``notes``
    records how many source images each split had.

    Args:
      data_dir: As in :func:`multi_mnist`, for the folder ``fashion_mnist/``.
      source: ``"files"`` or ``"tfds"``.
      download: Let tensorflow-datasets fetch what is not there.
      seed: Of the pairs and the offsets.
      train_size: Number of training canvases; None is twice the training images.
      val_size: Number of validation canvases; None is twice the images held out.
      test_size: Number of test canvases; None is twice the test images.

    Returns:
      Images ``[N, 36, 36, 1]`` uint8 in 0..255, int32 labels ``left`` and ``right``.

    Raises:
      MissingDataError: If the files are not there.
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
    """A MNIST digit and a Fashion-MNIST garment on a 36x36 canvas; name both.

    Built like :func:`multi_mnist`: the digit is the first item, at the top left, the
    garment the second. A digit and a garment are never of one class, so every pair is
    allowed. Sizes follow the digits: with the Fashion subset of :func:`multi_fashion`
    a garment comes about twelve times in 120,000 canvases.

    Args:
      data_dir: As in :func:`multi_mnist`, for ``mnist/`` and ``fashion_mnist/``.
      source: ``"files"`` or ``"tfds"``.
      download: Let tensorflow-datasets fetch what is not there.
      seed: Of the pairs and the offsets.
      train_size: Number of training canvases; None is twice the training digits.
      val_size: Number of validation canvases; None is twice the digits held out.
      test_size: Number of test canvases; None is twice the test digits.

    Returns:
      Images ``[N, 36, 36, 1]`` uint8 in 0..255, int32 labels ``digit`` and ``fashion``.

    Raises:
      MissingDataError: If the files are not there.
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
