"""From rows to the table and the lines of results; no training code."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.alternating.config import SINGLE_TASK, Config
from experiments.alternating.problem import Problem
from experiments.alternating.train import cost_of, row_of
from experiments.common import report as common
from experiments.common.report import Report
from experiments.common.selection import edge_notes, select, select_each
from mtljax import metrics
from mtljax.training import tables

MEASURES = ("distance", "straightness", "turning")
Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, np.ndarray]


class Measured(NamedTuple):
    """What a program takes: of one run, one batch."""

    milliseconds: float
    megabytes: float  # arguments, results and temporary buffers


class Results(NamedTuple):
    """What was trained and measured on a set."""

    problem: Problem
    rows: Mapping[str, Rows]
    measured: Mapping[str, Measured]
    scales: Mapping[str, Rows]
    aligned: Mapping[tuple[str, int], Rows]
    steps: int

    def cost(self, name: str) -> Any:
        """Passes per batch of a row."""
        return cost_of(name, self.problem.num_tasks)


def chosen_rows(rows: Rows, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The reported evaluation of every seed; nothing after ``last_step`` is used."""
    return select_each(rows, last_step=last_step)


def chosen_rate(rows: Rows) -> float:
    """The learning rate that validation chose for a row of many tasks."""
    return chosen_rows(rows)[0]["lr"]


def columns_of(columns: Columns, chosen: Rows) -> np.ndarray:
    """Test metrics ``[seeds, columns]``; single-task networks are put together."""
    if chosen[0]["task"] < 0:
        values = np.array([row["test_metrics"] for row in chosen])
    else:
        seeds = list(dict.fromkeys(row["seed"] for row in chosen))
        mine = [[r["test_metric"] for r in chosen if r["seed"] == s] for s in seeds]
        values = np.array(mine)
    return values @ np.array(list(columns.values())).T


def travelled(rows: Rows) -> dict[str, list[float]]:
    """Measures of exploration at the end of the reported learning rate's runs."""
    lr = chosen_rate(rows)
    train = [r for r in rows if r.get("kind") == "train" and r["lr"] == lr]
    last = max(row["step"] for row in train)
    return {m: [row[m] for row in train if row["step"] == last] for m in MEASURES}


def make_report(results: Results) -> Report:
    """Metrics at equal batches, and their mean at equal backward passes."""
    rows, measured, columns = results.rows, results.measured, results.problem.columns
    names = [name for name in rows if name != SINGLE_TASK]
    budget = results.steps * min(results.cost(name).backward for name in names)
    baseline = columns_of(columns, chosen_rows(rows[SINGLE_TASK])).mean(0)
    table = {}
    for name, found in rows.items():
        chosen = chosen_rows(found)
        values = columns_of(columns, chosen)
        row: dict[str, Any] = dict(zip(columns, values.T.tolist(), strict=True))
        row["average"] = values.mean(1)
        if name != SINGLE_TASK:
            row["Δm %"] = metrics.delta_m(values, baseline, [True] * len(baseline))
            cost = results.cost(name)
            early = chosen_rows(found, budget / cost.backward)
            if early:
                row["average, equal passes"] = columns_of(columns, early).mean(1)
            row |= {"F": cost.forward, "B": cost.backward, "states": cost.states}
            row |= {"lr / 1e-3": 1e3 * chosen[0]["lr"], **travelled(found)}
        if name in measured:
            row["ms"], row["MB"] = measured[name]
        table[row_of(name).label] = row
    directions: dict[str, Literal["min", "max", ""]] = dict.fromkeys(columns, "max")
    if len(columns) > 1:
        directions["average"] = "max"
    directions |= {"Δm %": "min", "average, equal passes": "max"}
    directions |= dict.fromkeys(("lr / 1e-3", "F", "B", "states"), "")
    directions |= dict.fromkeys(("ms", "MB") if measured else (), "")
    directions |= dict.fromkeys(MEASURES, "")
    digits = dict.fromkeys(directions, 3)
    digits |= {"Δm %": 1, "F": 0, "B": 0, "states": 0, "distance": 1, "lr / 1e-3": 1}
    return Report(directions, table, digits | {"ms": 2, "MB": 2, "straightness": 2})


