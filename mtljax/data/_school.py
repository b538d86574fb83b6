"""school: exam scores in 139 schools, with one regression task per school."""

import os

import numpy as np

from mtljax.data import _tables
from mtljax.data.files import Field
from mtljax.data.types import SPLITS, DataError, Dataset, Task

SCHOOLS = 139


def school(*, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Dataset:
    """Loads exam scores of 15,362 pupils with 27 features and 139 schools as tasks.

    Each pupil is an example of one task, and the targets of the other 138 are missing.
    A quarter of the pupils of a school is for test, and a seventh (at least two) for
    validation. Features and scores are standardised over the training pupils of all
    schools. Features are clipped to five deviations.

    Args:
      data_dir: Folder that contains ``school/school.npz``.
      seed: Seed of the order of the pupils.

    Returns:
      A :class:`Dataset` with ``image`` ``[N, 27, 1, 1]`` float32 and one float32 target
      per school, NaN if missing. ``origin[split]["task"]`` ``[N]`` is the school of
      each pupil. The pupils are sorted by school. ``origin["train"]["rounds"]`` ``[L,
      139]`` contains training examples, one of each school per row. In a column, each
      pupil of the school occurs once before a pupil is repeated.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, or a school has fewer than 8 pupils.

    Examples:
      >>> from mtljax.data import load
      >>> load("school")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The school files are needed: ...

    References:
      Argyriou, Evgeniou and Pontil, `Convex multi-task feature learning
      <https://doi.org/10.1007/s10994-007-5040-8>`_, 2008; data of the Inner London
      Education Authority.
    """
    if seed < 0:
        raise DataError(f"school: seed must be >= 0, not {seed}.")
    fields = {
        "x": Field("real", ("n", 28)),
        "y": Field("real", ("n",), 0, 100),
        "task": Field("integer", ("n",), 0, SCHOOLS - 1),
    }
    found = _tables.read_npz(data_dir, "school", "school.npz", fields)
    task = found["task"].astype(np.int32)
    pupils = np.bincount(task, minlength=SCHOOLS)
    if pupils.min() < 8:
        raise DataError(
            f"school: school {int(pupils.argmin())} has {pupils.min()} pupils; each "
            "needs 8."
        )
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {part: [] for part in SPLITS}
    for t in range(SCHOOLS):
        mine = rng.permutation(np.flatnonzero(task == t))
        a, b = len(mine) // 4, len(mine) // 4 + max(2, len(mine) // 7)
        rows["test"].append(mine[:a])
        rows["val"].append(mine[a:b])
        rows["train"].append(mine[b:])
    train = np.concatenate(rows["train"])
    x, y = found["x"][:, :-1], found["y"]  # the last feature is constant
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-3)
    mean, std = y[train].mean(), max(y[train].std(), np.float32(1e-6))
    x = np.clip(x, -5, 5).astype(np.float32)
    y = ((y - mean) / std).astype(np.float32)
    length = max(map(len, rows["train"]))

    def repeated(count):
        rounds = [rng.permutation(count) for _ in range(-(-length // count))]
        return np.concatenate(rounds)[:length]

    first = np.cumsum([0, *map(len, rows["train"])])[:-1]
    columns = [repeated(len(r)) + a for r, a in zip(rows["train"], first, strict=True)]
    names = [f"school_{t}" for t in range(SCHOOLS)]
    splits, origin = {}, {}
    for part in SPLITS:
        at = np.concatenate(rows[part])
        origin[part] = {"source": at, "task": task[at]}
        targets = np.full((SCHOOLS, len(at)), np.nan, np.float32)
        targets[task[at], np.arange(len(at))] = y[at]
        splits[part] = {"image": x[at, :, None, None]}
        splits[part] |= dict(zip(names, targets, strict=True))
    origin["train"]["rounds"] = np.stack(columns, 1)
    origin["targets"] = {
        "mean": np.full(SCHOOLS, mean, np.float64),
        "std": np.full(SCHOOLS, std, np.float64),
    }
    return Dataset(
        name="school",
        tasks=tuple(Task(name, "regression", 1) for name in names),
        input_shape=(27, 1, 1),
        image_max=1,
        origin=origin,
        notes="exam scores of the Inner London Education Authority",
        **splits,
    )
