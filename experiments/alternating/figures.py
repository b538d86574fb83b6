"""Draws the figures of the alternating experiment from its result rows."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.alternating import report
from experiments.alternating.config import Config
from experiments.alternating.report import Columns, Results, Rows
from experiments.alternating.train import inner_steps, row_of
from experiments.common import figures as common
from experiments.common.figures import legend, line, panels
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
PASSES = "backward passes (log scale)"
LOWEST = -0.2
"""Lower end of the axis of test metrics."""


def _shown(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in SHOWN if name in rows]


def _look(name: str) -> dict[str, Any]:
    return {"color": plots.PALETTE[SHOWN.index(name) % len(plots.PALETTE)]}


def losses(results: Results):
    """Draws validation losses against batches and against backward passes."""
    rows, columns = results.rows, results.problem.columns
    figure, axes = panels(2, len(columns), width=max(3.0, 6.0 / len(columns)))
    weights = np.array(list(columns.values())).T
    for name in _shown(rows):
        rate = report.chosen_rate(rows[name])
        mine = [row for row in rows[name] if row["lr"] == rate]
        steps, values = plots.curve(mine, "val_losses", "eval")
        values = values @ weights
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
            found = report.chosen_rows([row for row in rows[name] if row["lr"] == lr])
            reach = lr * inner_steps(name, tasks)
            points[reach] = report.columns_of(columns, found).mean(1)
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


def write(results: Results, config: Config) -> list[pathlib.Path]:
    """Writes both figures."""
    if not config.plots:
        return []
    problem = results.problem
    made = {
        "losses": losses(results),
        "rates": rates(results.rows, problem.columns, problem.num_tasks),
    }
    return common.save(made, config.folder(problem.name), config)
