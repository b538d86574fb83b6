"""Trains one committed row of each experiment again and compares it.

Usage: ``python -m experiments.common.replay --data-dir DIR [--experiments NAME ...]``.
Each ``experiments/NAME/replay.py`` names the committed file, the fields that identify a
line and the number of lines to train. It trains lines of the same form. Each experiment
has a process of its own, with the backend, the flags of XLA and the number of cores of
its committed file, because the last bits of a number depend on them. The exit status is
1 if a line is absent, if a number differs by more than ``--tolerance``, or if data are
missing.
"""

import concurrent.futures
import dataclasses
import importlib
import math
import multiprocessing
import os
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


def committed_file(name: str) -> pathlib.Path:
    """Returns the file of the rows of an experiment that are trained again."""
    module = importlib.import_module(f"experiments.{name}.replay")
    return pathlib.Path(str(module.__file__)).parent / "results" / module.RESULTS


def prepare(head: Mapping[str, Any]) -> None:
    """Gives this process the backend, flags and cores of committed rows.

    Call it before JAX starts its backend. A platform without
    ``os.sched_setaffinity`` keeps all its cores.
    """
    os.environ["XLA_FLAGS"] = head["xla_flags"]
    os.environ["JAX_PLATFORMS"] = head["device"].rpartition("(")[2].rstrip(")")
    if hasattr(os, "sched_setaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[: head["cores"]])


def replay(name: str, data_dir: pathlib.Path | None, out: pathlib.Path) -> list[float]:
    """Returns the difference of each committed line that is trained again."""
    module = importlib.import_module(f"experiments.{name}.replay")
    config = dataclasses.replace(module.CONFIG, data_dir=data_dir, out=out)
    label = lambda row: tuple(str(row.get(key)) for key in module.KEYS)
    derived = getattr(module, "DERIVED", ())  # numbers that depend on other rows
    committed = {
        label(row): {name: row[name] for name in row if name not in derived}
        for row in read_rows(committed_file(name))[1]
    }
    from mtljax import training

    pairs = [(committed.get(label(row)), row) for row in module.rows(config)]
    found = [difference(old, training.to_json(new)) for old, new in pairs if old]
    return found if len(found) == module.LINES else [math.inf]


def replay_apart(
    name: str, data_dir: pathlib.Path | None, out: pathlib.Path
) -> list[float]:
    """Calls :func:`replay` in a process of its own, after :func:`prepare`."""
    head, _ = read_rows(committed_file(name))
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), prepare, (head,)
    ) as process:
        return process.submit(replay, name, data_dir, out).result()


def main(
    data_dir: pathlib.Path | None = None,
    experiments: Sequence[str] = NAMES,
    tolerance: float = 1e-6,
) -> None:
    """Prints one line per experiment.

    Args:
      data_dir: Folder of the data sets. multidigits needs none.
      experiments: Names of the experiments; default: all.
      tolerance: Largest accepted difference of a number.
    """
    unknown = sorted(set(experiments) - set(NAMES))
    if unknown:
        print(
            f"error: {', '.join(unknown)} cannot be replayed; the experiments are "
            f"{', '.join(NAMES)}.",
            file=sys.stderr,
        )
        sys.exit(2)
    failed = False
    for name in experiments:
        try:
            with tempfile.TemporaryDirectory() as out:
                found = replay_apart(name, data_dir, pathlib.Path(out))
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        worst = max(found, default=math.inf)
        failed |= not worst <= tolerance
        print(f"{name}: {len(found)} lines, largest difference {worst:.2g}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
