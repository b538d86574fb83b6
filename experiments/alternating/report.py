"""Builds the table and the lines of results from the rows. Does not train."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.alternating.config import SINGLE_TASK, Config
from experiments.alternating.problem import Problem
from experiments.alternating.train import cost_of, inner_steps, row_of
from experiments.common import report as common
from experiments.common.report import Column, Report
from experiments.common.selection import edge_notes, select, select_each
from experiments.common.statistics import comparison_table
from mtljax import metrics
from mtljax.training import tables

MEASURES = ("distance", "straightness", "turning")
Rows = Sequence[Mapping[str, Any]]
Columns = Mapping[str, np.ndarray]


class Results(NamedTuple):
    """What was trained on a set."""

    problem: Problem
    rows: Mapping[str, Rows]
    scales: Mapping[str, Rows]
    steps: int

    def cost(self, name: str) -> Any:
        """Returns the passes per batch of a row."""
        return cost_of(name, self.problem.num_tasks)

    def delta_m(self, chosen: Rows) -> np.ndarray:
        """Δm of reported evaluations ``[seeds]`` against single-task networks."""
        columns = self.problem.columns
        alone = columns_of(columns, chosen_rows(self.rows[SINGLE_TASK])).mean(0)
        values, better = columns_of(columns, chosen), [True] * len(columns)
        return np.asarray(metrics.delta_m(values, alone, better))


def chosen_rows(rows: Rows, last_step: float = math.inf) -> list[dict[str, Any]]:
    """Returns the reported evaluation per seed, ignoring steps after ``last_step``."""
    return select_each(rows, last_step=last_step)


def chosen_rate(rows: Rows) -> float:
    """Returns the learning rate selected by validation for a multi-task row."""
    return chosen_rows(rows)[0]["lr"]


def columns_of(columns: Columns, chosen: Rows) -> np.ndarray:
    """Returns test metrics ``[seeds, columns]``, combining single-task networks."""
    if chosen[0]["task"] < 0:
        values = np.array([row["test_metrics"] for row in chosen])
    else:
        seeds = list(dict.fromkeys(row["seed"] for row in chosen))
        mine = [[r["test_metric"] for r in chosen if r["seed"] == s] for s in seeds]
        values = np.array(mine)
    return values @ np.array(list(columns.values())).T


def travelled(rows: Rows) -> dict[str, list[float]]:
    """Returns the final exploration measures of the runs at the reported rate."""
    lr = chosen_rate(rows)
    train = [r for r in rows if r.get("kind") == "train" and r["lr"] == lr]
    last = max(row["step"] for row in train)
    return {m: [row[m] for row in train if row["step"] == last] for m in MEASURES}


def make_report(results: Results) -> Report:
    """Reports metrics at equal batches, and their mean at equal backward passes."""
    rows, columns = results.rows, results.problem.columns
    names = [name for name in rows if name != SINGLE_TASK]
    budget = results.steps * min(results.cost(name).backward for name in names)
    table = {}
    for name, found in rows.items():
        chosen, last = chosen_rows(found), select_each(found, column="last")
        values = columns_of(columns, chosen)
        row: dict[str, Any] = dict(zip(columns, values.T.tolist(), strict=True))
        row["average"] = values.mean(1)
        row["average, last step"] = columns_of(columns, last).mean(1)
        if name != SINGLE_TASK:
            row["Δm %"] = results.delta_m(chosen)
            cost = results.cost(name)
            early = chosen_rows(found, budget / cost.backward)
            if early:
                row["average, equal passes"] = columns_of(columns, early).mean(1)
            row |= {"F": cost.forward, "B": cost.backward, "states": cost.states}
            row |= {"lr / 1e-3": 1e3 * chosen[0]["lr"], **travelled(found)}
        table[row_of(name).label] = row
    averages = ["average"] if len(columns) > 1 else []
    shown: dict[str, Column] = dict.fromkeys([*columns, *averages], ("max", 3))
    shown |= {"average, last step": ("max", 3), "Δm %": ("min", 1)}
    shown |= {"average, equal passes": ("max", 3), "lr / 1e-3": ("", 1)}
    shown |= dict.fromkeys(("F", "B", "states"), ("", 0))
    shown |= {"distance": ("", 1), "straightness": ("", 2), "turning": ("", 3)}
    return Report(shown, table)


Pair = tuple[np.ndarray, np.ndarray]


def quality(results: Results) -> dict[str, Pair]:
    """Δm of pairs of rows ``[seeds]``, and the slope of Δm over groups."""
    rows = results.rows
    names = [name for name in rows if name != SINGLE_TASK]
    delta = {name: results.delta_m(chosen_rows(rows[name])) for name in names}
    pairs = [
        ("alternating", "joint"),
        ("alternating", "alternating:shared"),
        ("adatask", "joint"),
        ("groups_4", "joint"),
    ]
    found = {
        f"{row_of(a).label} - {row_of(b).label}": (delta[b], delta[a])
        for a, b in pairs
        if a in delta and b in delta
    }
    line = group_line(rows, results.problem.num_tasks)
    if len(line) > 2:
        values = np.array([delta[name] for name in line.values()])
        slope = np.polyfit(np.log2(list(line)), values, 1)[0]
        found["slope over G, a doubling"] = (np.zeros_like(slope), slope)
    return found


def group_line(rows: Mapping[str, Any], tasks: int) -> dict[int, str]:
    """G -> row with a state a slot; one group is the joint row, T alternation."""
    named = {row_of(n).groups: n for n in rows if n.startswith("groups_")}
    line = {1: "joint", **dict(sorted(named.items())), tasks: "alternating:shared"}
    return {g: n for g, n in line.items() if n in rows}


def by_rate(rows: Rows, value: Callable[[Rows], Any]) -> tuple[Any, np.ndarray]:
    """Learning rates, and ``value`` of every run ``[seeds, rates]``."""
    rates = sorted({row["lr"] for row in rows})
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    runs: dict[Any, list[Any]] = {}
    for row in rows:
        runs.setdefault((row["seed"], row["lr"]), []).append(row)
    found = [[value(runs[seed, lr]) for lr in rates] for seed in seeds]
    return np.array(rates), np.array(found)


def _best(run: Rows) -> float:
    scores = [r["val_score"] for r in run if r["kind"] == "eval"]
    return max([s for s in scores if s is not None], default=0.0)


def _trained(run: Rows) -> list[Mapping[str, Any]]:
    return [row for row in run if row["kind"] == "train"]


def _distance(run: Rows) -> float:
    return _trained(run)[-1]["distance"] or math.nan


def at_rates(rates: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Values ``[seeds, wanted]``, linear in the logarithm of the rate."""
    return np.array([np.interp(np.log(wanted), np.log(rates), v) for v in values])


