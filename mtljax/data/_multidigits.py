"""multidigits: two real 8x8 digits on one canvas, from scikit-learn."""

import functools
from typing import Any

import numpy as np

from mtljax.data import _overlay
from mtljax.data.types import SPLITS, Dataset, Task
from mtljax.extras import require

CANVAS = _overlay.Canvas(size=12, shift=1, offset=3)
IMAGE_MAX = 16
_SOURCES = {
    "train": slice(0, 1200),
    "val": slice(1200, 1400),
    "test": slice(1400, None),
}


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    require("mtljax.data.multidigits", "train", "sklearn")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = _overlay.permutation(0, size=len(digits.target))
    pools = {split: order[part] for split, part in _SOURCES.items()}
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.int32)
    return images, labels, pools


def multidigits(
    *,
    seed: int = 0,
    train_size: int = 6000,
    val_size: int = 1000,
    test_size: int = 2000,
) -> Dataset:
    """Builds images of two overlaid 8x8 digits with three tasks: left, right and ink.

    scikit-learn contains 1797 digits (real handwriting of 13 writers). They are divided
    into 1200 for training, 200 for validation and 397 for test. The division does not
    depend on the seed and the sizes, and no digit is in two splits. Two digits of
    different classes are placed on a 12x12 canvas. The first has its corner in ``{0,
    1}^2``, the second in ``{3, 4}^2``, so that 16 to 36 of 64 pixels overlap.
    Overlapping pixels take the maximum.

    Tasks:

    - ``left``, ``right``: Class 0 to 9 of the digit at the top left and bottom right.
    - ``ink``: Ink of the left digit minus ink of the right one, before the overlay, in
      units of one black pixel. A digit has 19.5 ± 2.2 of them. The target has mean 0
      and variance 9.6 and is not standardised on purpose. A squared error then starts
      at about four times the initial cross-entropy, ``log(10) = 2.3``, so that the
      tasks differ in scale.

    Args:
      seed: Seed of the pairs and the offsets. The division of digits is fixed.
      train_size: Number of training canvases. A smaller set is a prefix of a larger
        one.
      val_size: Number of validation canvases, may be 0.
      test_size: Number of test canvases.

    Returns:
      A :class:`Dataset` with images ``[N, 12, 12, 1]`` uint8 in 0..16
      (``image_max=16``), int32 labels, and float32 ink. ``origin[split]["source"]``
      contains indices of ``load_digits()``.

    Raises:
      DataError: If a size or the seed is negative.

    Examples:
      >>> from mtljax.data import multidigits
      >>> digits = multidigits(train_size=100, val_size=10, test_size=10)
      >>> digits.train["image"].shape, [task.name for task in digits.tasks]
      ((100, 12, 12, 1), ['left', 'right', 'ink'])

    References:
      Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
      <https://doi.org/10.24432/C50P49>`_, UCI, 1998 (test part; CC BY 4.0).
    """
    images, labels, pools = _digits()
    pairs = {}
    for split in SPLITS:
        items = _overlay.Items(images, labels, pools[split])
        pairs[split] = (items, items)
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    canvases, origin = _overlay.build_splits(pairs, CANVAS, sizes, seed)

    ink = images.sum(axis=(1, 2), dtype=np.int32)

    def with_targets(split: str) -> dict[str, np.ndarray]:
        left, right = origin[split]["source"].T
        difference = (ink[left] - ink[right]).astype(np.float32) / IMAGE_MAX
        return {
            "image": canvases[split],
            "left": labels[left],
            "right": labels[right],
            "ink": difference.astype(np.float32),
        }

    return Dataset(
        name="multidigits",
        tasks=(
            Task("left", "classification", 10),
            Task("right", "classification", 10),
            Task("ink", "regression", 1),
        ),
        input_shape=(CANVAS.size, CANVAS.size, 1),
        train=with_targets("train"),
        val=with_targets("val"),
        test=with_targets("test"),
        image_max=IMAGE_MAX,
        origin=origin,
        notes="sources: 1200 / 200 / 397 of scikit-learn's 1797 digits (CC BY 4.0)",
    )
