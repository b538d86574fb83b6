"""adult: income, marriage and education in census records."""

import os

import numpy as np

from mtljax.data import _overlay, files
from mtljax.data.files import Field
from mtljax.data.types import DataError, Dataset, Split, Task

_NUMBERS = ("age", "weight", "gain", "loss", "hours")
_TEXTS = ("work", "occupation", "race", "sex", "country")
_COLUMNS = (
    *("age", "work", "weight", "education", "years", "marital", "occupation"),
    *("relationship", "race", "sex", "gain", "loss", "hours", "country", "income"),
)
_REALS = (*_NUMBERS, "years")
_COLLEGE = ("Bachelors", "Masters", "Prof-school", "Doctorate")
TASKS = ("income", "never_married", "college")


def adult(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int = 3000,
    test_size: int | None = None,
) -> Dataset:
    """Loads 48,842 records of the 1994 census, in two official parts, with three tasks.

    The tasks are whether the income is above 50,000 dollars, whether a person was never
    married, and whether the person has a college degree. Columns that reveal a task are
    not used as features: education and its years, marital status and relationship.
    Numbers are standardised, and texts become one column per value. Both use the
    training split only. A value that does not occur there has no column.

    Args:
      data_dir: Folder that contains ``adult/adult.data.gz`` and
        ``adult/adult.test.gz``.
      seed: Seed of the shuffle that takes the validation split from the training part.
      train_size: Number of training records. None takes all remaining records.
      val_size: Number of validation records, may be 0.
      test_size: Number of first records of the test part. None takes all.

    Returns:
      A :class:`Dataset` with ``image`` ``[N, features, 1, 1]`` float32 and one int32
      label (0 or 1) per task.

    Raises:
      MissingDataError: If a file does not exist.
      DataError: If a file is damaged, or a size is too large.

    Examples:
      >>> from mtljax.data import load
      >>> load("adult")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The adult files are needed: ...

    References:
      Becker and Kohavi, `Adult <https://doi.org/10.24432/C5XW20>`_, UCI, 1996
      (CC BY 4.0); tasks as in Ma et al., `Multi-gate Mixture-of-Experts
      <https://doi.org/10.1145/3219819.3220007>`_, 2018.
    """
    fields = {
        key: Field("real", ("n",), 0) if key in _REALS else Field("text", ("n",))
        for key in _COLUMNS
    }
    parts = []
    for file in ("adult.data.gz", "adult.test.gz"):
        path = files.find(data_dir, "adult", file)
        table = files.read_csv(path, fields)
        income = np.char.rstrip(table["income"], ".")
        if not np.isin(income, ("<=50K", ">50K")).all():
            raise DataError(
                f"File {str(path)!r}: column 'income' must be '<=50K' or '>50K'."
            )
        parts.append(table | {"income": income})
    first, second = (len(part["income"]) for part in parts)
    train_count = first - val_size if train_size is None else train_size
    tests = second if test_size is None else test_size
    sizes = (train_count, val_size, tests, seed)
    if min(sizes) < 0 or not 0 < train_count <= first - val_size or tests > second:
        raise DataError(
            f"adult has {first} records for training and validation and {second} for "
            f"test; train_size={train_size}, val_size={val_size}, "
            f"test_size={test_size} and seed={seed} do not fit."
        )
    order = _overlay.permutation(seed, size=first)
    rows = {
        "val": order[:val_size],
        "train": order[val_size : val_size + train_count],
        "test": first + np.arange(tests),
    }
    whole = {key: np.concatenate([part[key] for part in parts]) for key in _COLUMNS}
    train = {key: column[rows["train"]] for key, column in whole.items()}
    columns = []
    for key in _NUMBERS:
        std = train[key].std()
        columns.append((whole[key] - train[key].mean()) / (std if std > 0 else 1))
    for key in _TEXTS:
        columns += [whole[key] == value for value in np.unique(train[key])]
    features = np.stack(columns, 1).astype(np.float32)[..., None, None]
    labels = {
        "income": whole["income"] == ">50K",
        "never_married": whole["marital"] == "Never-married",
        "college": np.isin(whole["education"], _COLLEGE),
    }

    def split(at: np.ndarray) -> Split:
        return {"image": features[at]} | {
            task: labels[task][at].astype(np.int32) for task in TASKS
        }

    return Dataset(
        name="adult",
        tasks=tuple(Task(task, "classification", 2) for task in TASKS),
        input_shape=features.shape[1:],
        train=split(rows["train"]),
        val=split(rows["val"]),
        test=split(rows["test"]),
        image_max=1,
        origin={part: {"source": at} for part, at in rows.items()},
        notes="UCI Adult (CC BY 4.0)",
    )
