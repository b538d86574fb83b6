"""Jobs in files: one per set and row, shared by any number of processes.

A job has the folder ``out/SET/ROW``. It is finished if ``rows.jsonl`` exists, which is
written under another name and then renamed. The lock of a job is released by the
operating system when its process ends, also after ``kill -9``. Such an end loses the
job that was being trained, and no other.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.config import ConfigError, folder_name
from experiments.common.provenance import settings
from experiments.leaderboard.config import EQUAL, SETS, Config
from mtljax import training

MAY_DIFFER = (
    *("sets", "methods", "add", "jobs", "train_only", "report_only", "plots"),
    *("cost_sets", "cost_rounds", "tensorboard", "check_sets", "recheck"),
    "start_from",
)
"""Options that do not change the numbers of a job."""
POLL = 0.5  # seconds


class Job(NamedTuple):
    """A row on a set."""

    set: str
    row: str

    def folder(self, out: pathlib.Path) -> pathlib.Path:
        """Its folder."""
        return out / folder_name(self.set) / folder_name(self.row)

    def done(self, out: pathlib.Path) -> bool:
        """Whether its rows are complete."""
        return (self.folder(out) / "rows.jsonl").is_file()


def jobs(config: Config) -> list[Job]:
    """All jobs in the order of training: the sets in the order of their cost."""
    known = list(SETS)
    order = sorted(
        config.sets, key=lambda n: known.index(n) if n in known else len(known)
    )
    return [Job(name, row) for name in order for row in config.rows]


def about(config: Config) -> dict[str, Any]:
    """The settings on which the numbers of a job depend."""
    found = settings(config)
    return {key: value for key, value in found.items() if key not in MAY_DIFFER}


def open_folder(config: Config) -> None:
    """Creates the folder of the results, or checks that it belongs to these settings.

    Raises:
      ConfigError: If results exist and neither --resume nor --overwrite is given, or
        the settings differ from those of the results, or there are none to read.
    """
    path, head = config.out / "about.json", config.out / "header.json"
    reading = config.report_only or bool(config.recheck)
    if config.overwrite and config.out.is_dir():
        for name in ("about.json", "results.jsonl.gz", "leaderboard.json"):
            (config.out / name).unlink(missing_ok=True)
        for folder in config.out.glob("*/*/"):
            if (folder / ".lock").is_file() or (folder / "rows.jsonl").is_file():
                shutil.rmtree(folder)
    if path.is_file():
        old = json.loads(path.read_text("utf-8"))
    elif reading and head.is_file():  # the files of a report only
        old = json.loads(head.read_text("utf-8"))["config"]
    elif reading:
        option = "--report-only" if config.report_only else "--recheck"
        raise ConfigError(f"{option}: {config.out} has no results.")
    else:
        write(path, json.dumps(about(config), indent=1, sort_keys=True) + "\n")
        return
    advice = " Choose another --out, or --overwrite."
    check_settings(config, old, str(config.out), advice)
    if not (config.resume or reading or config.train_only):
        raise ConfigError(f"{config.out} has results. Add --resume or --overwrite.")


def check_settings(
    config: Config, old: Mapping[str, Any], where: str, advice: str = ""
) -> None:
    """Raises a :class:`ConfigError` if results belong to other settings."""
    differ = [key for key, value in about(config).items() if old.get(key) != value]
    if differ:
        raise ConfigError(
            f"{where} has results of other settings ({', '.join(differ)}).{advice}"
        )


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file, so that it is never incomplete under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def work(config: Config, parent: int | None = None) -> Iterator[tuple[Job, float]]:
    """Trains the jobs that are neither finished nor trained by another process.

    Args:
      config: The configuration.
      parent: Process whose end also ends this one.

    Yields:
      Each finished job and its seconds.
    """
    left = jobs(config)
    while left:
        waiting, progress = [], False
        for job in left:
            if parent is not None and os.getppid() != parent:
                return
            if job.done(config.out):
                continue
            rates = grid(config, job)
            if rates is None:
                waiting.append(job)
                continue
            try:
                with training.lock_run(job.folder(config.out)):
                    if not job.done(config.out):
                        yield job, train_job(config, job, rates)
                        progress = True
            except training.RunLockedError:
                if job.row == EQUAL:  # its process may end before it is finished
                    waiting.append(job)
        left = waiting
        if left and not progress:
            time.sleep(POLL)


def grid(config: Config, job: Job) -> tuple[float, ...] | None:
    """The learning rates that a row is offered on a set.

    If equal weights select an end of the grid, they extend it, and all rows of the set
    start from the longer grid. The result is None while equal weights are not finished.
    """
    equal = Job(job.set, EQUAL)
    if job.row != EQUAL and not equal.done(config.out):
        return None
    return offered(config, job, read_rows(config.out, [equal]))


def offered(
    config: Config, job: Job, equal: Sequence[Mapping[str, Any]]
) -> tuple[float, ...]:
    """The learning rates of a row, from the lines of equal weights."""
    found = {line["lr"] for line in equal if "lr" in line}
    return config.lrs if job.row == EQUAL else tuple(sorted(found)) or config.lrs


def train_job(config: Config, job: Job, rates: Sequence[float]) -> float:
    """Trains a job and writes its files. Returns its seconds."""
    from experiments.leaderboard import train

    start, cpu = time.perf_counter(), time.process_time()
    on = train.cached_problem(config, job.set)
    for line in read_rows(config.out, [Job(job.set, EQUAL)])[:1]:
        if line["data"] != on.digest:
            raise ConfigError(
                f"The data of {job.set} are not those of the finished rows in "
                f"{config.out}."
            )
    rows, error = [], None
    try:
        rows = train.train_row(config, on, job.row, rates)
    except (ValueError, TypeError) as refused:
        # Some methods need more tasks than a set has.
        error = str(refused).splitlines()[0]
    first = {
        "kind": "job",
        "set": job.set,
        "row": job.row,
        "tasks": [task.name for task in on.tasks],
        "counted": on.counted.tolist(),
        "examples": {part: split.x.shape[1] for part, split in on.parts.items()},
        "data": on.digest,
        "error": error,
    }
    folder = job.folder(config.out)
    if job.set in config.cost_sets and config.cost_rounds and rows:
        save(folder / "cost.json", train.step_cost(config, on, job.row))
    seconds = time.perf_counter() - start
    save(folder / "time.json", {"seconds": seconds, "cpu": time.process_time() - cpu})
    finish(job, config.out, (first, *rows))
    return seconds


def finish(job: Job, out: pathlib.Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows of a job, which finishes it."""
    text = "".join(json.dumps(training.to_json(line)) + "\n" for line in lines)
    write(job.folder(out) / "rows.jsonl", text)


def save(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a small JSON file."""
    write(path, json.dumps(training.to_json(value)) + "\n")


def read_rows(out: pathlib.Path, wanted: Sequence[Job]) -> list[dict[str, Any]]:
    """Lines of the finished jobs, in the order of the jobs."""
    return [
        json.loads(line)
        for job in wanted
        if job.done(out)
        for line in (job.folder(out) / "rows.jsonl").read_text("utf-8").splitlines()
    ]


def read_small(out: pathlib.Path, wanted: Sequence[Job], file: str) -> dict[Job, Any]:
    """The small JSON files of the finished jobs."""
    paths = {job: job.folder(out) / file for job in wanted if job.done(out)}
    return {
        job: json.loads(path.read_text("utf-8"))
        for job, path in paths.items()
        if path.is_file()
    }
