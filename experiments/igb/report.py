"""Builds the tables and the figures from the rows. Does not train."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import figures
from experiments.common import report as common
from experiments.common.report import Column, Report, pm
from experiments.common.selection import Choice, edge_notes, select, select_each
from experiments.common.statistics import comparison_table, paired
from experiments.igb import train
from experiments.igb.config import ROWS, SINGLE_TASK, Config, is_graph
from mtljax import metrics
from mtljax.training import plots

Rows = Sequence[Mapping[str, Any]]

# The QM9 tables print energies in meV, other metrics in the unit of the target.
MILLI = ("homo", "lumo", "zpve", "u0", "u", "h", "g")
DM_METRICS, DM_TASKS, DM_LAST, RANK, LR = (
    "Δm % (metrics)", "Δm % (tasks)", "Δm %, last step", "mean rank", "lr / 1e-3",
)  # fmt: skip
COMPARED = (
    ("scale_invariant", "linear"),
    ("scale_invariant", "static"),
    ("igb_v1", "scale_invariant"),
    ("igb_v2", "scale_invariant"),
    ("igb_v2", "random_si"),
    ("igb_v2", "igb_v2:frozen"),
    ("igb_v2", "igb_v2:mean"),
    ("igb_v1+nash_mtl", "nash_mtl"),
    ("igb_v2+nash_mtl", "nash_mtl"),
)
"""Pairs of rows that claims are about."""
TIMED, REFERENCE = "igb_v2", "linear"
"""The row whose time a claim compares with that of another row."""


def label_of(method: str) -> str:
    """Returns the name of a method in the tables."""
    return "single task" if method == SINGLE_TASK else ROWS[method].label


def factors(names: Sequence[str], data: str) -> np.ndarray:
    """Returns the factors of the errors in the table."""
    molecules = is_graph(data)
    return np.array([1e3 if molecules and n in MILLI else 1.0 for n in names])


def baseline(rows: Rows, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns mean single-task errors over seeds, each at its best validation step."""
    best = select_each(rows, maximise=False)

    def mean(part: str, i: int) -> Any:
        return np.mean([row[part][i] for row in best if row["task"] == names[i]])

    return {
        part: np.array([mean(part, i) for i in range(len(names))])
        for part in ("val_mae", "test_mae")
    }


def any_choice(rows: Rows) -> Choice:
    """The rate by the mean logarithm of the errors: needs no baseline."""

    def score(row: Mapping[str, Any]) -> float:
        errors = row["val_mae"] if row["task"] == "all" else [row["val_score"]]
        return math.nan if None in errors else float(np.mean(np.log(errors)))

    scored = [{**r, "val_log": score(r)} for r in rows if r.get("kind") == "eval"]
    return select(scored, "val_log", maximise=False, run=("task", "seed"))


def choose(rows: Rows, single: Mapping[str, np.ndarray]) -> Choice:
    """The rate, and for every seed the step, with the best Δm on validation."""
    scored = []
    for row in rows:
        if row.get("kind") == "eval":
            errors = np.array(row["val_mae"], np.float64)
            change = 100 * float((errors / single["val_mae"] - 1).mean())
            scored.append({**row, "val_delta": change})
    return select(scored, "val_delta", maximise=False)


class Values:
    """What a data set's rows are worth.

    Attributes:
      rows: As trained.
      names: Of the tasks.
      single: Errors of the single-task networks.
      choices: Method -> its choice.
      delta: Method -> Δm in percent ``[seeds]``.
      last: The same at the last step.
    """

    def __init__(self, rows: Mapping[str, Rows], names: Sequence[str]):
        self.rows, self.names = rows, list(names)
        self.single = baseline(rows[SINGLE_TASK], names)
        methods = [method for method in rows if method != SINGLE_TASK]
        self.choices = {m: choose(rows[m], self.single) for m in methods}
        self.delta = {m: self._delta(c.rows) for m, c in self.choices.items()}
        self.last = {m: self._delta(c.last) for m, c in self.choices.items()}

    def _delta(self, rows: Rows, **options: Any) -> np.ndarray:
        lower = np.zeros(len(self.names), bool)
        value = np.array([row["test_mae"] for row in rows], np.float64)
        found = metrics.delta_m(value, self.single["test_mae"], lower, **options)
        return np.asarray(found, np.float64)

    def over_tasks(self, method: str, groups: list[int]) -> np.ndarray:
        """Δm where metrics of a group count once."""
        return self._delta(self.choices[method].rows, groups=groups)