def tolerance(results: Results) -> Pair:
    """Mean validation score over the logarithm of the step length, joint first.

    Over the step lengths that both rows have, alternation's being T rates.
    """
    found = {}
    for name in ("joint", "alternating"):
        rates, values = by_rate(results.rows[name], _best)
        found[name] = rates * inner_steps(name, results.problem.num_tasks), values
    low = max(reach[0] for reach, _ in found.values())
    high = min(reach[-1] for reach, _ in found.values())
    points = np.geomspace(low, high, 101)
    joint, other = (at_rates(r, v, points).mean(1) for r, v in found.values())
    return joint, other


def exploration(results: Results) -> dict[str, Pair]:
    """Log distances of the trunk, joint first, at the rate that alternation chose.

    At that rate for both; against the joint step T times as long, or the longest of the
    grid if that is shorter; and at that rate
    where the mean training loss first reaches the larger of their two lowest ones.
    """
    tasks, rate = results.problem.num_tasks, chosen_rate(results.rows["alternating"])
    ends = {n: by_rate(results.rows[n], _distance) for n in ("joint", "alternating")}
    log = {n: at_rates(r, np.log(v), np.array([rate])) for n, (r, v) in ends.items()}
    rates, values = ends["joint"]
    found = {"at one rate": (log["joint"][:, 0], log["alternating"][:, 0])}
    longer = at_rates(rates, np.log(values), np.array([rate * tasks]))
    found["against a step of equal length"] = longer[:, 0], log["alternating"][:, 0]
    runs = {
        name: by_rate([r for r in results.rows[name] if r["lr"] == rate], _trained)[1]
        for name in ("joint", "alternating")
    }
    reached: dict[str, list[float]] = {name: [] for name in runs}
    for pair in zip(*(found[:, 0] for found in runs.values()), strict=True):
        lowest = max(min(np.mean(r["losses"]) for r in run) for run in pair)
        for name, run in zip(runs, pair, strict=True):
            first = next(r for r in run if np.mean(r["losses"]) <= lowest)
            reached[name].append(math.log(first["distance"]))
    joint, other = (np.array(values) for values in reached.values())
    return found | {"at equal training loss": (joint, other)}


def by_scale(found: Rows, columns: Columns) -> dict[float, np.ndarray]:
    """Factor of the last task's loss -> test metrics ``[seeds, columns]``."""
    scales = sorted({row["scale"] for row in found})
    at = lambda scale: chosen_rows([r for r in found if r["scale"] == scale])
    return {scale: columns_of(columns, at(scale)) for scale in scales}


def scale_slopes(study: Mapping[str, Rows], columns: Columns) -> dict[str, Pair]:
    """Change of the scaled task's metric for a factor of ten ``[seeds]``."""
    slopes = {}
    for name, found in study.items():
        values = by_scale(found, columns)
        scaled = np.array(list(values.values()))[..., -1]
        slope = np.polyfit(np.log10(list(values)), scaled, 1)[0]
        slopes[row_of(name).label] = (np.zeros_like(slope), slope)
    return slopes


