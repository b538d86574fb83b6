"""From rows to the table and the lines of results; no training code."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.alternating.config import SINGLE_TASK, Config
from experiments.alternating.train import row_of
from mtljax import metrics, training
from mtljax.alternating import Cost
from mtljax.training import tables

BY = ("seed", "lr", "task", "scale")
MEASURES = ("distance", "straightness", "turning")
Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, np.ndarray]


class Measured(NamedTuple):
    """What a program takes: of one run, one batch."""

    milliseconds: float
    megabytes: float  # arguments, results and temporary buffers


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


def make_report(
    rows: Mapping[str, Rows],
    columns: Columns,
    costs: Mapping[str, Cost],
    measured: Mapping[str, Measured],
    steps: int,
) -> Report:
    """Metrics at equal batches, and their mean at equal backward passes."""
    names = [name for name in rows if name != SINGLE_TASK]
    budget = steps * min(costs[name].backward for name in names)
    baseline = columns_of(columns, chosen_rows(rows[SINGLE_TASK])).mean(0)
    table = {}
    for name, found in rows.items():
        chosen = chosen_rows(found)
        values = columns_of(columns, chosen)
        row: dict[str, Any] = dict(zip(columns, values.T.tolist(), strict=True))
        row["average"] = values.mean(1)
        if name != SINGLE_TASK:
            row["Δm %"] = metrics.delta_m(values, baseline, [True] * len(baseline))
            early = chosen_rows(found, budget / costs[name].backward)
            if early:
                row["average, equal passes"] = columns_of(columns, early).mean(1)
            cost = costs[name]
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


def _versions() -> list[str]:
    about = training.environment()
    about = {**about.pop("versions"), **about}
    return [
        "| " + " | ".join(about) + " |",
        "|" + ":--|" * len(about),
        "| " + " | ".join(str(v) for v in about.values()) + " |",
        "",
    ]


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


def write_table(
    report: Report, name: str, config: Config, command: str, more: Mapping[str, str]
) -> pathlib.Path:
    """``table.md``: the command, the versions, the table, and those of studies."""
    text = tables.markdown_table(
        report.rows, report.columns, digits=report.digits, exclude=["single task"]
    )
    lines = [
        f"# Alternating steps, {name}, {config.seeds} seeds",
        "",
        f"`{command}`",
        "",
        text,
        "",
        "Mean ± standard deviation over seeds on the test split, at the evaluation and "
        'the learning rate that validation chose (the rate a row of "lr x T" '
        "multiplies is shown before it does). Δm is relative to single-task networks, "
        "in percent, lower is better. F, B: forward and backward passes per batch; "
        "states: optimiser states of the shared parameters. Equal passes: only as many "
        "batches as cost what the cheapest row spends on backward passes in its whole "
        "run. Distance, straightness (distance over path) and turning (mean cosine of "
        "successive batches' displacements) are the trunk's, at the end of the run.",
        "",
    ]
    for title, table in more.items():
        lines += [title, "", table, ""]
    path = config.out / name / "table.md"
    path.write_text("\n".join([*lines, *_versions()]), encoding="utf-8")
    return path


def write_rows(
    rows: Mapping[str, Rows],
    studies: Mapping[str, Mapping[str, Rows]],
    measured: Mapping[str, Measured],
    name: str,
    config: Config,
) -> pathlib.Path:
    """``results.jsonl``: the configuration, then a line per row and reported run."""
    about = {"config": training.to_json(config), **training.environment()}
    for path in ("data_dir", "out"):  # of a machine
        about["config"].pop(path)
    lines: list[Any] = [{"kind": "about", "set": name, **about}]
    for row_name, found in rows.items():
        taken = measured.get(row_name)
        for row in chosen_rows(found):
            timing = taken._asdict() if taken else {}
            lines.append({"row": row_name, **row, **timing})
    for study, by_row in studies.items():
        for row_name, found in by_row.items():
            for scale in dict.fromkeys(row["scale"] for row in found):
                at = [row for row in found if row["scale"] == scale]
                lines += [
                    {"study": study, "row": row_name, **row} for row in chosen_rows(at)
                ]
    path = config.out / name / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(training.to_json(line)) + "\n")
    return path