def make_report(values: Values, data: str) -> Report:
    """Errors in their units, Δm both ways and at the last step, and mean rank."""
    names, scale = values.names, factors(values.names, data)
    errors = {
        method: np.array([row["test_mae"] for row in choice.rows])
        for method, choice in values.choices.items()
    }
    means = np.array([value.mean(0) for value in errors.values()])
    ranks = np.asarray(metrics.mean_rank(means, np.zeros(len(names), bool)))
    alone = scale * values.single["test_mae"]
    table: dict[str, dict[str, Any]] = {
        "single task": dict(zip(names, alone, strict=True))
    }
    for (method, value), rank in zip(errors.items(), ranks, strict=True):
        row = dict(zip(names, (scale * value).T, strict=True))
        row[DM_METRICS] = values.delta[method]
        row[DM_TASKS] = values.over_tasks(method, groups_of(names, data))
        row[DM_LAST] = values.last[method]
        row[RANK] = float(rank)
        row[LR] = 1e3 * (values.choices[method].lr or math.nan)
        table[label_of(method)] = row
    digits = [1 if factor > 1 else 3 for factor in scale]
    columns: dict[str, Column] = {
        n: ("min", d) for n, d in zip(names, digits, strict=True)
    }
    columns |= dict.fromkeys((DM_METRICS, DM_TASKS, DM_LAST), ("min", 1))
    columns |= {RANK: ("min", 2), LR: ("", 2)}
    return Report(columns, table)


def groups_of(names: Sequence[str], data: str) -> list[int]:
    """Returns the task of each metric, for the mean over tasks.

    With one metric per target, both forms of Δm are equal. On molecules, the four
    atomisation energies count as one task, because they differ by less than their
    errors.
    """
    if not is_graph(data):
        return list(range(len(names)))
    energies = ("u0", "u", "h", "g")
    kinds = ["energy" if name in energies else name for name in names]
    order = list(dict.fromkeys(kinds))
    return [order.index(kind) for kind in kinds]


def differences(delta: Mapping[str, np.ndarray]) -> str:
    """The paired differences of Δm that claims are about."""
    pairs = {
        f"{label_of(a)} - {label_of(b)}": (delta[b], delta[a])
        for a, b in COMPARED
        if a in delta and b in delta
    }
    return comparison_table(pairs)


