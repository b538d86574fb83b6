"""domainnet: 345 things drawn, photographed and painted, a domain at a time."""

import os
from typing import Any

import numpy as np

from mtljax.data import _overlay, _tables, catalogue
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Split, Task
from mtljax.extras import require

DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
"""In the order of the paper's tables."""

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
    """One of the six domains of DomainNet, from tensorflow-datasets, in one shape.

    The official test part is kept, validation is cut from the official training part
    by a shuffle. The middle square of an image is cut out and brought to ``size`` by
    averaging: much like the evaluation of the released ForkMerge code, which works at
    256 and 224 and also crops at random in training. Only the rows that are asked for
    are decoded.

    Memory: ``3 size²`` bytes an image; ``real``, the largest domain, has some 120 000
    training images, 1.5 GB at 64.

    Args:
      data_dir: The folder of tensorflow-datasets, or one that holds it as ``tfds/``,
        with ``domainnet/DOMAIN/VERSION/*.array_record*``; None is its default.
      domain: ``clipart``, ``infograph``, ``painting``, ``quickdraw``, ``real`` or
        ``sketch``.
      size: Side of the images, in pixels.
      seed: Of the shuffle that divides the official training part.
      train_size: Examples for training; None takes all that are left. A smaller set is
        a prefix of a larger one.
      val_size: Examples for validation, may be 0.
      test_size: Examples for test, chosen by a shuffle; None is all of the official
        part.
      download: Fetch and prepare the set if it is not there, which needs the network
        and TensorFlow; see :func:`mtljax.data.tfds_source`.

    Returns:
      Images ``[N, size, size, 3]`` uint8 and the int32 task ``label`` of 345 classes.
      ``origin[split]["source"]`` ``[N]`` are positions in the official part.

    Raises:
      MissingDataError: If the set is not prepared there.
      DataError: If there is no such domain, or a size does not fit.

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
            f"--data-dir DIR with DIR/{name}/VERSION/*.array_record*, which its "
            "download_and_prepare writes where there are network and TensorFlow."
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
    """The middle ``[size, size, 3]`` of an image whose shorter side becomes ``size``.

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
