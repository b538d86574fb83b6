"""From rows to the tables and the plots; no training code."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from experiments.common import figures
from experiments.common import report as common
from experiments.common.report import Report
from experiments.common.selection import select, select_each
from experiments.igb import train
from experiments.igb.config import ROWS, SINGLE_TASK, TABLE_3, Config, is_graph
from mtljax import metrics
from mtljax.training import plots, tables

Rows = Sequence[Mapping[str, Any]]
Times = Mapping[str, tuple[float, float]]  # ms of a step, ratio to EW's

# QM9's tables print energies in meV, the rest in the target's unit.
MILLI = ("homo", "lumo", "zpve", "u0", "u", "h", "g")
DM_METRICS, DM_TASKS, RANK, TIME = (
    "Δm % (metrics)", "Δm % (tasks)", "mean rank", "step time / EW",
)  # fmt: skip


def label_of(method: str) -> str:
    """The name that tables print."""
    return "single task" if method == SINGLE_TASK else ROWS[method].label


def factors(names: Sequence[str], data: str) -> np.ndarray:
    """What the errors are multiplied by in the table."""
    molecules = is_graph(data)
    return np.array([1e3 if molecules and n in MILLI else 1.0 for n in names])


def baseline(rows: Rows, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Mean over seeds of the single-task errors, each at its best validation step."""
    best = select_each(rows, maximise=False)
    found = {}
    for part in ("val_mae", "test_mae"):
        each = [
            np.mean([row[part][i] for row in best if row["task"] == name])
            for i, name in enumerate(names)
        ]
        found[part] = np.array(each)
    return found


