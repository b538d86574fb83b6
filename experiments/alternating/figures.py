"""Draws the figures of a data set from the rows."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.alternating.config import Config
from experiments.alternating.report import (
    Columns,
    Results,
    Rows,
    chosen_rate,
    chosen_rows,
    columns_of,
)
from experiments.alternating.train import inner_steps, row_of
from experiments.common import figures as common
from experiments.common.figures import legend, line, panels, series
from mtljax.training import plots

# Methods of all figures with a line per method. The order fixes the colours.
SHOWN = (
    "joint",
    "alternating",
    "alternating:shared",
    "adatask",
    "groups_2",
    "groups_4",
    "groups_12",
    "groups_35",
)
MATCHED = SHOWN[:4]
PASSES = "backward passes (log scale)"
LOWEST = -0.2
"""Lower end of the axis of test metrics."""


def _shown(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in SHOWN if name in rows]


def _look(name: str) -> dict[str, Any]:
    return {"color": plots.PALETTE[SHOWN.index(name) % len(plots.PALETTE)]}


def _reported(rows: Rows) -> list[Mapping[str, Any]]:
    rate = chosen_rate(rows)
    return [row for row in rows if row["lr"] == rate]


def losses(results: Results):
    """Draws validation losses against batches and against backward passes."""
    rows, columns = results.rows, results.problem.columns
    figure, axes = panels(2, len(columns), width=max(3.0, 6.0 / len(columns)))
    weights = np.array(list(columns.values())).T
    for name in _shown(rows):
        mine = _reported(rows[name])
        steps, values = series(mine, "eval", lambda r: r["val_losses"] @ weights)
        for k, column in enumerate(columns):
            label = row_of(name).label if k == 0 else None
            for place, x in enumerate((steps, steps * results.cost(name).backward)):
                line(axes[place, k], x, values[..., k], _look(name), label=label)
            axes[0, k].set_title(column.removesuffix(" acc").removesuffix(" R²"))
    for k in range(len(columns)):
        axes[0, k].set_xlabel("batches")
        axes[1, k].set_xlabel(PASSES)
        axes[1, k].set_xscale("log")
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    legend(figure, axes)
    return figure


def rates(rows: Mapping[str, Rows], columns: Columns, tasks: int):
    """Draws the test metric for each rate, against the total rate of a batch."""
    figure, axes = panels(1, 1, width=6.0, height=3.4)
    (axis,) = axes[0]
    for name in _shown(rows):
        points = {}
        for lr in sorted({row["lr"] for row in rows[name]}):
            found = chosen_rows([row for row in rows[name] if row["lr"] == lr])
            reach = lr * inner_steps(name, tasks)
            points[reach] = columns_of(columns, found).mean(1)
        values = np.array(list(points.values())).T
        look = {**_look(name), "marker": "o", "markersize": 4}
        line(axis, list(points), values, look, label=row_of(name).label)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate x steps per batch (log scale)")
    label = "mean of the test metrics"
    if axis.get_ylim()[0] < LOWEST:  # R² of a run that diverges has no lower limit
        axis.set_ylim(bottom=LOWEST)
        label += f"\n(axis ends at {LOWEST})"
    axis.set_ylabel(label)
    legend(figure, axes)
    return figure


def scale(study: Mapping[str, Rows], columns: Columns):
    """Draws the metrics against the factor of the last task's loss."""
    figure, axes = panels(1, 2, width=3.8, height=3.0)
    for k, (name, found) in enumerate(study.items()):
        factors = sorted({row["scale"] for row in found})
        values = np.array(
            [
                columns_of(columns, chosen_rows([r for r in found if r["scale"] == f]))
                for f in factors
            ]
        )
        look = {"color": plots.PALETTE[k], "linestyle": "-", "marker": "osD^v"[k]}
        parts = values[..., -1], values[..., :-1].mean(-1)
        for axis, part in zip(axes[0], parts, strict=True):
            line(axis, factors, part.T, look, label=row_of(name).label, markersize=4)
    last = list(columns)[-1]
    axes[0, 0].set_title(f"the scaled task: {last}")
    axes[0, 1].set_title("the others: mean of metrics")
    for axis in axes[0]:
        axis.set_xscale("log")
        axis.set_xlabel(f"factor of the loss of {last.split()[0]} (log scale)")
    axes[0, 0].set_ylabel("test metric")
    legend(figure, axes)
    return figure


def exploration(rows: Mapping[str, Rows]):
    """Draws the path of the trunk at one rate, that of alternation."""
    matched = [n for n in MATCHED if n in rows]
    figure, axes = panels(1, 3, width=3.4, height=3.0)
    middle = chosen_rate(rows["alternating" if "alternating" in rows else matched[0]])
    for name in matched:
        mine = [row for row in rows[name] if row["lr"] == middle]
        steps, values = series(
            mine,
            "train",
            lambda r: (r["distance"], r["path"], np.mean(r["losses"])),
        )
        distance, path, loss = np.moveaxis(values, -1, 0)
        label = row_of(name).label
        look = _look(name)
        line(axes[0, 0], steps, distance, look, label=label)
        axes[0, 1].plot(loss.mean(0), distance.mean(0), **look)
        line(axes[0, 2], steps, distance / path, look)
    axes[0, 0].set_xlabel("batches")
    axes[0, 0].set_ylabel("distance from the start")
    axes[0, 1].set_xlabel("mean training loss (falls to the right)")
    axes[0, 1].invert_xaxis()
    axes[0, 1].set_ylabel("distance from the start")
    axes[0, 2].set_xlabel("batches")
    axes[0, 2].set_ylabel("distance / path")
    figure.suptitle(f"η = {middle:g}", fontsize=10)
    legend(figure, axes)
    return figure


def write(results: Results, config: Config) -> list[pathlib.Path]:
    """Writes all figures for which the required rows exist."""
    if not config.plots:
        return []
    rows, problem = results.rows, results.problem
    found: dict[str, Any] = {
        "losses": losses(results),
        "rates": rates(rows, problem.columns, problem.num_tasks),
    }
    if any(row in rows for row in MATCHED):
        found["exploration"] = exploration(rows)
    if results.scales:
        found["scale"] = scale(results.scales, problem.columns)
    return common.save(found, config.out / problem.folder, config)
