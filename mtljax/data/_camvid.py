"""camvid: road scenes with a class for each pixel."""

import os

import numpy as np

from mtljax.data import _tables
from mtljax.data.files import Field
from mtljax.data.types import MISSING, SPLITS, Dataset, Task

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "cyclist",
)


def camvid(*, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads 701 frames of road scenes, 72 x 96 pixels, with their official parts.

    Args:
      data_dir: Folder that contains ``camvid_72x96/camvid_72x96.npz``.

    Returns:
      A :class:`Dataset` with images ``[N, 72, 96, 3]`` uint8 and the task ``class``
      ``[N, 72, 96]`` int32. It has 11 classes, and -1 for pixels without a class. The
      names are in ``origin["classes"]["names"]``.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged.

    Examples:
      >>> from mtljax.data import load
      >>> load("camvid")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The camvid_72x96 files are needed: ...

    References:
      Brostow, Fauqueur and Cipolla, `Semantic object classes in video
      <https://doi.org/10.1016/j.patrec.2008.04.005>`_, 2009 (CC BY-NC 4.0).
    """
    fields = {}
    for part in SPLITS:
        fields[f"x_{part}"] = Field("uint8", (part, 72, 96, 3))
        fields[f"seg_{part}"] = Field("uint8", (part, 72, 96), 0, len(CLASSES))
    found = _tables.read_npz(data_dir, "camvid_72x96", "camvid_72x96.npz", fields)
    splits = {}
    for part in SPLITS:
        label = found[f"seg_{part}"].astype(np.int32)
        label[label == len(CLASSES)] = MISSING
        splits[part] = {"image": found[f"x_{part}"], "class": label}
    return Dataset(
        name="camvid",
        tasks=(Task("class", "segmentation", len(CLASSES)),),
        input_shape=(72, 96, 3),
        origin={"classes": {"names": np.array(CLASSES)}},
        notes="CamVid (CC BY-NC 4.0), averages of 5 x 5 pixels",
        **splits,
    )
