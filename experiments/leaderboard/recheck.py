"""Trains finished parts of the leaderboard again and compares the numbers.

A cell is a row on a set, with all its rates and seeds. On the same machine with the
same versions the numbers are equal bit by bit.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common.config import ConfigError
from experiments.common.replay import difference
from experiments.leaderboard import packed, queue, report, train
from experiments.leaderboard.config import Config
from experiments.leaderboard.queue import Job
from mtljax import training

SEED = 0
"""Seed of the choice of cells."""
Lines = Sequence[Mapping[str, Any]]


def finished(config: Config) -> dict[Job, Lines]:
    """Lines of the finished jobs with rows, from the jobs or from the packed rows."""
    lines = queue.read_rows(config.out, queue.jobs(config))
    if not lines and (config.out / packed.ROWS).is_file():
        lines = packed.unpack(config.out / packed.ROWS)
    return {job: mine for job, mine in packed.by_job(lines).items() if len(mine) > 1}


def sample(jobs: Sequence[Job], count: int) -> list[Job]:
    """Chooses jobs at random. More jobs include fewer ones.

    Examples:
      >>> jobs = [Job("enb", str(row)) for row in range(9)]
      >>> sample(jobs, 2) == sample(jobs, 3)[:2], len(sample(jobs, 99))
      (True, 9)
    """
    order = np.random.default_rng(SEED).permutation(len(jobs))
    return [jobs[i] for i in order[:count]]


def compare(old: Lines, new: Lines) -> float:
    """Largest difference of two lists of lines: 0 if equal, infinite if not alike."""
    plain = [json.loads(json.dumps(training.to_json(line))) for line in new]
    if list(old) == plain:
        return 0.0
    texts = lambda line: {k: v for k, v in line.items() if isinstance(v, str)}
    if [texts(line) for line in old] != [texts(line) for line in plain]:
        return float("inf")
    return max(difference(one, other) for one, other in zip(old, plain, strict=True))


def recheck(config: Config, say: Any) -> list[float]:
    """Trains ``config.recheck`` finished cells again, in a temporary folder.

    Returns:
      The largest difference of a number of each cell, infinite if lines differ.

    Raises:
      ConfigError: If there are no finished cells, or the data differ from theirs.
    """
    lines = finished(config)
    if not lines:
        raise ConfigError(f"--recheck: {config.out} has no finished rows.")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        fresh = dataclasses.replace(config, out=pathlib.Path(folder), cost_rounds=0)
        for job in sample(list(lines), config.recheck):
            head, *old = lines[job]
            on = train.cached_problem(fresh, job.set)
            if on.digest != head["data"]:
                raise ConfigError(
                    f"--recheck: the data of {job.set} are not those of the rows."
                )
            equal = lines.get(Job(job.set, queue.EQUAL), ())
            rates = queue.offered(config, job, equal)
            new = train.train_row(fresh, on, job.row, rates)
            found.append(compare(old, new))
            say(f"{job.set} {job.row}: largest difference {found[-1]:.2g}")
    return found


def sentence(found: Sequence[float], config: Config) -> str:
    """The result in one sentence."""
    cells = report.counted(len(found), "cell")
    if not any(found):
        return f"{cells} trained again, and all numbers are equal bit by bit."
    differ = sum(one > 0 for one in found)
    return (
        f"{cells} trained again, and {differ} differ, by at most {max(found):.2g}"
        f"{_other_machine(config)}."
    )


def _other_machine(config: Config) -> str:
    """What differs from the process that wrote the header, if anything is known."""
    head = report.read_json(config.out / "header.json")
    now = training.environment()
    if not head:
        return "; the folder has no header with versions"
    names = [k for k, v in now["versions"].items() if head["versions"].get(k) != v]
    names += ["device"] if head["device"] != now["device"] else []
    return f"; other {', '.join(names)} than in the header" if names else ""
