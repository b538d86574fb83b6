"""From rows to the table and the plots; no training code."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.alternating.config import SINGLE_TASK, Config
from experiments.alternating.problem import MODALITIES, columns
from experiments.alternating.train import row_of
from mtljax import metrics, training
from mtljax.alternating import Cost
from mtljax.training import plots, tables

BY = ("seed", "lr", "task")
MEASURES = ("distance", "straightness", "turning")
Rows = Sequence[Mapping[str, Any]]


class Report(NamedTuple):
    """What is printed and written."""

    columns: dict[str, Literal["min", "max", ""]]
    rows: dict[str, dict[str, Any]]  # label -> column -> values over seeds
    digits: dict[str, int]


def chosen_rows(rows: Rows, last_step: float = float("inf")) -> list[dict[str, Any]]:
    """The reported evaluation of every seed: batch and learning rate by validation.

    The learning rate is one for all seeds of a row: that of the best mean. With
    ``last_step`` nothing later is looked at, the learning rate included.
    """
    early = [row for row in rows if row["step"] <= last_step]
    best = tables.rows_at_best(early, "val_score", "max", by=BY)
    found = []
    for task in dict.fromkeys(row["task"] for row in best):
        mine = [row for row in best if row["task"] == task]
        rates = {row["lr"] for row in mine}

        def score(rate, mine=mine):
            return np.mean([row["val_score"] for row in mine if row["lr"] == rate])

        lr = max(sorted(rates), key=score)
        found += sorted((r for r in mine if r["lr"] == lr), key=lambda r: r["seed"])
    return found


def values_of(name: str, chosen: Rows) -> dict[str, list[float]]:
    """Test metrics over seeds; a baseline's come from the run on that modality."""

    def of(column, modality):
        wanted = modality if name == SINGLE_TASK else "all"
        return [row[f"test_{column}"] for row in chosen if row["task"] == wanted]

    pairs = zip(columns(), MODALITIES, strict=True)
    return {column: of(column, modality) for column, modality in pairs}


def travelled(rows: Rows) -> dict[str, list[float]]:
    """Measures of exploration at the end of the reported learning rate's runs."""
    lr = chosen_rows(rows)[0]["lr"]
    train = [r for r in rows if r.get("kind") == "train" and r["lr"] == lr]
    last = max(row["step"] for row in train)
    return {m: [row[m] for row in train if row["step"] == last] for m in MEASURES}


def make_report(
    rows: Mapping[str, Rows],
    costs: Mapping[str, Cost],
    times: Mapping[str, float],
    steps: int,
) -> Report:
    """Metrics at equal batches, and their mean at equal backward passes."""
    names = [name for name in rows if name != SINGLE_TASK]
    budget = steps * min(costs[name].backward for name in names)
    higher = np.ones(len(columns()), bool)
    table, baseline = {}, None
    for name, found in rows.items():
        values = values_of(name, chosen_rows(found))
        row: dict[str, Any] = {c.replace("_", " "): v for c, v in values.items()}
        stacked = np.array([values[c] for c in columns()]).T
        if name == SINGLE_TASK:
            baseline = stacked.mean(0)
        else:
            row["average"] = stacked.mean(1)
            if baseline is not None:
                row["Δm %"] = metrics.delta_m(stacked, baseline, higher)
            early = chosen_rows(found, budget / costs[name].backward)
            if early:
                at_budget = values_of(name, early)
                row["average, equal passes"] = np.mean(
                    [at_budget[c] for c in columns()], axis=0
                )
            cost = costs[name]
            row |= {"F": cost.forward, "B": cost.backward, "states": cost.states}
            row |= travelled(found)
        if name in times:
            row["step time / sum"] = times[name] / times.get("sum", times[names[0]])
        table[row_of(name).label] = row
    directions: dict[str, Literal["min", "max", ""]] = {
        c.replace("_", " "): "max" for c in columns()
    }
    directions |= {"average": "max", "Δm %": "min", "average, equal passes": "max"}
    directions |= dict.fromkeys(("F", "B", "states"), "")
    if times:
        directions["step time / sum"] = ""
    directions |= dict.fromkeys(MEASURES, "")
    digits = dict.fromkeys(directions, 3)
    digits |= {"Δm %": 1, "F": 0, "B": 0, "states": 0, "distance": 1}
    digits["step time / sum"] = 2
    return Report(directions, table, digits)


def write_table(report: Report, config: Config, command: str) -> pathlib.Path:
    """``table.md``: the command, the versions, the table."""
    text = tables.markdown_table(
        report.rows, report.columns, digits=report.digits, exclude=["single task"]
    )
    about = training.environment()
    about = {**about.pop("versions"), **about}
    lines = [
        f"# Alternating steps, {config.tasks}, {config.seeds} seeds",
        "",
        f"`{command}`",
        "",
        text,
        "",
        "Mean ± standard deviation over seeds on the test split, at the evaluation and "
        "the learning rate that validation chose. Δm is relative to single-task "
        "networks, in percent, lower is better. F, B: forward and backward passes per "
        "batch; states: optimiser states of the shared parameters. Equal passes: only "
        "as many batches as cost what the cheapest row spends on backward passes in "
        "its whole run. Distance, straightness (distance over path) and turning (mean "
        "cosine of successive batches' displacements) are the trunk's, at the end of "
        "the run.",
        "",
        "| " + " | ".join(about) + " |",
        "|" + ":--|" * len(about),
        "| " + " | ".join(str(v) for v in about.values()) + " |",
        "",
    ]
    path = config.out / "table.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_rows(
    rows: Mapping[str, Rows], times: Mapping[str, float], config: Config
) -> pathlib.Path:
    """``results.jsonl``: a line per row and run, with the whole configuration."""
    path = config.out / "results.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for name, found in rows.items():
            for row in chosen_rows(found):
                line = {"row": name, **row, "step_ms": times.get(name)}
                about = {"config": training.to_json(config), **training.environment()}
                file.write(json.dumps(training.to_json(line | about)) + "\n")
    return path


def write_plots(
    rows: Mapping[str, Rows], report: Report, config: Config
) -> list[pathlib.Path]:
    """Cosines over the run, and the trade-off between a digit and the ink."""
    shown = {}
    for name, found in rows.items():
        if name != SINGLE_TASK:
            lr = chosen_rows(found)[0]["lr"]
            shown[row_of(name).label] = [r for r in found if r.get("lr") == lr]
    pairs = [
        f"{a} · {b}" for i, a in enumerate(MODALITIES) for b in MODALITIES[i + 1 :]
    ]
    cosines = {k: plots.curve(v, "cosines", "eval") for k, v in shown.items()}
    x, y = "left acc", "ink r2"
    figures = {
        "cosines": plots.cosine_over_time(cosines, pairs),
        "tradeoff": plots.tradeoff_scatter(
            {k: (report.rows[k][x], report.rows[k][y]) for k in shown},
            xlabel=f"{x}, test",
            ylabel=f"{y}, test",
            methods=list(shown),
        ),
    }
    return [plots.save(f, config.out / f"{name}.png") for name, f in figures.items()]