def scale_table(study: Mapping[str, Rows], columns: Columns) -> str:
    """Last column of the table and mean of the others, for every factor and row."""
    factors = sorted({row["scale"] for found in study.values() for row in found})
    shown: dict[str, dict[str, Any]] = {}
    for name, found in study.items():
        label = row_of(name).label
        for part, pick in (("scaled", slice(-1, None)), ("others", slice(-1))):
            row = shown.setdefault(f"{label}: {part}", {})
            for factor in factors:
                at = [r for r in found if r["scale"] == factor]
                row[f"{factor:g}"] = columns_of(columns, chosen_rows(at))[:, pick].mean(
                    1
                )
    return tables.markdown_table(shown, {f"{f:g}": "" for f in factors})


def alignment_table(study: Mapping[tuple[str, int], Rows]) -> str:
    """Agreement of the tasks' gradients over a run, and at its end."""
    shown = {}
    for (name, part), found in study.items():
        evaluated = [row for row in found if row["kind"] == "eval"]
        seeds = list(dict.fromkeys(row["seed"] for row in evaluated))
        row: dict[str, Any] = {}
        for key in ("cosine", "conflicts"):
            each = [[r[key] for r in evaluated if r["seed"] == s] for s in seeds]
            row[f"{key}, mean of the run"] = [float(np.mean(e[1:])) for e in each]
            row[f"{key}, end"] = [e[-1] for e in each]
        rate = "eta" if part == 1 else f"eta / {part}, {part} x as long"
        shown[f"{row_of(name).label}, {rate}"] = row
    columns = list(next(iter(shown.values())))
    return tables.markdown_table(shown, dict.fromkeys(columns, ""), digits=4)


def write(
    results: Results, table: Report, config: Config, command: str
) -> list[pathlib.Path]:
    """``results.jsonl`` and ``table.md`` of a set, with its studies."""
    name, rows = results.problem.name, results.rows
    folder = config.out / results.problem.folder
    choices = {
        row_of(row).label: select(found)
        for row, found in rows.items()
        if row != SINGLE_TASK
    }
    parts = [
        f"# Alternating steps, {name}, {config.seeds} seeds",
        f"`{command}`",
        table.markdown(exclude=["single task"]),
        "Mean ± standard deviation over seeds on the test split, at the evaluation and "
        'the learning rate that validation chose (the rate a row of "lr x T" '
        "multiplies is shown before it does). Δm is relative to single-task networks, "
        "in percent, lower is better. F, B: forward and backward passes per batch; "
        "states: optimiser states of the shared parameters. Equal passes: only as many "
        "batches as cost what the cheapest row spends on backward passes in its whole "
        "run. Distance, straightness (distance over path) and turning (mean cosine of "
        "successive batches' displacements) are the trunk's, at the end of the run.",
        " ".join(edge_notes(choices)),
    ]
    if results.scales:
        title = f"Test metric by the factor of the loss of {results.problem.tasks[-1]}:"
        parts += [title, scale_table(results.scales, results.problem.columns)]
    if results.aligned:
        title = "Gradients of the tasks on training examples, plain SGD:"
        parts += [title, alignment_table(results.aligned)]
    lines: list[Any] = []
    for row_name, found in rows.items():
        taken = results.measured.get(row_name)
        timing = taken._asdict() if taken else {}
        lines += [{"row": row_name, **row, **timing} for row in chosen_rows(found)]
    studies = [("scale", row, found) for row, found in results.scales.items()]
    studies += [
        (f"alignment-{part}", row, found)
        for (row, part), found in results.aligned.items()
    ]
    for study, row_name, found in studies:
        for scale in dict.fromkeys(row["scale"] for row in found):
            at = [row for row in found if row["scale"] == scale]
            lines += [
                {"study": study, "row": row_name, **row} for row in chosen_rows(at)
            ]
    return [
        common.write_rows(folder / "results.jsonl", config, lines, set=name),
        common.write_table(folder / "table.md", parts),
    ]
