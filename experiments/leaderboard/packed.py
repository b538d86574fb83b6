"""Packed rows of a report, and how another run continues from them.

The jobs of a run take hundreds of files; its report is a few. ``--start-from`` unpacks
the finished jobs of a report, so that a further method or set is trained alone.
"""

import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.config import ConfigError
from experiments.leaderboard import queue
from experiments.leaderboard.config import Config
from experiments.leaderboard.queue import Job

ROWS = "results.jsonl.gz"
EARLIER = "earlier.json"
"""Headers of the reports whose jobs were taken over, in a folder of jobs."""
Lines = Sequence[Mapping[str, Any]]


def pack(lines: Lines) -> bytes:
    """Compresses lines. Equal lines are equal bytes: no time and no name is stored."""
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        for line in lines:
            file.write((json.dumps(line) + "\n").encode())
    return buffer.getvalue()


def unpack(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of a ``results.jsonl.gz``."""
    text = gzip.decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def by_job(lines: Lines) -> dict[Job, list[Mapping[str, Any]]]:
    """Lines of each job, the line of the job itself first."""
    found: dict[Job, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(Job(line["set"], line["row"]), []).append(line)
    return found


class Start(NamedTuple):
    """A report from which a run continues: lines of its jobs, header and costs."""

    jobs: Mapping[Job, Lines]
    header: Mapping[str, Any]
    costs: Mapping[str, Mapping[str, float]]


def read_start(config: Config) -> Start | None:
    """Reads the report of ``config.start_from``, and checks that it fits.

    Raises:
      ConfigError: If the folder has no report, a damaged one, or one of other settings.
    """
    folder = config.start_from
    if folder is None:
        return None
    for name in (ROWS, "header.json", "leaderboard.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"--start-from: {folder} has no {name}.")
    try:
        head = read(folder / "header.json")
        costs = read(folder / "leaderboard.json")["costs"]
        start = Start(by_job(unpack(folder / ROWS)), head, costs)
        settings = head["config"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise ConfigError(
            f"--start-from: the report in {folder} is damaged."
        ) from error
    queue.check_settings(config, settings, f"--start-from: {folder}")
    return start


def take_over(config: Config, start: Start) -> int:
    """Writes the jobs of a report that are wanted here and not finished.

    A report has the seconds of a row, which are divided equally between its jobs.

    Returns:
      The number of jobs.
    """
    rows = [job.row for job in start.jobs]
    wanted, taken = set(queue.jobs(config)), 0
    for job, lines in start.jobs.items():
        if job not in wanted or job.done(config.out):
            continue
        cost = dict(start.costs.get(job.row, {}))
        seconds = cost.pop("cpu_s", None)
        if seconds is not None:
            share = seconds / rows.count(job.row)
            queue.save(job.folder(config.out) / "time.json", {"cpu": share})
        if cost and job.set in start.header["config"]["cost_sets"]:
            queue.save(job.folder(config.out) / "cost.json", cost)
        queue.finish(job, config.out, lines)
        taken += 1
    if taken:
        head = dict(start.header)
        older = head.pop("earlier", [])
        headers = [*earlier(config.out), *older, head]
        queue.save(config.out / EARLIER, {"headers": headers})
    return taken


def earlier(out: pathlib.Path) -> list[Mapping[str, Any]]:
    """Headers of the reports whose jobs a folder has taken over."""
    path = out / EARLIER
    return read(path)["headers"] if path.is_file() else []


def read(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file."""
    return json.loads(path.read_text("utf-8"))