def comparisons(results: Results) -> list[str]:
    """The paired differences that claims are about."""
    parts = ["Δm, percent:", comparison_table(quality(results))]
    if {"joint", "alternating"} <= set(results.rows):
        area = {"alternating - joint": tolerance(results)}
        parts += ["Mean validation score over the step lengths that both have:"]
        parts += [comparison_table(area, digits=3)]
        parts += ["Logarithm of the trunk's distance, alternating - joint:"]
        parts += [comparison_table(exploration(results))]
    if results.scales:
        slopes = scale_slopes(results.scales, results.problem.columns)
        parts += ["Change of the scaled task's metric for a factor of ten:"]
        parts += [comparison_table(slopes, digits=3)]
    return parts


def scale_table(study: Mapping[str, Rows], columns: Columns) -> str:
    """Tabulates the last column and the mean of the others, by factor and row."""
    shown: dict[str, dict[str, Any]] = {}
    for name, found in study.items():
        label, values = row_of(name).label, by_scale(found, columns)
        for kind, at in (("scaled", slice(-1, None)), ("others", slice(-1))):
            means = {f"{scale:g}": v[:, at].mean(1) for scale, v in values.items()}
            shown[f"{label}: {kind}"] = means
    factors = sorted({row["scale"] for found in study.values() for row in found})
    return tables.markdown_table(shown, {f"{f:g}": "" for f in factors})


def seed_values(results: Results) -> dict[str, dict[str, np.ndarray]]:
    """Label -> metric -> values ``[seeds]``, of the two rows that are compared."""
    if not {"joint", "alternating"} <= set(results.rows):
        return {}
    pairs = {"val_score_area": tolerance(results)}
    names = ("distance_same_rate", "distance_same_length", "distance_same_loss")
    for name, (joint, other) in zip(names, exploration(results).values(), strict=True):
        pairs[name] = np.exp(joint), np.exp(other)
    found = {
        row_of(name).label: {metric: pair[i] for metric, pair in pairs.items()}
        for i, name in enumerate(("joint", "alternating"))
    }
    # At one rate of Adam the mean of the losses is the sum: a row of that name.
    found["mean"] = {"distance_same_rate": pairs["distance_same_rate"][0]}
    return found


def result_lines(results: Results) -> list[dict[str, Any]]:
    """Lines by row, seed and column; single-task networks have one for each task."""
    rows = results.rows
    alone = chosen_rows(rows[SINGLE_TASK])
    values = seed_values(results) if len(alone) > results.problem.num_tasks else {}
    joint = rows.get("joint")
    lines: list[dict[str, Any]] = [
        {"row": "single task", "column": "chosen", **row} for row in alone
    ]
    for name, found in rows.items():
        if name == SINGLE_TASK:
            continue
        label, choice = row_of(name).label, select(found)
        about = {"edge": choice.edge, "late": choice.late, "method": name}
        base = choice if joint is None else select(joint)
        columns = {"chosen": (choice.rows, base.rows), "last": (choice.last, base.last)}
        for column, (at, compared) in columns.items():
            delta = results.delta_m(at)
            gain = results.delta_m(compared) - delta
            for i, row in enumerate(at):
                more = {metric: v[i] for metric, v in values.get(label, {}).items()}
                more |= {"delta_m": delta[i], "gain_over_joint": gain[i]}
                lines.append({"row": label, "column": column, **row, **about, **more})
    for i, value in enumerate(values.get("mean", {}).get("distance_same_rate", ())):
        seed = sorted({row["seed"] for row in alone})[i]
        lines.append({"row": "mean", "seed": seed, "distance_same_rate": value})
    for name, found in results.scales.items():
        for scale in dict.fromkeys(row["scale"] for row in found):
            for row in chosen_rows([r for r in found if r["scale"] == scale]):
                r2 = float(columns_of(results.problem.columns, [row])[0, -1])
                about = {"study": "scales", "row": row_of(name).label, "image_r2": r2}
                lines.append({**about, **row})
    return lines


def write(
    results: Results, table: Report, config: Config, command: str
) -> list[pathlib.Path]:
    """Writes ``results.jsonl`` and ``table.md`` of a data set with its studies."""
    name, rows = results.problem.name, results.rows
    seeds = config.seeds_of(name)
    choices = {
        row_of(row).label: select(found)
        for row, found in rows.items()
        if row != SINGLE_TASK
    }
    parts = [
        f"# Alternating steps, {name}, {len(seeds)} seeds",
        f"`{command}`",
        table.markdown(exclude=["single task"]),
        "Mean ± standard deviation over seeds on the test split, at the evaluation and "
        "the learning rate that validation chose. Δm is relative to single-task "
        "networks, in percent, lower is better. F, B: forward and backward passes per "
        "batch; states: optimizer states of the shared parameters. Equal passes: only "
        "as many batches as cost what the cheapest row spends on backward passes in "
        "its whole run. Distance, straightness (distance over path) and turning (mean "
        "cosine of successive batches' displacements) are the trunk's, at the end of "
        "the run.",
        " ".join(edge_notes(choices)),
        *(comparisons(results) if len(seeds) > 1 else []),
    ]
    if results.scales:
        title = f"Test metric by the factor of the loss of {results.problem.tasks[-1]}:"
        parts += [title, scale_table(results.scales, results.problem.columns)]
    lines = [{"set": name, **line} for line in result_lines(results)]
    return common.write(config.folder(name), config, lines, parts, set=name)
