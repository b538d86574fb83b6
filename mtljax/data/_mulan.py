"""mulan_mtr: small real tables with several regression targets."""

import os
import re

import numpy as np

from mtljax.data import _tables, files
from mtljax.data.types import DataError, Dataset, Task

SUBSETS = (
    "andro", "atp1d", "edm", "enb", "jura", "oes10", "oes97", "sf1", "sf2", "slump",
    "wq",
)  # fmt: skip


def mulan_mtr(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    subset: str = "enb",
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Loads a multi-target regression set of the Mulan collection with 2 to 16 targets.

    Features and targets are standardised by the mean and deviation of the training
    split. A constant feature becomes zero. The original targets have different units.

    Args:
      data_dir: Folder that contains ``mulan_mtr/SUBSET.npz``.
      subset: One of ``andro``, ``atp1d``, ``edm``, ``enb``, ``jura``, ``oes10``,
        ``oes97``, ``sf1``, ``sf2``, ``slump``, ``wq``.
      seed: Seed of the shuffle that divides the rows.
      train_size: Number of training rows. None takes all remaining rows.
      val_size: Number of validation rows. None is a fifth.
      test_size: Number of test rows. None is a fifth.

    Returns:
      A :class:`Dataset` with ``image`` ``[N, features, 1, 1]`` float32 and one float32
      target per task. The names are those of the file, in lower case and without
      punctuation. ``origin["targets"]`` has the ``mean`` and ``std`` ``[T]`` that
      convert a standardised target to its unit.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the subset is unknown, or the file is damaged or too short.

    Examples:
      >>> from mtljax.data import load
      >>> load("mulan_mtr", subset="slump")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The mulan_mtr files are needed: ...

    References:
      Tsoumakas et al., `Mulan: A Java Library for Multi-Label Learning
      <https://www.jmlr.org/papers/v12/tsoumakas11a.html>`_, 2011.
    """
    if subset not in SUBSETS:
        raise DataError(
            f"mulan_mtr has no subset {subset!r}; it has {', '.join(SUBSETS)}."
        )
    fields = {
        "x": files.Field("real", ("rows", "features")),
        "y": files.Field("real", ("rows", "targets")),
        "y_names": files.Field("text", ("targets",)),
    }
    arrays = _tables.read_npz(data_dir, "mulan_mtr", f"{subset}.npz", fields)
    count = len(arrays["x"])
    fifth = count // 5
    sizes = (
        train_size,
        fifth if val_size is None else val_size,
        fifth if test_size is None else test_size,
    )
    order = _tables.split(f"mulan_mtr/{subset}", count, sizes, seed)
    wide = {key: arrays[key].astype(np.float64) for key in ("x", "y")}
    features, _ = _tables.standardise(wide["x"], order["train"])
    targets, statistics = _tables.standardise(wide["y"], order["train"])
    names = task_names(arrays["y_names"])
    splits = {
        part: {"image": features[rows, :, None, None]}
        | {task: targets[rows, i] for i, task in enumerate(names)}
        for part, rows in order.items()
    }
    return Dataset(
        name="mulan_mtr",
        tasks=tuple(Task(task, "regression", 1) for task in names),
        input_shape=(features.shape[1], 1, 1),
        image_max=1,
        origin={"targets": statistics},
        notes=f"subset {subset} of the Mulan multi-target sets",
        **splits,
    )


def task_names(names: np.ndarray) -> list[str]:
    """Returns short, distinct names that can be keys and file names."""
    short = [
        re.sub(r"[^a-z0-9]+", "_", str(n).lower()).strip("_")[:16] or "y" for n in names
    ]
    return [
        name if short.count(name) == 1 else f"{name}_{i}"
        for i, name in enumerate(short)
    ]
