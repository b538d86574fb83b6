"""Reads the rows of training runs and compares them in tables."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from mtljax.training.records import flatten
from mtljax.training.tables import markdown, markdown_table
from mtljax.training.writers import Row, read_jsonl

FILES = ("metrics.jsonl", "results.jsonl")
_LABELS = frozenset({"step", "kind", "seed", "seconds", "step_ms", "final"})
_TEXTS = frozenset({"kind", "label"})  # texts that do not tell runs apart
_AXES = frozenset({"lr", "scale", "interval"})  # numbers that do
DIAGNOSTICS = frozenset({"cosines", "task_weights", "weights"})
_SHOWN = 6  # metrics of a table without a selection


class Run(NamedTuple):
    """The rows of one run, with all its seeds."""

    name: str
    header: Row
    rows: list[Row]

    @property
    def task_names(self) -> list[str]:
        """Returns the names of the tasks, if the header has them."""
        return list(self.header.get("task_names") or [])

    @property
    def config(self) -> dict[str, Any]:
        """Returns the configuration with dotted names."""
        config = self.header.get("config")
        return flatten(config) if isinstance(config, Mapping) else {}

    @property
    def starts(self) -> list[int]:
        """Returns the steps after which the run was started or resumed."""
        sessions = self.header.get("sessions") or [{}]
        return sorted({session.get("from_step", 0) for session in sessions} | {0})


def find_runs(paths: Iterable[str | pathlib.Path]) -> list[Run]:
    """Reads the runs in some folders.

    Args:
      paths: Folders with ``metrics.jsonl`` (of :func:`mtljax.training.fit`) or
        ``results.jsonl`` (of an experiment), such files, or folders of such folders.

    Returns:
      The runs. Rows of one file belong to different runs if they differ in a text, such
      as the method, or in the learning rate. The seeds of a run are not separated.

    Raises:
      FileNotFoundError: If a path does not exist or contains no run.
      ValueError: If a file has a damaged line.
    """
    found: list[Run] = []
    for path in map(pathlib.Path, paths):
        files = _files(path)
        if not files:
            reason = "contains no run" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} {reason}: no {' or '.join(FILES)}.")
        for file in files:
            found += _runs(file)
    return _unique(found)


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    here = [path / name for name in FILES if (path / name).is_file()]
    below = (file for name in FILES for file in path.glob(f"*/{name}"))
    return here or sorted(below)


def _runs(file: pathlib.Path) -> list[Run]:
    header, rows = read_jsonl(file)
    if not header and rows and "step" not in rows[0]:
        header, rows = rows[0], rows[1:]  # the first line of an experiment
    rows = [row for row in rows if isinstance(row.get("step"), int)]
    values: dict[str, set[Any]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _TEXTS and (isinstance(value, str) or name in _AXES):
                values.setdefault(name, set()).add(value)
    varying = [name for name, found in values.items() if len(found) > 1]
    folder = file.resolve().parent
    base = folder.parent.name if folder.name == "results" else folder.name
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in varying), []).append(row)
    return [
        Run("/".join([base, *(str(v) for v in key if v is not None)]), header, group)
        for key, group in groups.items()
    ]


def _unique(runs: list[Run]) -> list[Run]:
    """Gives runs of the same name a number."""
    seen: dict[str, int] = {}
    unique = []
    for run in runs:
        count = seen[run.name] = seen.get(run.name, 0) + 1
        name = run.name if count == 1 else f"{run.name} ({count})"
        unique.append(run._replace(name=name))
    return unique


def scalars(row: Mapping[str, Any], task_names: Sequence[str] = ()) -> dict[str, float]:
    """Returns the numbers of a row. A vector has one entry per task.

    Examples:
      >>> from mtljax.training.compare import scalars
      >>> scalars({"step": 1, "kind": "eval", "losses": [0.5, None]}, ["a", "b"])
      {'losses/a': 0.5, 'losses/b': nan}
    """
    found = {}
    for name, value in row.items():
        if name in _LABELS | _AXES or isinstance(value, str | bool | dict):
            continue
        if isinstance(value, list):
            names = task_names if len(task_names) == len(value) else range(len(value))
            if all(v is None or isinstance(v, int | float) for v in value):
                pairs = zip(names, value, strict=True)
                found |= {f"{name}/{key}": _number(v) for key, v in pairs}
        else:
            found[name] = _number(value)
    return found


def _number(value: int | float | None) -> float:
    return math.nan if value is None else float(value)


def evaluations(run: Run) -> dict[Any, list[Row]]:
    """Returns the evaluation rows of each seed in the order of steps.

    A run without evaluations is described by its train rows.
    """
    kinds = {row.get("kind") for row in run.rows}
    kind = "eval" if "eval" in kinds else "train"
    found: dict[Any, list[Row]] = {}
    for row in run.rows:
        if row.get("kind", kind) == kind and "step" in row:
            found.setdefault(row.get("seed"), []).append(row)
    return {
        seed: sorted(rows, key=lambda row: row["step"]) for seed, rows in found.items()
    }


def metric_names(runs: Sequence[Run]) -> list[str]:
    """Returns the names of all metrics of the evaluations, in order of appearance.

    Cosines and task weights follow the other metrics.
    """
    names: dict[str, None] = {}
    for run in runs:
        for rows in evaluations(run).values():
            for row in rows[-1:]:
                names |= dict.fromkeys(scalars(row, run.task_names))
    return sorted(names, key=lambda name: name.partition("/")[0] in DIAGNOSTICS)


def step_milliseconds(run: Run) -> list[float]:
    """Returns the time per step of each seed, from the rows.

    The time contains evaluations. The time before the first row of each kind after a
    start or a resume does not count, because it contains compilation.
    """
    seeds: dict[Any, list[Row]] = {}
    for row in run.rows:
        seeds.setdefault(row.get("seed"), []).append(row)
    times = []
    for rows in seeds.values():
        given = [row["step_ms"] for row in rows if row.get("step_ms")]
        timed = [row for row in rows if row.get("seconds") is not None]
        steps, seconds = _counted(timed, run.starts)
        if given:
            times.append(float(given[-1]))
        elif steps > 0 and seconds > 0:
            times.append(1000 * seconds / steps)
    return times


def _counted(rows: Iterable[Row], starts: Sequence[int]) -> tuple[int, float]:
    """Returns the steps and the seconds of one seed that contain no compilation."""
    steps, seconds, last, seen = 0, 0.0, None, set()
    for row in sorted(rows, key=lambda row: row["step"]):
        # A resumed run that has no step left writes its final rows again.
        end = row["step"] + bool(row.get("final"))
        session = max(1, sum(start < end for start in starts))
        first = (session, row.get("kind"))
        if last is not None and first in seen:
            steps += row["step"] - last["step"]
            seconds += row["seconds"] - last["seconds"]
        seen.add(first)
        last = row
    return steps, seconds


def resumptions(run: Run) -> str:
    """Describes when a run was resumed. The text is empty if it was not.

    Examples:
      >>> from mtljax.training.compare import resumptions, Run
      >>> sessions = [{"from_step": 0}, {"from_step": 20}, {"from_step": 45}]
      >>> resumptions(Run("a", {"sessions": sessions}, []))
      'resumed after step 20, after step 45'
    """
    found = []
    for session in (run.header.get("sessions") or [])[1:]:
        when = f" ({session['started']})" if session.get("started") else ""
        found.append(f"after step {session.get('from_step', 0)}{when}")
    return f"resumed {', '.join(found)}" if found else ""


def table(
    runs: Sequence[Run],
    metrics: Sequence[str] | None = None,
    mode: Literal["min", "max"] = "min",
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Literal["min", "max", ""]]]:
    """Returns the cells and the columns of the table of runs.

    Args:
      runs: The runs.
      metrics: Names of metrics. The last and the best value of each are shown. By
        default the last values of the first metrics are shown.
      mode: Whether the best value is the smallest or the largest.

    Returns:
      Values over seeds by run and column, and the direction of each column.

    Raises:
      ValueError: If a metric occurs in no run.
    """
    known = metric_names(runs)
    if not known:
        raise ValueError("The runs contain no row with a metric that is a number.")
    for name in metrics or ():
        if name not in known:
            raise ValueError(f"No run has the metric {name!r}. Known: {_list(known)}.")
    names = list(metrics or known[:_SHOWN])
    columns: dict[str, Literal["min", "max", ""]] = {}
    for name in names:
        columns[name] = mode if metrics else ""
        if metrics:
            columns[f"best {name}"] = mode
    columns["ms per step"] = ""
    cells: dict[str, dict[str, list[float]]] = {}
    best = min if mode == "min" else max
    for run in runs:
        row = cells[run.name] = {column: [] for column in columns}
        for rows in evaluations(run).values():
            numbers = [scalars(r, run.task_names) for r in rows]
            for name in names:
                row[name].append(numbers[-1].get(name, math.nan))
                values = [n[name] for n in numbers if name in n]
                values = [v for v in values if not math.isnan(v)]
                if metrics:
                    row[f"best {name}"].append(best(values, default=math.nan))
        row["ms per step"] = step_milliseconds(run)
    # Rows that were written at the end of a run have no time.
    columns = {c: d for c, d in columns.items() if any(r[c] for r in cells.values())}
    return cells, columns


def config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the fields of the configurations that differ, with a value per run."""
    configs = [run.config for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    values = {name: [config.get(name) for config in configs] for name in names}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def comparison(
    runs: Sequence[Run],
    metrics: Sequence[str] | None = None,
    mode: Literal["min", "max"] = "min",
) -> str:
    """Returns a comparison of runs as Markdown.

    Args:
      runs: The runs, see :func:`find_runs`.
      metrics: See :func:`table`.
      mode: See :func:`table`.
    """
    cells, columns = table(runs, metrics, mode)
    parts = [markdown_table(cells, columns, head="run")]
    if not metrics and len(known := metric_names(runs)) > _SHOWN:
        parts.append(f"Other metrics, see --metric: {_list(known[_SHOWN:])}.")
    resumed = [f"{run.name}: {text}." for run in runs if (text := resumptions(run))]
    if resumed:
        parts.append("\n".join(resumed))
    differ = config_differences(runs)
    if differ:
        head = ["configuration", *(run.name for run in runs)]
        lines = [
            [name, *("" if v is None else v for v in values)]
            for name, values in differ.items()
        ]
        parts.append(markdown(head, lines, left=len(head)))
    return "\n\n".join(parts)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
