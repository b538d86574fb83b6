"""The figures of a set, from rows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.alternating.config import ROWS, SINGLE_TASK, Config
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
from mtljax import metrics
from mtljax.training import plots

# What every figure with a line per method shows, in this order, hence these colours.
SHOWN = (
    "sum",
    "mean_T",
    "alternating:shared",
    "alternating",
    "adatask",
    "groups_2:slot",
    "groups_4:slot",
    "groups_12:slot",
    "groups_35:slot",
)
# A batch takes every coordinate about T steps of Adam's far.
MATCHED = ("mean_T", "alternating:shared", "alternating", "adatask")
PASSES = "backward passes (log scale)"


def _shown(rows: Mapping[str, Any]) -> list[str]:
    return [name for name in SHOWN if name in rows]


def _look(name: str) -> dict[str, Any]:
    return {
        "color": plots.PALETTE[SHOWN.index(name) % len(plots.PALETTE)],
        "linestyle": "--" if name == "mean_T" else "-",
    }


def _reported(rows: Rows) -> list[Mapping[str, Any]]:
    rate = chosen_rate(rows)
    return [row for row in rows if row["lr"] == rate]


def losses(results: Results):
    """Validation losses over batches and over backward passes."""
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


def group_lines(rows: Mapping[str, Any], tasks: int) -> dict[str, dict[int, str]]:
    """State -> G -> row, the two ends included, which go by other names."""
    ends = {
        "slot": ("sum", "alternating"),
        "shared": ("sum", "alternating:shared"),
        "per_task": ("adatask", "alternating"),
    }
    found = {}
    for state, (first, last) in ends.items():
        named = {
            dict(ROWS[n].options)["groups"]: n
            for n in rows
            if n.startswith("groups_") and n.endswith(f":{state}")
        }
        line = {1: first, **dict(sorted(named.items())), tasks: last}
        line = {g: n for g, n in line.items() if n in rows}
        if named and len(line) > 2:
            found[state] = line
    return found


def groups(results: Results):
    """What groups are worth, and what they cost."""
    rows, columns = results.rows, results.problem.columns
    measured = results.measured
    lines = group_lines(rows, results.problem.num_tasks)
    if not lines:
        return None
    figure, axes = panels(1, 2, width=3.8, height=3.0)
    baseline = columns_of(columns, chosen_rows(rows[SINGLE_TASK])).mean(0)
    better = [True] * len(baseline)
    for k, (state, members) in enumerate(lines.items()):
        look = {"color": plots.PALETTE[k], "linestyle": "-", "marker": "osD"[k]}
        values = []
        for row in members.values():
            found = columns_of(columns, chosen_rows(rows[row]))
            values.append(np.asarray(metrics.delta_m(found, baseline, better)))
        label = f"state: {state.replace('_', ' ')}"
        line(axes[0, 0], list(members), np.array(values).T, look, label=label)
        if measured:
            cost = [measured[row].milliseconds for row in members.values()]
        else:
            cost = [results.cost(row).backward for row in members.values()]
        axes[0, 1].plot(list(members), cost, **look)
    for axis in axes[0]:
        axis.set_xlabel("groups G (log scale)")
        axis.set_xscale("log")
        ticks = sorted({g for members in lines.values() for g in members})
        axis.set_xticks(ticks, [str(g) for g in ticks])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("Δm % (lower is better)")
    axes[0, 1].set_ylabel("ms per batch" if measured else "backward passes per batch")
    axes[0, 1].set_ylim(bottom=0)
    legend(figure, axes)
    return figure


def rates(rows: Mapping[str, Rows], columns: Columns, tasks: int):
    """The test metric at every rate, by how far a batch may go."""
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
    axis.set_ylabel("mean of the test metrics")
    legend(figure, axes)
    return figure


def scale(study: Mapping[str, Rows], columns: Columns):
    """Metrics by the factor of the last task's loss."""
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


def alignment(study: Mapping[tuple[str, int], Rows]):
    """Agreement of gradients along the way."""
    figure, axes = panels(1, 2, width=3.8, height=3.0)
    for (name, part), found in study.items():
        lr = found[-1]["lr"]
        look = {
            "color": plots.PALETTE[name == "sgd:alternating"],
            "linestyle": "-" if part == 1 else ":",
        }
        label = f"{row_of(name).label}, η = {lr:g}"
        for axis, key in zip(axes[0], ("cosine", "conflicts"), strict=True):
            steps, values = series(found, "eval", lambda r, key=key: r[key])
            line(axis, steps * lr, values, look, label=label)
    axes[0, 0].set_ylabel("mean cosine of pairs of tasks")
    axes[0, 1].set_ylabel("share of pairs with negative cosine")
    for axis in axes[0]:
        axis.set_xlabel("batches x η")
    legend(figure, axes, columns=2)
    return figure


def exploration(rows: Mapping[str, Rows]):
    """How the trunk travels where a batch of every row may go equally far."""
    matched = [n for n in MATCHED if n in rows]
    figure, axes = panels(1, 3, width=3.4, height=3.0)
    rates = sorted({row["lr"] for row in rows[matched[0]]})
    middle = rates[len(rates) // 2]
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
    figure.suptitle(f"η = {middle:g} (x T for the mean)", fontsize=10)
    legend(figure, axes)
    return figure


def order(rows: Mapping[str, Rows], tasks: Sequence[str]):
    """Test loss under other orders against random ones, by the place of a task."""
    others = [n for n in ("alternating:fixed", "alternating:largest") if n in rows]
    if not others or "alternating" not in rows:
        return None
    lr = chosen_rate(rows["alternating"])

    def last(name):
        mine = [row for row in rows[name] if row["lr"] == lr]
        _, values = series(mine, "eval", lambda r: r["test_losses"])
        return values[:, -1]

    figure, axes = panels(1, 1, width=5.4, height=3.2)
    (axis,) = axes[0]
    axis.axhline(0, color="#777777", linewidth=1, linestyle="--")
    places = np.arange(1, len(tasks) + 1)
    for k, name in enumerate(others):
        change = 100 * (last(name) / last("alternating") - 1)
        sd = change.std(0, ddof=1) if len(change) > 1 else None
        axis.errorbar(
            places + 0.16 * (k - 0.5 * (len(others) - 1)),
            change.mean(0),
            yerr=sd,
            fmt="os"[k],
            color=plots.PALETTE[k],
            capsize=2,
            label=row_of(name).label.removeprefix("alternating, "),
        )
    axis.set_xticks(places, tasks, rotation=35, ha="right")
    axis.set_xlabel("task, in the fixed order: first to last in a batch")
    axis.set_ylabel("test loss against random order, %")
    legend(figure, axes)
    return figure


def write(results: Results, config: Config) -> list[pathlib.Path]:
    """All figures that the rows are enough for."""
    if not config.plots:
        return []
    rows, problem = results.rows, results.problem
    found: dict[str, Any] = {
        "losses": losses(results),
        "groups": groups(results),
        "rates": rates(rows, problem.columns, problem.num_tasks),
        "order": order(rows, problem.tasks),
    }
    if any(row in rows for row in MATCHED):
        found["exploration"] = exploration(rows)
    if results.scales:
        found["scale"] = scale(results.scales, problem.columns)
    if results.aligned:
        found["alignment"] = alignment(results.aligned)
    return common.save(found, config.out / problem.folder, config)