def claim_lines(
    values: Values, problem: train.Problem, times: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """Lines by row, column and seed, with the numbers that claims read.

    Args:
      values: Of the data set.
      problem: The data set.
      times: Method -> time of a run over that of ``REFERENCE``, for each seed.
    """
    signal = np.asarray(problem.signal)
    scale = factors(values.names, problem.name)
    alone = select_each(values.rows[SINGLE_TASK], maximise=False)
    lines: list[dict[str, Any]] = [
        {"method": SINGLE_TASK, "row": "single task", "column": "chosen", **row}
        for row in alone
    ]
    for method, choice in values.choices.items():
        about = {"method": method, "row": label_of(method)}
        about |= {"edge": choice.edge, "late": choice.late}
        columns = {
            "chosen": (choice.rows, values.delta[method]),
            "last": (choice.last, values.last[method]),
        }
        for column, (rows, delta) in columns.items():
            for i, row in enumerate(rows):
                more = {"column": column, "delta_m": delta[i]}
                if method in times:
                    more["step_ratio"] = times[method][i]
                if problem.by_seed:
                    more["signal_r2"] = signal[i]
                if is_graph(problem.name):
                    errors = zip(values.names, scale * row["test_mae"], strict=True)
                    more |= {f"{name}_mae": error for name, error in errors}
                lines.append({**about, **row, **more})
    return [{"data": problem.name, **line} for line in lines]


def write(
    values: Values,
    table: Report,
    config: Config,
    problem: train.Problem,
    command: str,
    *,
    times: Mapping[str, Sequence[float]],
) -> list[pathlib.Path]:
    """Writes ``results.jsonl``, ``table.md`` and the figures of a data set."""
    folder = config.folder(problem.name)
    signal = np.asarray(problem.signal)
    marks = {label_of(m): choice for m, choice in values.choices.items()}
    deltas = {label_of(m): delta for m, delta in values.delta.items()}
    drawn = rows_figure(deltas) if config.plots else None
    parts = [
        f"# {problem.name}: {len(table.rows)} rows, {config.seeds} seeds, "
        f"{problem.settings.steps} steps",
        f"`{command}`",
        f"Ridge regression explains {signal.mean():.2f} of the variance on test: the "
        "median over targets, the mean over splits."
        if problem.by_seed
        else "",
        table.markdown(exclude=["single task"]),
        "Mean absolute errors on the test split in the targets' units (energies of "
        "molecules in meV), mean ± standard deviation over seeds, at the learning rate "
        "and the step with the best Δm on validation. Δm is the mean relative change "
        "of the errors against single-task networks (mean over seeds), in percent, "
        "lower is better: over all metrics, and over tasks, where the four atomisation "
        "energies count as one. Mean rank is among the multi-task rows.",
        " ".join(edge_notes(marks)),
        *(
            f"A run of {label_of(method)} takes {pm(found)} times as long as a run of "
            f"{label_of(REFERENCE)} (one run at a time, {config.seeds} pairs)."
            for method, found in times.items()
            if method != REFERENCE
        ),
        differences(values.delta) if config.seeds > 1 else "",
    ]
    lines, about = claim_lines(values, problem, times), {"signal_r2": signal.tolist()}
    written = common.write(folder, config, lines, parts, **about)
    return [*written, *figures.save({"rows": drawn}, folder, config)]


def write_summary(
    found: Mapping[str, Values], config: Config, command: str
) -> list[pathlib.Path]:
    """``summary.md`` and ``rows.png``: the mean over all data sets."""
    mean, rows = {}, {}
    for m in ROWS:
        if all(m in values.delta for values in found.values()):
            each = {name: values.delta[m] for name, values in found.items()}
            mean[m] = np.mean(list(each.values()), 0)
            rows[label_of(m)] = each | {"mean": mean[m]}
    columns: dict[str, Column] = dict.fromkeys([*found, "mean"], ("min", 1))
    parts = [
        f"# IGB: {len(found)} data sets, {config.seeds} seeds",
        f"`{command}`",
        Report(columns, rows).markdown(),
        "Δm in percent of single-task networks, lower is better, mean ± standard "
        "deviation over seeds. Differences of the mean over data sets, paired:",
        differences(mean),
    ]
    written = common.write_table(config.out / "summary.md", parts)
    drawn = {label_of(m): value for m, value in mean.items()}
    figure = rows_figure(drawn) if config.plots and drawn else None
    return [written, *figures.save({"rows": figure}, config.out, config)]


def rows_figure(values: Mapping[str, Any]) -> Any:
    """Δm of rows minus that of EW, paired over seeds, with 95 % intervals.

    The spread of Δm itself is mostly that of the splits, which all rows share.
    """
    reference = label_of(REFERENCE)
    base = np.asarray(values[reference]) if reference in values else 0.0
    shown = {k: np.asarray(v) - base for k, v in values.items() if k != reference}
    figure, axes = figures.panels(1, 1, 5.6, 0.35 * len(shown) + 0.4)
    axis = axes[0, 0]
    axis.axvline(0.0, color="0.6", linewidth=1)
    for i, (label, value) in enumerate(shown.items()):
        mean, half = value.mean(), 0.0
        if len(value) > 1:
            found = paired(np.zeros(len(value)), value)
            half = found.high - found.mean
        color = plots.PALETTE[0 if label.startswith("IGB") else 1]
        axis.errorbar(mean, -i, xerr=half, marker="o", color=color, capsize=3)
    axis.set_yticks([-i for i in range(len(shown))], list(shown))
    less = f" minus that of {reference}" if reference in values else ""
    axis.set_xlabel(f"Δm{less}, points (better ←), 95 % interval")
    return figure
