"""mulan_multilabel: small real tables with several binary labels."""

import os
from typing import Any

from mtljax.data import _tables
from mtljax.data._mulan import task_names
from mtljax.data.files import Field
from mtljax.data.types import DataError, Dataset, Task

SUBSETS = ("birds", "emotions", "scene", "yeast")


def mulan_multilabel(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    subset: str = "emotions",
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
) -> Dataset:
    """Loads a multi-label set of the Mulan collection with 6 to 19 binary tasks.

    The official test part is kept. Features are standardised by the training split.

    Args:
      data_dir: Folder that contains ``mulan_multilabel/SUBSET.npz``.
      subset: ``birds`` (19 labels), ``emotions`` (6), ``scene`` (6) or ``yeast`` (14).
      seed: Seed of the shuffle that takes the validation split from the training part.
      train_size: Number of training rows. None takes all remaining rows.
      val_size: Number of validation rows. None is a fifth.

    Returns:
      A :class:`Dataset` with ``image`` ``[N, features, 1, 1]`` float32 and one int32
      label (0 or 1) per task.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the subset is unknown, the file is damaged, or a size is too large.

    Examples:
      >>> from mtljax.data import load
      >>> load("mulan_multilabel", subset="yeast")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The mulan_multilabel files are needed: ...

    References:
      Tsoumakas et al., `Mulan: A Java Library for Multi-Label Learning
      <https://www.jmlr.org/papers/v12/tsoumakas11a.html>`_, 2011.
    """
    if subset not in SUBSETS:
        raise DataError(
            f"mulan_multilabel has no subset {subset!r}; it has {', '.join(SUBSETS)}."
        )
    fields = {"y_names": Field("text", ("labels",))}
    for part in ("train", "test"):
        fields[f"x_{part}"] = Field("real", (part, "features"))
        fields[f"y_{part}"] = Field("integer", (part, "labels"), 0, 1)
    found = _tables.read_npz(data_dir, "mulan_multilabel", f"{subset}.npz", fields)
    count = len(found["x_train"])
    val = count // 5 if val_size is None else val_size
    name = f"mulan_multilabel/{subset}"
    order = _tables.split(name, count, (train_size, val, 0), seed)
    wide = found["x_train"].astype("float64")
    _, scale = _tables.standardise(wide, order["train"])
    names = task_names(found["y_names"])

    def split(part: str, rows: Any = slice(None)):
        x = ((found[f"x_{part}"][rows] - scale["mean"]) / scale["std"]).astype("f4")
        y = found[f"y_{part}"][rows].astype("int32")
        return {"image": x[..., None, None]} | {k: y[:, i] for i, k in enumerate(names)}

    return Dataset(
        name="mulan_multilabel",
        tasks=tuple(Task(task, "classification", 2) for task in names),
        input_shape=(wide.shape[1], 1, 1),
        train=split("train", order["train"]),
        val=split("train", order["val"]),
        test=split("test"),
        image_max=1,
        notes=f"subset {subset} of the Mulan multi-label sets",
    )
