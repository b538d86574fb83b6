"""Structures of data sets with several tasks: tasks, splits, checksum."""

import dataclasses
import hashlib
from typing import Literal, NamedTuple, TypeVar, cast

import jax
import numpy as np

Split = dict[str, np.ndarray]
Images = TypeVar("Images", bound=np.ndarray | jax.Array)

SPLITS = ("train", "val", "test")
MISSING = -1
"""Class of an example without a label. A missing regression target is NaN."""


class DataError(ValueError):
    """A data set cannot be built. The message says what to change."""


class MissingDataError(DataError, FileNotFoundError):
    """Files do not exist. The message names them and says how to provide them."""


class Task(NamedTuple):
    """One prediction target.

    Attributes:
      name: Key of the target array in a split.
      kind: ``"classification"`` (integer labels ``[N]``), ``"regression"`` (float
        targets ``[N]``, or ``[N, size]`` if ``size > 1``), ``"segmentation"`` (labels
        ``[N, H, W]``) or ``"dense_regression"`` (targets ``[N, H, W]`` or
        ``[N, H, W, size]``). A missing label is -1, and a missing target is NaN.
      size: Number of classes, or dimension of the target.
    """

    name: str
    kind: Literal["classification", "regression", "segmentation", "dense_regression"]
    size: int


def _check_targets(where: str, task: Task, array: np.ndarray) -> bool:
    """Checks a target array. Returns whether it has a label that is not missing."""
    classes = task.kind in ("classification", "segmentation")
    if array.dtype.kind not in ("iu" if classes else "f"):
        raise DataError(
            f"{where} has {task.name!r} as {array.dtype.name}; a {task.kind} needs "
            f"{'integers' if classes else 'floats'}."
        )
    if not array.size:
        return False
    if not classes:
        if np.isinf(array).any():
            raise DataError(f"{where} has infinite targets in {task.name!r}.")
        return not bool(np.isnan(array).all())
    low, high = int(array.min()), int(array.max())
    if low < MISSING or high >= task.size:
        raise DataError(
            f"{where} has labels from {low} to {high} in {task.name!r}; they must be "
            f"classes 0 to {task.size - 1}, or {MISSING} for a missing label."
        )
    return high > MISSING


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Inputs with one target per task, in memory, as NumPy arrays.

    Attributes:
      name: Name of the data set.
      tasks: Tasks, in order.
      input_shape: Shape ``(H, W, C)`` of one input.
      train: ``{"image": [N, H, W, C], task name: [N]}``. The key of the inputs is
        ``"image"`` for all kinds of data. Images are uint8. The features of a table
        are float32 of shape ``[N, features, 1, 1]``.
      val: Split for model selection, may be empty (``N = 0``).
      test: Split for reported numbers.
      image_max: Largest possible value of a pixel, see :func:`to_float`.
      origin: Source of the examples of each split, documented by each data set. If an
        example shows two images on a canvas, ``"source"`` ``[N, 2]`` contains their
        indices, and ``"corner"`` ``[N, 2, 2]`` the (row, column) of their top-left
        corners.
      notes: Information about the sources, for readers of a result.

    Raises:
      DataError: If a split lacks a task, or arrays differ in length or shape from
        ``tasks`` and ``input_shape``. Also if a label is not a class of its task, a
        target is infinite, or the training split has no label of a task.

    Examples:
      >>> import numpy as np
      >>> from mtljax.data import Dataset, Task
      >>> image, age = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.float32)
      >>> split = {"image": image, "age": age}
      >>> tasks = (Task("age", "regression", 1),)
      >>> Dataset("faces", tasks, (8, 8, 1), split, split, split).num_tasks
      1
    """

    name: str
    tasks: tuple[Task, ...]
    input_shape: tuple[int, int, int]
    train: Split
    val: Split
    test: Split
    image_max: int = 255
    origin: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def __post_init__(self):
        keys = ("image", *(task.name for task in self.tasks))
        for split in SPLITS:
            arrays: Split = getattr(self, split)
            if set(arrays) != set(keys):
                raise DataError(
                    f"The {split} split of {self.name!r} has arrays {sorted(arrays)}; "
                    f"its tasks ask for {sorted(keys)}."
                )
            if arrays["image"].shape[1:] != self.input_shape:
                raise DataError(
                    f"The images of the {split} split of {self.name!r} have shape "
                    f"{arrays['image'].shape[1:]}, not {self.input_shape}."
                )
            lengths = {key: len(arrays[key]) for key in keys}
            if len(set(lengths.values())) != 1:
                raise DataError(
                    f"The arrays of the {split} split of {self.name!r} differ in "
                    f"length: {lengths}."
                )
            for task in self.tasks:
                where = f"The {split} split of {self.name!r}"
                known = _check_targets(where, task, arrays[task.name])
                if split == "train" and len(arrays["image"]) and not known:
                    raise DataError(f"{where} has no label of {task.name!r}.")

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.tasks)


def to_float(images: Images, image_max: int = 255) -> Images:
    """Scales integer images to float32 in [0, 1].

    Data sets store integers to save memory. Call this function after the gather, inside
    ``jit``.

    Args:
      images: NumPy or JAX array of any shape.
      image_max: Largest possible value of a pixel, ``dataset.image_max``.

    Returns:
      ``images / image_max`` in float32 with the same shape. The result of a NumPy array
      is a NumPy array.

    Examples:
      >>> import numpy as np
      >>> from mtljax.data import to_float
      >>> to_float(np.array([0, 8, 16], np.uint8), image_max=16)
      array([0. , 0.5, 1. ], dtype=float32)
    """
    return cast(Images, images.astype(np.float32) / np.float32(image_max))


def checksum(dataset: Dataset) -> str:
    """Computes a digest of the examples, the labels and their order.

    Args:
      dataset: The data set. Its name, origin and notes are ignored.

    Returns:
      The hexadecimal sha256 of the tasks and of each array (key, type, shape,
      little-endian bytes). The order is train, val, test, and in each split the image,
      then the tasks. The result is the same on all platforms.

    Examples:
      >>> from mtljax.data import checksum, load
      >>> small = {"train_size": 8, "val_size": 2, "test_size": 2}
      >>> checksum(load("multidigits", **small)) == checksum(
      ...     load("multidigits", seed=1, **small)
      ... )
      False
    """
    digest = hashlib.sha256()
    digest.update(repr([tuple(task) for task in dataset.tasks]).encode())
    for split in SPLITS:
        arrays: Split = getattr(dataset, split)
        for key in ("image", *(task.name for task in dataset.tasks)):
            array = arrays[key]
            dtype = array.dtype.newbyteorder("<")
            digest.update(f"{split}/{key} {dtype.name} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    return digest.hexdigest()