def chosen_rows(rows: Rows, single: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For every seed, the row of the step with the best Δm on validation."""
    scored = []
    for row in rows:
        if row.get("kind") == "eval":
            change = np.array(row["val_mae"]) / single["val_mae"] - 1
            scored.append({**row, "val_delta": 100 * float(change.mean())})
    return select(scored, "val_delta", maximise=False).rows


def make_report(
    rows: Mapping[str, Rows], names: Sequence[str], data: str, times: Times
) -> Report:
    """Errors in their units, Δm both ways, mean rank and step time."""
    single = baseline(rows[SINGLE_TASK], names)
    lower = np.zeros(len(names), bool)
    scale = factors(names, data)
    values = {
        method: np.array([row["test_mae"] for row in chosen_rows(found, single)])
        for method, found in rows.items()
        if method != SINGLE_TASK
    }
    ranks = np.asarray(
        metrics.mean_rank(np.array([v.mean(0) for v in values.values()]), lower)
    )
    table: dict[str, dict[str, Any]] = {
        "single task": dict(zip(names, scale * single["test_mae"], strict=True))
    }
    for (method, value), rank in zip(values.items(), ranks, strict=True):
        row = dict(zip(names, (scale * value).T, strict=True))
        row[DM_METRICS] = metrics.delta_m(value, single["test_mae"], lower)
        row[DM_TASKS] = metrics.delta_m(
            value, single["test_mae"], lower, groups=groups_of(names, data)
        )
        row[RANK] = float(rank)
        if method in times:
            row[TIME] = times[method][1]
        table[label_of(method)] = row
    directions: dict[str, Literal["min", "max", ""]] = dict.fromkeys(names, "min")
    directions |= {DM_METRICS: "min", DM_TASKS: "min", RANK: "min"}
    if times:
        directions[TIME] = ""
    digits = dict.fromkeys(directions, 3)
    digits |= {n: 1 for n, f in zip(names, scale, strict=True) if f > 1}
    digits |= {DM_METRICS: 1, DM_TASKS: 1, RANK: 2, TIME: 2}
    return Report(directions, table, digits)


def groups_of(names: Sequence[str], data: str) -> list[int]:
    """The task of every metric, for the mean over tasks.

    One metric per target makes the two conventions equal; on molecules the four
    atomisation energies, which differ by less than their errors, count as one task.
    """
    if not is_graph(data):
        return list(range(len(names)))
    energies = ("u0", "u", "h", "g")
    kinds = ["energy" if name in energies else name for name in names]
    order = list(dict.fromkeys(kinds))
    return [order.index(kind) for kind in kinds]


def write(  # noqa: PLR0917
    rows: Mapping[str, Rows],
    table: Report,
    times: Times,
    config: Config,
    problem: train.Problem,
    command: str,
) -> list[pathlib.Path]:
    """``results.jsonl``, ``table.md`` and the figures of a data set."""
    folder, names = train.folder(config, problem.name), problem.names
    parts = [
        f"# {problem.name}: {len(table.rows)} rows, {config.seeds} seeds, "
        f"{problem.settings.steps} steps",
        f"`{command}`",
        table.markdown(exclude=["single task"]),
        "Mean absolute errors on the test split in the targets' units (energies of "
        "molecules in meV), mean ± standard deviation over seeds, at the step with the "
        "best Δm on validation. Δm is the mean relative change of the errors against "
        "single-task networks (mean over seeds), in percent, lower is better: over all "
        "metrics, and over tasks, where the four atomisation energies count as one. "
        "Mean rank is among the multi-task rows. Bold is the best of these. Step time "
        "is that of all seeds together, measured alternately with EW's, after "
        "training.",
    ]
    single = baseline(rows[SINGLE_TASK], names)
    lines = []
    for method, found in rows.items():
        ms, ratio = times.get(method, (None, None))
        alone = method == SINGLE_TASK
        best = select_each(found, maximise=False) if alone else None
        for row in chosen_rows(found, single) if best is None else best:
            about = {"data": problem.name, "method": method}
            lines.append({**about, **row, "step_ms": ms, "step_ratio": ratio})
    return [
        common.write_rows(folder / "results.jsonl", config, lines),
        common.write_table(folder / "table.md", parts),
        *write_plots(rows, table, names, config=config, data=problem.name),
    ]


def write_plots(
    rows: Mapping[str, Rows],
    report: Report,
    names: Sequence[str],
    *,
    config: Config,
    data: str,
) -> list[pathlib.Path]:
    """Weights, gaps, reward and temperature over time; the ablations."""
    if not config.plots:
        return []
    agent, steps = config.training_of(data).agent, config.training_of(data).steps
    window = train.phases(agent, steps).window
    labels = {m: label_of(m) for m in rows if m != SINGLE_TASK}
    order = list(labels.values())
    made = {}
    weights = {
        labels[m]: plots.curve(rows[m], "log_weights")
        for m in labels
        if ROWS[m].loss.startswith("igb")
    }
    if weights:
        made["weights"] = plots.weight_trajectories(weights, names, window=5)
    alone = [m for m in labels if not set("+:") & set(m)]
    gaps = {labels[m]: gap_curve(rows[m], window) for m in alone}
    made["gaps"] = plots.loss_curves(
        gaps, names, ylabel="improvable gap L / L_base", window=5, methods=order
    )
    agents = {
        labels[m]: agent_curve(rows[m]) for m in labels if ROWS[m].loss == "igb_v2"
    }
    if agents:
        made["agent"] = plots.loss_curves(
            agents,
            ["reward", "entropy temperature"],
            ylabel="",
            log=False,
            window=5,
            methods=order,
        )
    shown = [label_of(m) for m in TABLE_3 if m in labels]
    if any(":" in m for m in labels):
        made["ablations"] = ablation_figure(
            {label: report.rows[label][DM_METRICS] for label in shown}
        )
    return figures.save(made, train.folder(config, data), config)


def gap_curve(rows: Rows, window: tuple[int, int]) -> plots.Curve:
    """Training losses over their mean in the window: also for rows without L_base."""
    steps, losses = plots.curve(rows, "losses")
    inside = (steps > window[0]) & (steps <= window[1])
    # Rows are means over the steps before them; one covers a window shorter than that.
    inside[np.argmax(steps >= window[1])] |= not inside.any()
    return plots.Curve(steps, losses / losses[:, inside].mean(1, keepdims=True))


def agent_curve(rows: Rows) -> plots.Curve:
    """Reward and temperature ``[seeds, points, 2]``."""
    steps, reward = plots.curve(rows, "reward")
    _, temperature = plots.curve(rows, "temperature")
    return plots.Curve(steps, np.stack([reward, temperature], -1))


def ablation_figure(values: Mapping[str, Any]) -> Any:
    """Δm of the rows of the paper's Table 3: mean over seeds and ± 1 sd."""
    figure, axes = figures.panels(1, 1, 5.6, 0.35 * len(values) + 0.4)
    axis = axes[0, 0]
    for i, (label, value) in enumerate(values.items()):
        cell = tables.summarise(value)
        sd = 0.0 if np.isnan(cell.sd) else cell.sd
        color = plots.PALETTE[0 if label.startswith("IGB") else 1]
        axis.errorbar(cell.mean, -i, xerr=sd, marker="o", color=color, capsize=3)
    axis.set_yticks([-i for i in range(len(values))], list(values))
    axis.set_xlabel("Δm on test, % (better ←), mean ± sd over seeds")
    return figure
