"""Numeric tables: reading ``.npz``, shuffled splits, standardisation."""

import os
from collections.abc import Mapping

import numpy as np

from mtljax.data import _overlay, files
from mtljax.data.types import SPLITS, DataError


def read_npz(
    data_dir: str | os.PathLike[str] | None,
    name: str,
    file: str,
    fields: Mapping[str, files.Field],
) -> dict[str, np.ndarray]:
    """Reads all arrays of ``fields`` from ``data_dir/name/file``.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, lacks an array, or an array differs from its
        field.
    """
    return files.read_npz(files.find(data_dir, name, file), fields)


def split(
    name: str, count: int, sizes: tuple[int | None, int, int], seed: int
) -> dict[str, np.ndarray]:
    """Shuffles once and returns indices for test, validation and the rest for training.

    Args:
      name: Name of the data set, for errors.
      count: Number of rows.
      sizes: Number of rows for training (None for all remaining), validation and test.
      seed: Seed of the shuffle.

    Returns:
      A dict ``{"train": [...], "val": [...], "test": [...]}``.

    Raises:
      DataError: If a size or the seed is negative, or the sizes exceed ``count``.
    """
    train, val, test = sizes
    for part, size in zip(SPLITS, sizes, strict=True):
        if size is not None and size < 0:
            raise DataError(f"{part}_size must be >= 0, not {size}.")
    if seed < 0:
        raise DataError(f"seed must be >= 0, not {seed}.")
    left = count - val - test
    train = left if train is None else train
    if train > left or left < 1:
        raise DataError(
            f"{name} has {count} examples; train_size={sizes[0]}, val_size={val} and "
            f"test_size={test} ask for more."
        )
    order = _overlay.permutation(seed, size=count)
    return {
        "train": order[test + val : test + val + train],
        "val": order[test : test + val],
        "test": order[:test],
    }


def standardise(
    columns: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scales columns ``[N, C]`` to mean 0 and deviation 1 over the training rows.

    A column that is constant in these rows becomes zero.

    Returns:
      The columns in float32, and ``mean`` and ``std`` ``[C]``.
    """
    mean, std = columns[train].mean(0), columns[train].std(0)
    std = np.where(std > 0, std, 1)
    scaled = ((columns - mean) / std).astype(np.float32)
    return scaled, {"mean": mean, "std": std}
