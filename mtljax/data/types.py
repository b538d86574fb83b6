"""What a data set with several tasks is: tasks, splits, provenance, checksum."""

import dataclasses
import hashlib
from typing import Literal, NamedTuple, TypeVar, cast

import jax
import numpy as np

Split = dict[str, np.ndarray]
Images = TypeVar("Images", bound=np.ndarray | jax.Array)

SPLITS = ("train", "val", "test")
MISSING = -1
"""The class of an example without a label. A missing regression target is NaN."""


class DataError(ValueError):
    """A data set that cannot be built as asked; the message says what to change."""


class MissingDataError(DataError, FileNotFoundError):
    """Files that are not there; the message names them and how to provide them."""


class Task(NamedTuple):
    """One thing to predict from the image.

    Attributes:
      name: Key of the target array in a split.
      kind: ``"classification"`` (integer labels ``[N]``), ``"regression"`` (float
        targets ``[N]``, or ``[N, size]`` when ``size > 1``), ``"segmentation"`` (labels
        ``[N, H, W]``) or ``"dense_regression"`` (targets ``[N, H, W]`` or
        ``[N, H, W, size]``). A missing label is -1, a missing target NaN.
      size: Number of classes, or dimension of the target.
    """

    name: str
    kind: Literal["classification", "regression", "segmentation", "dense_regression"]
    size: int


def _check_targets(where: str, task: Task, array: np.ndarray) -> bool:
    """Whether a target array of the right type has a label that is not missing."""
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
    """A set of images with one target per task, in memory, as numpy arrays.

    Attributes:
      name: The name :func:`mtljax.data.load` knows it by.
      tasks: What there is to predict, in order.
      input_shape: ``(H, W, C)`` of one image.
      train: ``{"image": [N, H, W, C], task name: [N]}``; images are uint8.
      val: The same for model selection; may be empty (``N = 0``).
      test: The same for the reported number.
      image_max: The largest value a pixel can take; see :func:`to_float`.
      origin: Per split, where the examples come from: ``"source"`` ``[N, 2]``, the
        indices of the two source images, and ``"corner"`` ``[N, 2, 2]``, the (row,
        column) of the top-left corner of each on the canvas.
      notes: What a reader of a result should know about the sources.

    Raises:
      DataError: If a split lacks a task, its arrays differ in length or shape from what
        ``tasks`` and ``input_shape`` say, a label is no class of its task, a target is
        infinite, or the training split has no label of a task at all.

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

    Sets are kept as integers so that they stay small; call this after the gather,
    inside ``jit``.

    Args:
      images: Any shape, numpy or jax.
      image_max: The largest value a pixel can take, ``dataset.image_max``.

    Returns:
      ``images / image_max`` in float32, same shape, numpy in numpy out.

    Examples:
      >>> import numpy as np
      >>> from mtljax.data import to_float
      >>> to_float(np.array([0, 8, 16], np.uint8), image_max=16)
      array([0. , 0.5, 1. ], dtype=float32)
    """
    return cast(Images, images.astype(np.float32) / np.float32(image_max))


def checksum(dataset: Dataset) -> str:
    """A digest that changes whenever an example, a label or their order changes.

    Args:
      dataset: What to digest; its name, origin and notes do not enter.

    Returns:
      The sha256, in hexadecimal, of the tasks and of every array (key, type, shape,
      little-endian bytes) in the order train, val, test and, in each, image first and
      then the tasks. The same on every platform.

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
