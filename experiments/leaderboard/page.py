"""Writes the sentences and tables of ``LEADERBOARD.md``."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import report as common
from experiments.common.board import number
from experiments.common.report import chance
from experiments.common.statistics import wilcoxon
from experiments.leaderboard import reference, report
from experiments.leaderboard.config import (
    EQUAL,
    LINEAR,
    NULL,
    ORACLE,
    PLANTED,
    SINGLE,
    STATIC,
    USELESS,
    Config,
)
from experiments.leaderboard.problem import FLOOR
from experiments.leaderboard.report import LEVEL, Board, Result, Values, counted

Table = Sequence[Mapping[str, Any]]
TUNE = "Tune the learning rate of equal weights first"
LIMITS = """\
The leaderboard does not show: results on images of natural size, dense prediction or
large networks; results with other optimizers than Adam; results of methods whose own
hyper-parameters are tuned, because only the learning rate is. The sets are small
tables and small images, the network is an MLP, and a batch is a large share of some
sets. A row that is not better here is "not shown to be better", and no row is called
worse unless a test says so."""


def methods_of(table: Table) -> list[Mapping[str, Any]]:
    """Entries of the methods that are compared: of the library, and external ones."""
    return [entry for entry in table if entry["kind"] in ("method", "external")]


def different(table: Table, reference: str) -> list[Mapping[str, Any]]:
    """Methods that differ significantly from a reference over the sets."""
    tested = [entry for entry in methods_of(table) if reference in entry]
    return [entry for entry in tested if entry[reference]["adjusted"] < LEVEL]


def winners(table: Table, reference: str) -> list[Mapping[str, Any]]:
    """Methods that are significantly better than a reference over the sets."""
    return [e for e in different(table, reference) if e[reference]["mean"] < 0]


def losers(table: Table, reference: str) -> list[Mapping[str, Any]]:
    """Methods that are significantly worse than a reference over the sets."""
    return [e for e in different(table, reference) if e[reference]["mean"] > 0]


def subject(entries: Table) -> str:
    """The labels of methods as the subject of a sentence.

    Examples:
      >>> subject([]), subject([{"label": "UW"}])
      ('No method is', 'UW is')
      >>> subject([{"label": "UW"}, {"label": "SI"}, {"label": "GLS"}])
      'UW, SI and GLS are'
    """
    if not entries:
        return "No method is"
    *first, last = (entry["label"] for entry in entries)
    return f"{', '.join(first)} and {last} are" if first else f"{last} is"


def answer(values: Values, table: Table) -> str:
    """The answer to "which method should I use?", by a fixed rule.

    The rule is: the methods that beat both equal weights and static weights with as
    many tries, if there are any; equal weights, if there are none; and no decision if
    the sets are too few for any method to pass the test.
    """
    methods, sets = methods_of(table), len(values.sets)
    if not values.sets:
        return "No set is complete yet, so there is no answer."
    if not methods:
        return "No method runs on all sets, so there is no answer."
    equal = {entry["row"] for entry in winners(table, "equal")}
    best = [entry for entry in winners(table, "static") if entry["row"] in equal]
    of = f"{counted(len(methods), 'method')} on {counted(sets, 'set')}"
    if best:
        listed = ", ".join(
            e["label"]
            + (f" (step time x{e['step_ratio']:.2g})" if e.get("step_ratio") else "")
            for e in best
        )
        return (
            f"Try {listed}: {len(best)} of {of} beat equal weights and static weights "
            "that were tuned with about as many tries."
        )
    if report.smallest_p(sets, len(methods)) >= LEVEL:
        need = next(
            n for n in range(sets, 99) if report.smallest_p(n, len(methods)) < LEVEL
        )
        return (
            f"{TUNE}. {counted(sets, 'set')} cannot show that any of "
            f"{counted(len(methods), 'method')} is better than equal weights: the "
            f"test needs at least {need} sets."
        )
    return (
        f"{TUNE}: none of {of} is shown to be better than both equal weights and "
        "static weights that were tuned with about as many tries."
    )


def conclusions(values: Values, table: Table) -> list[str]:
    """Sentences that follow from the tests."""
    methods = methods_of(table)
    if not values.sets or not methods:
        return []
    beat = {name: len(winners(table, name)) for name in ("equal", "static")}
    sets, least = len(values.sets), report.smallest_p(len(values.sets), len(methods))
    found = [
        f"On {'this' if sets == 1 else 'these'} {counted(sets, 'set')}, "
        f"{beat['equal']} of {counted(len(methods), 'method')} beat equal "
        f"weights (Wilcoxon, Holm), and {beat['static']} beat static weights with "
        "about as many tries."
        + (
            f" A method that is better on every set would have p = {least:.2g}."
            if least >= LEVEL
            else ""
        ),
        *_random_weights(values),
        *_worse(table),
        *_within(values, methods),
        *_seeds(values),
    ]
    x = report.detectable(values)
    if math.isfinite(x):
        found.append(
            f"A typical method must differ from equal weights by {x:.1f} Δm points to "
            f"be detected with {counted(sets, 'set')} (median of the spreads over "
            "sets; one comparison at 5 %, power 80 %)."
        )
    p = report.friedman_p(values)
    if math.isfinite(p):
        found.append(f"Friedman's test over all ranked rows has {equation(p)}.")
    best = {
        "mean rank": min(methods, key=lambda e: e["rank"]),
        "mean Δm": min(methods, key=lambda e: e["delta_m"]),
        "median Δm": min(methods, key=lambda e: e["median"]),
    }
    first = {name: entry["label"] for name, entry in best.items()}
    if len(set(first.values())) > 1:
        places = ", ".join(f"{label} by {name}" for name, label in first.items())
        found.append(
            f"The first places differ: {places}. No single order is a ranking."
        )
    return found


def partial_table(board: Board, values: Values) -> list[str]:
    """The rows that do not run on all sets, next to equal weights on their sets."""
    found = report.partial(board, values)
    if not found:
        return []
    lines = [
        [
            e["label"],
            e["sets"],
            *map(number, (e["delta_m"], e["equal"])),
            chance(e["p"]),
        ]
        for e in found
    ]
    head = ("row", "sets", "Δm", "Δm of equal weights", "p")
    text = (
        "The notes name the sets on which these rows do not run. p is that of "
        "Wilcoxon's test against equal weights on the other sets, without a correction."
    )
    table = common.markdown(head, lines)
    return ["## Methods that do not run on all sets", text, table]


def _random_weights(values: Values) -> list[str]:
    """Whether static weights drawn at random are better than equal weights."""
    if not {EQUAL, STATIC} <= values.deltas.keys():
        return []
    differences = (values.deltas[STATIC] - values.deltas[EQUAL]).mean(1)
    p = wilcoxon(differences)
    return [
        "These static weights (`static-5`) are drawn at random. They differ from equal "
        f"weights by {differences.mean():+.1f} Δm points ({equation(p)})."
    ]


def equation(p: float) -> str:
    """A p-value with its sign.

    Examples:
      >>> equation(0.0571), equation(1e-9)
      ('p = 0.057', 'p < 0.0001')
    """
    text = chance(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _worse(table: Table) -> list[str]:
    """The methods that are worse than equal weights."""
    found = losers(table, "equal")
    if not found:
        return []
    return [f"{subject(found)} worse than equal weights (Wilcoxon, Holm)."]


def _within(values: Values, methods: Table) -> list[str]:
    """What the tests over seeds show within the sets."""
    tested = [entry for entry in methods if "equal" in entry]
    seeds = values.deltas[EQUAL].shape[1] if EQUAL in values.deltas else 0
    if not tested or seeds < 2:
        return []
    better = [e for e in tested if e["equal"]["better"]]
    worse = [e for e in tested if e["equal"]["worse"]]
    text = (
        f"Within single sets (paired over {seeds} seeds, Holm within the set): "
        f"{subject(better)} better than equal weights on at least one set. "
        f"{subject(worse)} worse on at least one."
    )
    if better:
        most = max(better, key=lambda e: (e["equal"]["better"], -e["equal"]["worse"]))
        won, lost = most["equal"]["better"], most["equal"]["worse"]
        text += (
            f" {most['label']} is better on the most sets ({won}), and worse on "
            f"{lost or 'none'}."
        )
    return [text]


def _seeds(values: Values) -> list[str]:
    spread = report.seed_spread(values)
    if not spread:
        return []
    differ = sum(one.p < LEVEL for one in spread.values())
    return [
        f"On {differ} of {counted(len(spread), 'set')} the methods differ by more than "
        "seeds explain (Friedman's test over seeds, Holm over the sets)."
    ]


def cost_of(result: Result) -> list[str]:
    """What the rows cost, and the steps of the methods."""
    found = []
    hours = sum(cost.get("cpu_s", 0.0) for cost in result.costs.values()) / 3600
    if hours:
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        found.append(f"training all rows took {time} of one CPU core.")
    timed = [e for e in methods_of(result.table) if e.get("step_ratio")]
    if timed:
        high = max(timed, key=lambda e: e["step_ratio"])
        found.append(
            f"a step takes up to {high['step_ratio']:.2g} times as long as with equal "
            f"weights ({high['label']})."
        )
    own = next((e for e in result.table if e["row"] == EQUAL), {}).get("step_ratio")
    if own:
        found.append(
            f"equal weights, timed like a method, take {own:.2g} of their own time. "
            f"Ratios that differ from 1 by {abs(own - 1):.2f} or less are noise."
        )
    return [f"Cost: {text}" for text in found]


def checks(board: Board, values: Values, table: Table) -> list[str]:
    """Checks of the comparison itself."""
    found, by_row = [], {entry["row"]: entry for entry in table}
    x = report.detectable(values)
    if {NULL, EQUAL} <= set(values.deltas) and math.isfinite(x):
        d = float((values.deltas[NULL] - values.deltas[EQUAL]).mean())
        word = "less" if abs(d) < x else "MORE"
        found.append(
            "Equal weights with other initial weights and another order of data "
            f"differ by {d:+.2f} Δm points, {word} than the detectable difference."
        )
    if {LINEAR, EQUAL} <= set(values.deltas):
        pairs = [(board.cells[s][LINEAR], board.cells[s][EQUAL]) for s in values.sets]
        same = all(np.array_equal(a.chosen, b.chosen, equal_nan=True) for a, b in pairs)
        word = "equal" if same else "NOT equal"
        found.append(f"`linear` and equal weights are {word} bit by bit.")
    rows = [entry for entry in methods_of(table) if entry["row"] in values.deltas]
    for one, other in itertools.combinations(rows, 2):
        if np.array_equal(values.deltas[one["row"]], values.deltas[other["row"]]):
            found.append(
                f"{subject([one, other])} equal bit by bit. The counts and Holm's "
                "correction include both."
            )
    means = {row: by_row[row]["delta_m"] for row in PLANTED if row in by_row}
    others = [e["delta_m"] for e in methods_of(table)]
    if len(means) == len(PLANTED) and others:
        at = [sum(o < means[row] for o in others) + 1 for row in (ORACLE, USELESS)]
        found.append(
            f"By mean Δm the planted row `oracle` is at place {at[0]} and the "
            f"planted row `useless` at place {at[1]} of {len(others) + 1}."
        )
    return found


def versus(result: Result) -> dict[str, reference.Versus]:
    """Single-task networks next to the linear models, by set."""
    cells = result.board.cells
    return {
        name: reference.compare(found, cells[name][SINGLE].chosen)
        for name, found in result.references.items()
        if not isinstance(found, str)
    }


def reference_check(result: Result) -> list[str]:
    """Whether the single-task networks are as good as linear models."""
    found = versus(result)
    if not found:
        return []
    below = [name for name, one in found.items() if one.word == "worse"]
    text = (
        "Single-task networks beat or tie with ridge and logistic regression on "
        f"{len(found) - len(below)} of {counted(len(found), 'set')} (a tie is a "
        f"difference of at most {reference.TIE} of R², AUC or accuracy)."
    )
    if below:
        text += f" They are worse on {', '.join(below)}."
    if 7 * len(below) > 2 * len(found):
        text += " The training recipe is WRONG for these sets."
    return [text]


def reference_table(result: Result) -> list[str]:
    """The linear models and the single-task networks by set."""
    head = ("set", "metric", "constant", "linear", "single-task networks", "verdict")
    lines = [
        [
            *(name, one.metrics, f"{one.constant:.3f}", f"{one.linear:.3f}"),
            *(f"{one.network:.3f}", one.word),
        ]
        for name, one in versus(result).items()
    ]
    about = (
        "Test scores, means over tasks and seeds. The linear model is ridge regression "
        "for numbers and logistic regression for labels and classes; validation "
        "selects its penalty."
    )
    return [about, common.markdown(head, lines, left=2)] if lines else []


def notes(result: Result, config: Config) -> list[str]:
    """What limits the numbers: floors, ends of grids, rows that do not run."""
    board, values = result.board, result.values
    found = [
        f"There is no linear reference for {name}: {reason}"
        for name, reason in result.references.items()
        if isinstance(reason, str)
    ]
    floors, excluded = [], []
    for name in values.sets:
        about, cell = board.about[name], board.cells[name][SINGLE]
        each = (about["tasks"], about["counted"], report.average(cell.chosen, 0))
        for task, mine, error in zip(*each, strict=True):
            if not mine:
                excluded.append(f"{name} {task}")
            elif error < FLOOR:
                floors.append(f"{name} {task}")
    if floors:
        found.append(
            f"The denominator is {FLOOR} where the single-task error is smaller: "
            f"{', '.join(floors)}."
        )
    if excluded:
        found.append(f"Trained but not averaged: {', '.join(excluded)}.")
    for row in values.deltas:
        names = [name for name in values.sets if board.cells[name][row].failed.all()]
        if names:
            found.append(
                f"{report.label_of(row)} diverged at all rates on {', '.join(names)}: "
                f"Δm is set to {report.FAILED:g}."
            )
    for row in values.missing:
        reasons = [f"{s} ({why})" for (s, r), why in board.errors.items() if r == row]
        found.append(f"{report.label_of(row)} does not run on {'; '.join(reasons)}.")
    found.append(
        "If equal weights selected an end of the grid, up to "
        f"{config.extensions} rates beyond it were offered to all rows of the set. "
        "Another row that selected an end was offered up to "
        f"{config.extensions} rates for itself. The column `tries` has the largest "
        "number over sets."
    )
    return found


# --- tables ---------------------------------------------------------------------------


KINDS = {
    "method": "method",
    "external": "external",
    "control": "control",
    "auxiliary": "main task",
    "planted": "planted",
}
HEAD = (
    "row", "kind", "Δm % [95 %]", "mean rank", "equal: better / worse", "p",
    "static-5: better / worse", "p", "worst set", "step time",
)  # fmt: skip
DETAILS = (
    "row", "median Δm", "Δ to equal", "Δ to static-5", "Δm, last step", "GFLOP",
    "tries", "edge", "late", "diverged",
)  # fmt: skip
READING = """\
Δm is the mean relative change of the test error against single-task networks, over
tasks, seeds and sets: -5 means errors that are 5 % smaller. Lower is better.
"better / worse" counts the sets with a significant difference over seeds from equal
weights, or from static weights with about as many tries. p is that of Wilcoxon's
signed-rank test over the sets. Both are corrected by Holm. The step time is relative to
equal weights, for one run. A method has one try per learning rate."""
ROWS = """\
Kinds: a *control* is not a method. `equal weights, other seeds` shows the effect of
noise alone, `static-25` that of more tries of static weights. A *main task* method
favours the first task and has no rank. *Planted* rows check the comparison."""


def _versus(entry: Mapping[str, Any], name: str) -> list[str]:
    c = entry.get(name)
    return [f"{c['better']} / {c['worse']}", chance(c["adjusted"])] if c else ["", ""]


def main_line(entry: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    ratio, rank = entry.get("step_ratio"), entry["rank"]
    interval = f"[{number(entry['low'])}, {number(entry['high'])}]"
    if entry["row"] == SINGLE:
        delta, worst = "0.0 (reference)", ""
    else:
        delta = f"{number(entry['delta_m'])} {interval}"
        worst = f"{entry['worst']} {number(entry['by_set'][entry['worst']])}"
    return [
        entry["label"],
        KINDS[entry["kind"]],
        delta,
        "" if rank is None else f"{rank:.1f}",
        *_versus(entry, "equal"),
        *_versus(entry, "static"),
        worst,
        f"x{ratio:.2g}" if ratio else "",
    ]


def detail_line(entry: Mapping[str, Any]) -> list[str]:
    """A row of the table of details."""
    gflop = entry.get("gflop")
    mean = lambda name: number(entry[name]["mean"]) if name in entry else ""
    return [
        entry["label"],
        number(entry["median"]),
        mean("equal"),
        mean("static"),
        number(entry["last_step"]),
        f"{gflop:.2g}" if gflop else "",
        str(entry["tried"]),
        f"{100 * entry['edge_share']:.0f} %",
        f"{100 * entry['late_share']:.0f} %",
        f"{entry['diverged']}/{entry['runs']}",
    ]


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {text}" for text in lines)


def groups_table(table: Table) -> str:
    """Δm by group of related sets."""
    groups = list(dict.fromkeys(g for e in table for g in e["groups"]))
    lines = [
        [
            e["label"],
            *(number(e["groups"][g]) for g in groups),
            number(e["mean_of_groups"]),
        ]
        for e in table
    ]
    return common.markdown(("row", *groups, "mean of groups"), lines)


CAPTIONS = {
    "ranks": "Mean ranks",
    "delta": "Δm with its interval",
    "heat": "Δm by set",
    "cost": "Δm over the time of a step",
    "rates": "Validation error over the learning rate",
    "seeds": "Differences between methods and between seeds",
}
"""Figures and their descriptions."""


def text(
    result: Result,
    config: Config,
    head: Mapping[str, Any],
    figures: Sequence[str] = (),
) -> str:
    """The text of ``LEADERBOARD.md``.

    Args:
      result: Statistics.
      config: Configuration of the rows.
      head: Content of ``header.json``.
      figures: Names of the figures that exist.
    """
    board, values, table, (done, count) = result[:4]
    parts = ["# Leaderboard", "**Which method should I use?** " + answer(values, table)]
    if done < count:
        parts.append(f"incomplete: {done} of {count} jobs.")
    if config.steps < 500 or config.seeds < 5:
        parts.append("These runs are too short for any conclusion.")
    found = [*conclusions(values, table), *cost_of(result)]
    shown = lambda *names: [
        f"![{CAPTIONS[name]}]({name}.png)" for name in names if name in figures
    ]
    if found:
        parts.append(bullets(found))
    if values.sets:
        few = (
            "Student's interval over the sets"
            if len(values.sets) < report.FEW_SETS
            else ""
        )
        how = few or "bootstrap over sets and seeds"
        sets = f"Sets: {', '.join(values.sets)}. Intervals: {how}."
        rows = common.markdown(HEAD, map(main_line, table), left=2)
        parts += ["## Table", sets, READING, rows, ROWS]
        parts += shown("delta", "ranks", "heat")
        mine = checks(board, values, table) + reference_check(result)
        parts += ["## Checks of the comparison", bullets(mine)] if mine else []
        parts += reference_table(result)
        more = shown("rates", "seeds", "cost")
        parts += ["## Learning rates, seeds and cost", *more] if more else []
        parts += ["## Δm by group of related sets", groups_table(table)]
        parts += partial_table(board, values)
        parts += ["## Details", common.markdown(DETAILS, map(detail_line, table))]
        parts += ["## Notes", bullets(notes(result, config))]
    parts += ["## Limits", LIMITS]
    names = ("started", "python", "jax", "optax", "mtljax", "commit", "device")
    abouts = [{**h["versions"], **h} for h in (*head.get("earlier", ()), head)]
    lines = [[about.get(n, "") for n in names] for about in abouts]
    parts.append(common.markdown(names, lines, left=len(names)))
    return "\n\n".join(parts) + "\n"
