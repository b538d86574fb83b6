"""Builds the table and the figures from the rows. Does not train."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

import mtljax
from experiments.common import figures
from experiments.common import report as common
from experiments.common.problem import LOWER
from experiments.common.report import Column, Report
from experiments.common.selection import edge_notes, select, select_each
from experiments.multidigits.config import SINGLE_TASK, Config
from mtljax import metrics
from mtljax.training import plots

Rows = Sequence[Mapping[str, Any]]


def label_of(method: str) -> str:
    """Returns the name of a method in the tables."""
    return "single task" if method == SINGLE_TASK else mtljax.METHODS[method].label


def better(column: str) -> Literal["min", "max"]:
    """Returns whether a test metric is minimised or maximised."""
    return "min" if column.endswith(LOWER) else "max"


def values_of(
    method: str,
    rows: Rows,
    columns: Mapping[str, int],
    names: Sequence[str],
) -> dict[str, list[float]]:
    """Returns test metrics over seeds. A baseline uses the runs on each task."""
    chosen = select_each(rows)

    def of(column, task):
        wanted = names[task] if method == SINGLE_TASK else "all"
        return [row[f"test_{column}"] for row in chosen if row["task"] == wanted]

    return {column: of(column, task) for column, task in columns.items()}


def make_report(
    rows: Mapping[str, Rows],
    columns: Mapping[str, int],
    names: Sequence[str],
    times: Mapping[str, float],
) -> Report:
    """Reports metrics, both forms of Δm, mean rank and step time, sorted by rank."""
    values = {m: values_of(m, r, columns, names) for m, r in rows.items()}
    higher = np.array([better(c) == "max" for c in columns])
    groups = list(columns.values())
    main = [c for c in columns if not c.endswith(LOWER)]
    stacked = {m: np.array([v[c] for c in columns]).T for m, v in values.items()}
    methods = [m for m in rows if m != SINGLE_TASK]
    means = np.array([stacked[m].mean(0) for m in methods])
    ranks = np.asarray(metrics.mean_rank(means, higher)) if methods else []
    table = {}
    for method, found in values.items():
        row: dict[str, Any] = {c.replace("_", " "): v for c, v in found.items()}
        row["average"] = np.mean([found[c] for c in main], axis=0)
        if method != SINGLE_TASK and SINGLE_TASK in values:
            baseline = stacked[SINGLE_TASK].mean(0)
            each = metrics.delta_m(stacked[method], baseline, higher)
            tasks = metrics.delta_m(stacked[method], baseline, higher, groups=groups)
            row |= {"Δm % (metrics)": each, "Δm % (tasks)": tasks}
            row["mean rank"] = float(ranks[methods.index(method)])
        if method in times and "linear" in times and method != SINGLE_TASK:
            row["step time / LS"] = times[method] / times["linear"]
        table[label_of(method)] = row
    order = sorted(
        table, key=lambda k: (k != "single task", table[k].get("mean rank", 0.0))
    )
    shown: dict[str, Column] = {c.replace("_", " "): (better(c), 3) for c in columns}
    shown |= {"average": ("max", 3), "Δm % (metrics)": ("min", 1)}
    shown |= {"Δm % (tasks)": ("min", 1), "mean rank": ("min", 2)}
    if times:
        shown["step time / LS"] = ("", 2)
    return Report(shown, {k: table[k] for k in order})


def write(
    rows: Mapping[str, Rows],
    times: Mapping[str, float],
    report: Report,
    config: Config,
    command: str,
) -> list[pathlib.Path]:
    """Writes ``results.jsonl``, with one line per reported run, and ``table.md``."""
    lines = [
        {"method": method, **row, "step_ms": times.get(method)}
        for method, found in rows.items()
        for row in select_each(found)
    ]
    choices = {label_of(m): select(r) for m, r in rows.items() if m != SINGLE_TASK}
    parts = [
        f"# {config.data}: {len(report.rows)} rows, {config.seeds} seeds",
        f"`{command}`",
        report.markdown(exclude=["single task"]),
        "Mean ± standard deviation over seeds on the test split, at the step (and "
        "learning rate) that validation chose. Δm is relative to the mean of the "
        "single-task runs, in percent, lower is better: over all metrics, and over "
        "tasks. Mean rank is among the multi-task rows. Bold is the best of these.",
        " ".join(edge_notes(choices)),
    ]
    return common.write(config.out, config, lines, parts)


def write_plots(
    rows: Mapping[str, Rows],
    report: Report,
    names: Sequence[str],
    config: Config,
) -> list[pathlib.Path]:
    """Draws loss curves, weights, cosines and the trade-off of the first two tasks."""
    labels = {m: label_of(m) for m in rows if m != SINGLE_TASK}
    shown = {
        labels[m]: [row for row in rows[m] if row.get("lr") == select(rows[m]).lr]
        for m in labels
    }
    order = [name for name in report.rows if name in shown]
    all_labels = [label_of(m) for m in config.methods]  # fixes the colours
    losses = {k: plots.curve(shown[k], "losses") for k in order}
    weights = {k: plots.curve(shown[k], "task_weights") for k in order}
    cosines = {k: plots.curve(shown[k], "cosines", "eval") for k in order}
    pairs = [f"{a} · {b}" for i, a in enumerate(names) for b in list(names)[i + 1 :]]
    made = {
        "losses": plots.loss_curves(losses, names, window=5, methods=all_labels),
        "weights": plots.weight_trajectories(weights, names, window=3),
        "cosines": plots.cosine_over_time(cosines, pairs),
    }
    main = [c for c in report.columns if c.endswith((" acc", " r2"))]
    if len(main) > 1:
        x, y = main[:2]
        reference = report.rows["single task"]
        made["tradeoff"] = plots.tradeoff_scatter(
            {k: (report.rows[k][x], report.rows[k][y]) for k in order},
            xlabel=f"{x}, test",
            ylabel=f"{y}, test",
            methods=all_labels,
            reference=(float(np.mean(reference[x])), float(np.mean(reference[y]))),
        )
    return figures.save(made, config.out, config)
