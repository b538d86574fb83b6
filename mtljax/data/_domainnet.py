"""domainnet: 345 classes of drawings and photographs in six domains."""

import os
from typing import Any

import numpy as np

from mtljax.data import _overlay, _tables, catalogue
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Split, Task
from mtljax.extras import require

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
"""Order of the domains in the paper's tables."""

CLASSES = 345
_BLOCK = 512  # images decoded at once


def domainnet(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    domain: str = "real",
    size: int = 64,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int = 1000,
    test_size: int | None = None,
    download: bool = False,
) -> Dataset:
    """Loads one of the six domains of DomainNet from tensorflow-datasets.

    The official test part is kept. The validation split is taken from the official
    training part by a shuffle. The central square of each image is cropped and resized
    to ``size`` by averaging. This is similar to the evaluation of the released
    ForkMerge code, which uses sizes 256 and 224 and random crops in training. Only the
    selected rows are decoded.

    The memory is ``3 size²`` bytes per image. The largest domain, ``real``, has about
    120 000 training images, or 1.5 GB at size 64.

    Args:
      data_dir: Folder of tensorflow-datasets, or a folder that contains it as
        ``tfds/``, with ``domainnet/DOMAIN/VERSION/*.array_record*``. None is its
        default folder.
      domain: ``clipart``, ``infograph``, ``painting``, ``quickdraw``, ``real`` or
        ``sketch``.
      size: Side of the images, in pixels.
      seed: Seed of the shuffle that divides the official training part.
      train_size: Number of training examples. None takes all remaining examples. A
        smaller set is a prefix of a larger one.
      val_size: Number of validation examples, may be 0.
      test_size: Number of test examples, selected by a shuffle. None takes the whole
        official part.
      download: Whether to download and prepare the set if it is absent. This needs the
        network and TensorFlow, see :func:`mtljax.data.tfds_source`.

    Returns:
      A :class:`Dataset` with images ``[N, size, size, 3]`` uint8 and the int32 task
      ``label`` of 345 classes. ``origin[split]["source"]`` ``[N]`` are positions in the
      official part.

    Raises:
      MissingDataError: If the set is not prepared in the folder.
      DataError: If the domain is unknown, or a size is too large.

    Examples:
      >>> from mtljax.data._domainnet import domainnet
      >>> domainnet(domain="photo")
      Traceback (most recent call last):
        ...
      mtljax.data.types.DataError: domainnet has no domain 'photo'; it has clipart, ...

    References:
      Peng et al., `Moment Matching for Multi-Source Domain Adaptation
      <https://arxiv.org/abs/1812.01754>`_, 2019.
    """
    if domain not in DOMAINS:
        raise DataError(
            f"domainnet has no domain {domain!r}; it has {', '.join(DOMAINS)}."
        )
    if size < 1:
        raise DataError(f"size must be a positive number of pixels, not {size}.")
    name = f"domainnet/{domain}"
    try:
        rows = {
            part: catalogue.tfds_source(
                name, part, data_dir=data_dir, download=download
            )
            for part in ("train", "test")
        }
    except MissingDataError as error:
        raise MissingDataError(
            f"tensorflow-datasets has no {name} prepared as array_record: pass "
            f"--data-dir DIR with DIR/{name}/VERSION/*.array_record*. Its method "
            "download_and_prepare writes these files, with network and TensorFlow."
        ) from error
    count = len(rows["test"])
    if test_size is not None and not 0 <= test_size <= count:
        raise DataError(
            f"{name} has {count} examples for test; test_size={test_size} does not fit."
        )
    chosen = _tables.split(name, len(rows["train"]), (train_size, val_size, 0), seed)
    chosen["test"] = np.arange(count)
    if test_size is not None:
        order = _overlay.permutation(seed, 1, size=count)
        chosen["test"] = np.sort(order[:test_size])

    def read(part: str) -> Split:
        return _read(rows["test" if part == "test" else "train"], chosen[part], size)

    return Dataset(
        name="domainnet",
        tasks=(Task("label", "classification", CLASSES),),
        input_shape=(size, size, 3),
        origin={part: {"source": chosen[part]} for part in SPLITS},
        notes=f"domain {domain}, shorter side {size} pixels, cut to a square",
        train=read("train"),
        val=read("val"),
        test=read("test"),
    )


def _read(rows: Any, chosen: np.ndarray, size: int) -> Split:
    images = np.empty((len(chosen), size, size, 3), np.uint8)
    labels = np.empty(len(chosen), np.int32)
    for begin in range(0, len(chosen), _BLOCK):
        block = [int(i) for i in chosen[begin : begin + _BLOCK]]
        for i, row in enumerate(rows.__getitems__(block), begin):
            images[i], labels[i] = square(row["image"], size), row["label"]
    return {"image": images, "label": labels}


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the central ``[size, size, 3]`` of an image after resizing it.

    Examples:
      >>> square(np.zeros((30, 50, 3), np.uint8), 10).shape
      (10, 10, 3)
    """
    require("mtljax.data.domainnet", "train", "PIL")
    from PIL import Image

    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    middle = Image.fromarray(image[top : top + side, left : left + side])
    # The kernel grows with the reduction, so that fine lines do not vanish.
    return np.asarray(middle.resize((size, size), Image.Resampling.BILINEAR))
