"""nyuv2_frames: two indoor frames with class, depth and normals."""

import os

import numpy as np

from mtljax.data import files
from mtljax.data.files import Field
from mtljax.data.types import MISSING, Dataset, Split, Task

_SHAPE = (480, 640)
_FRAMES = {"train": "000433", "test": "000464"}
_METRE = 5000  # units of the depth file
CLASSES = 40


def nyuv2_frames(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads two frames of NYUv2, one for training and one for test.

    The labels are real and have the format of the whole set. They are sufficient to
    test a loss or a metric, or to overfit a network on purpose. They are not sufficient
    for results.

    Args:
      data_dir: Folder that contains ``nyuv2_frames/000433_rgb.png`` and six other
        files.

    Returns:
      A :class:`Dataset` with images ``[1, 480, 640, 3]`` uint8 and three tasks.
      ``class`` is int32 with 40 classes, and -1 if missing. ``depth`` is float32 in
      metres, and NaN if missing. ``normal`` ``[1, 480, 640, 3]`` contains float32 unit
      vectors, and is NaN in the test split, whose frame has no normals. The validation
      split is empty.

    Raises:
      MissingDataError: If a file does not exist.
      DataError: If a file is damaged.

    Examples:
      >>> from mtljax.data import load
      >>> load("nyuv2_frames")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The nyuv2_frames files are needed: ...

    References:
      Silberman et al., `Indoor Segmentation and Support Inference from RGBD Images
      <https://doi.org/10.1007/978-3-642-33715-4_54>`_, 2012 (research use).
    """

    def read(frame: str, kind: str, field: Field) -> np.ndarray:
        path = files.find(data_dir, "nyuv2_frames", f"{frame}_{kind}.png")
        return files.read_png(path, field)

    def split(frame: str) -> Split:
        colours = Field("uint8", (*_SHAPE, 3))
        image = read(frame, "rgb", colours)
        label = read(frame, "segm", Field("uint8", _SHAPE))
        label = np.where(label == 255, MISSING, label.astype(np.int32))
        depth = read(frame, "depth", Field("integer", _SHAPE, 0, 2**16 - 1))
        depth = np.where(depth > 0, depth / np.float32(_METRE), np.nan)
        if frame == _FRAMES["test"]:
            normal = np.full(image.shape, np.nan, np.float32)
        else:
            normal = read(frame, "normal", colours) / np.float32(127.5) - 1
            normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
        return {
            "image": image[None],
            "class": label[None].astype(np.int32),
            "depth": depth[None].astype(np.float32),
            "normal": normal[None].astype(np.float32),
        }

    train = split(_FRAMES["train"])
    return Dataset(
        name="nyuv2_frames",
        tasks=(
            Task("class", "segmentation", CLASSES),
            Task("depth", "dense_regression", 1),
            Task("normal", "dense_regression", 3),
        ),
        input_shape=(*_SHAPE, 3),
        train=train,
        val={k: v[:0] for k, v in train.items()},
        test=split(_FRAMES["test"]),
        notes="two frames of NYUv2 (research use)",
    )
