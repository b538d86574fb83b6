"""Trains one committed row of each experiment again and compares it.

Usage: ``python -m experiments.common.replay --data-dir DIR [--experiments NAME ...]``.
Each ``experiments/NAME/replay.py`` names the committed file, the fields that identify a
line and the number of lines to train. It trains lines of the same form. The exit status
is 1 if a line is absent or a number differs by more than ``--tolerance``.
"""

import dataclasses
import importlib
import math
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.report import read_rows

NAMES = ("multidigits", "alternating", "forkmerge", "fs_mtl", "igb", "trajectories")
TIMES = ("seconds", "step_ms", "step_ratio", "milliseconds", "megabytes")


def numbers(value: Any) -> np.ndarray:
    """Returns all numbers of nested lists. None becomes NaN, texts are ignored."""
    if isinstance(value, str | Mapping):
        return np.zeros(0)
    if isinstance(value, list):
        return np.concatenate([np.zeros(0), *map(numbers, value)])
    return np.array([math.nan if value is None else value], np.float64)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """Returns the largest absolute difference of two lines, or infinity.

    Examples:
      >>> difference({"a": 1.0, "b": [2, None]}, {"a": 1.5, "b": [2, None], "c": 0})
      0.5
      >>> difference({"a": 1.0}, {})
      inf
    """
    largest = 0.0
    for name, value in old.items():
        if name in TIMES or not numbers(value).size:
            continue
        one, other = numbers(value), numbers(new.get(name))
        if one.shape != other.shape or (np.isnan(one) != np.isnan(other)).any():
            return math.inf
        known = ~np.isnan(one)
        largest = max(largest, float(np.abs(one - other)[known].max(initial=0)))
    return largest


def replay(name: str, data_dir: pathlib.Path | None, out: pathlib.Path) -> list[float]:
    """Returns the difference of each committed line that is trained again."""
    module = importlib.import_module(f"experiments.{name}.replay")
    folder = pathlib.Path(str(module.__file__)).parent / "results"
    config = dataclasses.replace(module.CONFIG, data_dir=data_dir, out=out)
    label = lambda row: tuple(str(row.get(key)) for key in module.KEYS)
    derived = getattr(module, "DERIVED", ())  # numbers that depend on other rows
    committed = {
        label(row): {name: row[name] for name in row if name not in derived}
        for row in read_rows(folder / module.RESULTS)[1]
    }
    from mtljax import training

    pairs = [(committed.get(label(row)), row) for row in module.rows(config)]
    found = [difference(old, training.to_json(new)) for old, new in pairs if old]
    return found if len(found) == module.LINES else [math.inf]


def main(
    data_dir: pathlib.Path | None = None,
    experiments: Sequence[str] = NAMES,
    tolerance: float = 1e-6,
) -> None:
    """Prints one line per experiment.

    Args:
      data_dir: Folder of the data sets. multidigits needs none.
      experiments: Names of the experiments.
      tolerance: Largest accepted difference of a number.
    """
    failed = False
    for name in experiments:
        with tempfile.TemporaryDirectory() as out:
            found = replay(name, data_dir, pathlib.Path(out))
        worst = max(found, default=math.inf)
        failed |= not worst <= tolerance
        print(f"{name}: {len(found)} lines, largest difference {worst:.2g}")
    sys.exit(int(failed))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
