"""Builds the leaderboard from the rows. Does not train.

Δm is the mean over tasks of the relative change of the test error against single-task
networks, in percent. It is positive if a row is worse. Statistics use the sets on which
every row is finished.
"""

import gzip
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import mtljax
from experiments.common import problem as problems
from experiments.common import provenance
from experiments.common import report as common
from experiments.common.selection import Choice, select
from experiments.common.statistics import (
    bootstrap_sets,
    friedman,
    holm,
    minimum_detectable,
    nemenyi_distance,
    paired,
    wilcoxon,
)
from experiments.leaderboard import queue
from experiments.leaderboard.config import (
    AUXILIARY,
    EQUAL,
    LINEAR,
    NULL,
    ORACLE,
    PLANTED,
    SETS,
    SINGLE,
    STATIC,
    WIDE,
    Config,
)
from experiments.leaderboard.problem import FLOOR

LEVEL = 0.05
FAILED = 100.0
"""Δm of a run that has no finite result."""
FEW_SETS = 8
"""Below this number of sets the bootstrap interval is too narrow."""
LIMITS = """\
The leaderboard does not show: results on images of natural size, dense prediction or
large networks; results with other optimizers than Adam; results of methods whose own
hyper-parameters are tuned, because only the learning rate is. The sets are small
tables and small images, the network is an MLP, and a batch is a large share of some
sets. A row that is not better here is "not shown to be better"."""


class Cell(NamedTuple):
    """A row on a set, at the rate that validation selected."""

    chosen: np.ndarray  # test errors [S, T] at the selected step
    last: np.ndarray  # test errors [S, T] at the last step, at the same rate
    failed: np.ndarray  # runs [S] without a finite score
    lr: float | None
    edge: str | None
    late: float
    tried: int  # configurations that were offered
    runs: int
    diverged: int  # runs of all configurations that had diverged at the end


class Board(NamedTuple):
    """All cells, and what is known of the sets.

    Attributes:
      cells: Cells by set and row.
      about: First line of a job, by set.
      errors: Reasons why a row does not run on a set, by ``(set, row)``.
    """

    cells: dict[str, dict[str, Cell]]
    about: dict[str, Mapping[str, Any]]
    errors: dict[tuple[str, str], str]


# --- from rows to cells ---------------------------------------------------------------


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _as_cell(rows: Sequence[Mapping[str, Any]], choice: Choice) -> Cell:
    shown = [row for row in rows if row["last"]]
    late = np.mean([row["late"] for row in choice.rows])
    return Cell(
        chosen=np.array([_numbers(row["test"]) for row in choice.rows]),
        last=np.array([_numbers(row["test"]) for row in choice.last]),
        failed=np.array([row["val_score"] is None for row in choice.rows]),
        lr=choice.lr,
        edge=choice.edge,
        late=float(late),
        tried=len({row["lr"] for row in rows}),
        runs=len(shown),
        diverged=sum(bool(row["diverged"]) for row in shown),
    )


def cell_of(rows: Sequence[Mapping[str, Any]]) -> Cell:
    """The cell of a row. Configurations of static weights have no end of a grid."""
    static = "config" in rows[0]
    if static:
        rows = [{**row, "lr": row["config"], "rate": row["lr"]} for row in rows]
    choice = select(rows, maximise=False)
    if static:
        choice = choice._replace(edge=None)
    return _as_cell(rows, choice)


def single_cell(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Cell:
    """The cell of the single-task networks. Each task has its own rate."""
    each = [cell_of([row for row in rows if row["task"] == task]) for task in tasks]
    own = lambda name: np.stack([getattr(c, name)[:, t] for t, c in enumerate(each)], 1)
    edges = [cell.edge for cell in each if cell.edge]
    return Cell(
        chosen=own("chosen"),
        last=own("last"),
        failed=np.any([cell.failed for cell in each], 0),
        lr=None,
        edge=edges[0] if len(edges) * 2 > len(each) else None,
        late=float(np.mean([cell.late for cell in each])),
        tried=each[0].tried,
        runs=sum(cell.runs for cell in each),
        diverged=sum(cell.diverged for cell in each),
    )


def oracle_cell(rows: Sequence[Mapping[str, Any]], counted: np.ndarray) -> Cell:
    """The planted good row: ``static-25`` with weights and rate selected on test."""

    def score(row):
        test = np.array(_numbers(row["test"]))[counted]
        known = test[~np.isnan(test)]
        if row["val_score"] is None or not known.size:
            return None
        return float(np.log(np.maximum(known, FLOOR)).mean())

    return cell_of([{**row, "val_score": score(row)} for row in rows])


def make_board(lines: Sequence[Mapping[str, Any]]) -> Board:
    """Builds the board from the lines of the finished jobs."""
    board = Board({}, {}, {})
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = (line["set"], line["row"])
        if line.get("kind") == "job":
            board.about[key[0]] = line
            if line.get("error"):
                board.errors[key] = line["error"]
        else:
            found.setdefault(key, []).append(line)
    for (name, row), rows in found.items():
        about, cells = board.about[name], board.cells.setdefault(name, {})
        if row == SINGLE:
            cells[row] = single_cell(rows, about["tasks"])
        else:
            cells[row] = cell_of(rows)
        if row == WIDE:
            cells[ORACLE] = oracle_cell(rows, np.array(about["counted"]))
    return board


def delta_m(cell: Cell, base: Cell, counted: Any, column: str = "chosen") -> np.ndarray:
    """Δm of each seed in percent, shape ``[S]``.

    The denominator of a task is the mean error of the single-task networks, and at
    least :data:`FLOOR`.

    Examples:
      >>> def one(*e):
      ...     ends = np.array([e]), np.array([e]), np.array([False])
      ...     return Cell(*ends, 0.1, None, 0.0, 1, 1, 0)
      >>> delta_m(one(0.55, 0.2), one(0.5, 0.25), [True, True]).round(6).tolist()
      [-5.0]
    """
    counted = np.asarray(counted, bool)
    with np.errstate(invalid="ignore"):
        single = _mean(getattr(base, column)[:, counted], 0)
        change = (getattr(cell, column)[:, counted] - single) / np.maximum(
            single, FLOOR
        )
    found = 100 * _mean(change, 1)
    return np.where(cell.failed | ~np.isfinite(found), FAILED, found)


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the entries that are not NaN, and NaN if all are."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis)
    count = known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# --- statistics -----------------------------------------------------------------------


class Values(NamedTuple):
    """Δm on the complete sets.

    Attributes:
      sets: Names of the sets.
      deltas: Δm ``[sets, seeds]`` of each row that runs on all of them.
      last: The same at the last steps.
      missing: Rows that do not run on all sets.
    """

    sets: list[str]
    deltas: dict[str, np.ndarray]
    last: dict[str, np.ndarray]
    missing: list[str]


def complete_sets(board: Board, rows: Sequence[str]) -> list[str]:
    """Sets on which every row is finished, or does not run for a known reason."""
    return [
        name
        for name, cells in board.cells.items()
        if SINGLE in cells
        and all(row in cells or (name, row) in board.errors for row in rows)
    ]


def values_of(board: Board, rows: Sequence[str]) -> Values:
    """Δm of all rows on the complete sets."""
    sets = complete_sets(board, rows)
    found: dict[str, dict[str, np.ndarray]] = {"chosen": {}, "last": {}}
    everything = [*rows, *([ORACLE] if WIDE in rows else [])]
    for row in everything if sets else ():
        if all(row in board.cells[name] for name in sets):
            for column, deltas in found.items():
                deltas[row] = np.stack(
                    [
                        delta_m(
                            board.cells[name][row],
                            board.cells[name][SINGLE],
                            board.about[name]["counted"],
                            column,
                        )
                        for name in sets
                    ]
                )
    missing = [row for row in rows if sets and row not in found["chosen"]]
    return Values(sets, found["chosen"], found["last"], missing)


def kind_of(row: str) -> str:
    """Whether a row is a method, an external or auxiliary one, a control or planted."""
    if row in PLANTED:
        return "planted"
    if row in AUXILIARY:
        return "auxiliary"
    if ":" in row:
        return "external"
    # `linear` with its default weights is the row of equal weights.
    return "method" if row in mtljax.METHODS and row != LINEAR else "control"


def label_of(row: str) -> str:
    """Name of a row in tables and figures."""
    if row == LINEAR:
        return "linear (check)"
    return mtljax.METHODS[row].label if row in mtljax.METHODS else row


def ranked_rows(values: Values) -> list[str]:
    """Rows with a rank: methods, external ones and the controls with weights."""
    return [
        row
        for row in values.deltas
        if kind_of(row) in ("method", "external") or row in (EQUAL, NULL, STATIC, WIDE)
    ]


def families(values: Values) -> list[list[str]]:
    """Rows whose tests are corrected together."""
    kinds = (("method", "external"), ("auxiliary",), ("planted",))
    found = [[r for r in values.deltas if kind_of(r) in kind] for kind in kinds]
    return [family for family in found if family]


class Comparison(NamedTuple):
    """A row against a reference over the sets."""

    mean: float  # of the differences of Δm; negative if the row is better
    p: float  # Wilcoxon's signed-rank test over sets
    adjusted: float  # by Holm, over the rows of its family
    better: int  # sets on which the row is significantly better
    worse: int


def compare(values: Values, reference: str) -> dict[str, Comparison]:
    """Compares all tested rows with a reference.

    The test over sets is Wilcoxon's, adjusted by Holm over the rows. The numbers of
    sets come from Student's tests over seeds, adjusted by Holm within each set.
    """
    if reference not in values.deltas:
        return {}
    base, found = values.deltas[reference], {}
    for family in families(values):
        rows = [row for row in family if row != reference]
        differences = {row: values.deltas[row] - base for row in rows}
        raw = [wilcoxon(d.mean(1)) for d in differences.values()]
        significant = _within_sets(list(differences.values()))
        for i, (row, adjusted) in enumerate(zip(rows, holm(raw), strict=True)):
            mean = differences[row].mean(1)
            found[row] = Comparison(
                mean=float(mean.mean()),
                p=raw[i],
                adjusted=float(adjusted),
                better=int((significant[i] & (mean < 0)).sum()),
                worse=int((significant[i] & (mean > 0)).sum()),
            )
    return found


def _within_sets(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Significant differences ``[rows, sets]`` over seeds, by Holm within each set."""
    d = np.stack(differences)  # rows, sets, seeds
    if d.shape[2] < 2:
        return np.zeros(d.shape[:2], bool)
    p = paired(np.zeros_like(d.transpose(2, 0, 1)), d.transpose(2, 0, 1)).p
    # Equal differences of all seeds have no variance: no effect, or a certain one.
    p = np.where(np.isnan(p), np.where(d.mean(2) == 0, 1.0, 0.0), p)
    return np.stack([holm(p[:, s]) for s in range(d.shape[1])], 1) < LEVEL


def interval(delta: np.ndarray) -> tuple[float, float]:
    """Interval of the mean Δm over sets and seeds at 95 %.

    The bootstrap over sets and seeds; with few sets, Student's interval over the means
    of the sets.
    """
    if len(delta) >= FEW_SETS:
        return bootstrap_sets(delta)[1:]
    if len(delta) < 2:
        return (math.nan, math.nan)
    means = delta.mean(1)
    found = paired(np.zeros_like(means), means)
    return float(found.low), float(found.high)


def group_values(values: Values, row: str) -> dict[str, np.ndarray]:
    """Δm over seeds of each group of sets, the mean over its sets."""
    groups = [SETS[name].group if name in SETS else "other" for name in values.sets]
    return {
        group: np.mean(
            [values.deltas[row][i] for i, g in enumerate(groups) if g == group], 0
        )
        for group in dict.fromkeys(groups)
    }


def detectable(values: Values) -> float:
    """Smallest difference of Δm to equal weights that these sets can show."""
    methods = [row for row in values.deltas if kind_of(row) in ("method", "external")]
    sets = len(values.sets)
    if EQUAL not in values.deltas or sets < 2 or not methods:
        return math.nan
    base = values.deltas[EQUAL].mean(1)
    sds = [(values.deltas[row].mean(1) - base).std(ddof=1) for row in methods]
    return float(np.median(sds) * minimum_detectable(sets))


def ranks_of(values: Values) -> dict[str, float]:
    """Mean rank over sets of the mean Δm over seeds. Ties share a rank."""
    rows = ranked_rows(values)
    if not rows or not values.sets:
        return {}
    scores = np.stack([values.deltas[row].mean(1) for row in rows], 1)
    return dict(zip(rows, friedman(scores, maximise=False).ranks, strict=True))


def friedman_p(values: Values) -> float:
    """p of Friedman's test over all ranked rows."""
    rows = ranked_rows(values)
    if len(rows) < 2 or len(values.sets) < 2:
        return math.nan
    scores = np.stack([values.deltas[row].mean(1) for row in rows], 1)
    return friedman(scores, maximise=False).p


def entries(
    board: Board, values: Values, costs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The table: one entry per row, the best mean Δm first within a kind."""
    ranks = ranks_of(values)
    against = {"equal": compare(values, EQUAL), "static": compare(values, STATIC)}
    found = []
    for row, delta in values.deltas.items():
        cells = [board.cells[name][row] for name in values.sets]
        means = delta.mean(1)
        low, high = interval(delta)
        groups = {g: float(v.mean()) for g, v in group_values(values, row).items()}
        entry: dict[str, Any] = {
            "row": row,
            "label": label_of(row),
            "kind": kind_of(row),
            "family": mtljax.METHODS[row].family if row in mtljax.METHODS else None,
            "delta_m": float(means.mean()),
            "low": low,
            "high": high,
            "median": float(np.median(means)),
            "worst": values.sets[int(means.argmax())],
            "last_step": float(values.last[row].mean()),
            "groups": groups,
            "mean_of_groups": float(np.mean(list(groups.values()))),
            "by_set": dict(zip(values.sets, means.tolist(), strict=True)),
            "rank": ranks.get(row),
            "sets": len(values.sets),
            "tried": max(cell.tried for cell in cells),
            "edge_share": float(np.mean([cell.edge is not None for cell in cells])),
            "late_share": float(np.mean([cell.late > 0.5 for cell in cells])),
            "diverged": sum(cell.diverged for cell in cells),
            "runs": sum(cell.runs for cell in cells),
            "failed_sets": [
                name
                for name, cell in zip(values.sets, cells, strict=True)
                if cell.failed.all()
            ],
            **dict(costs.get(row, {})),
        }
        for name, comparison in against.items():
            if row in comparison:
                entry[name] = comparison[row]._asdict()
        found.append(entry)
    order = ("method", "external", "control", "auxiliary", "planted")
    kinds = {"external": "method"}
    key = lambda e: (order.index(kinds.get(e["kind"], e["kind"])), e["delta_m"])
    return sorted(found, key=key)


# --- text -----------------------------------------------------------------------------


def winners(table: Sequence[Mapping[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Methods that are significantly better than a reference."""
    return [
        dict(entry)
        for entry in table
        if entry["kind"] in ("method", "external")
        and reference in entry
        and entry[reference]["adjusted"] < LEVEL
        and entry[reference]["mean"] < 0
    ]


def conclusions(
    board: Board, values: Values, table: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Sentences that follow from the tests."""
    methods = [e for e in table if e["kind"] in ("method", "external")]
    if not values.sets:
        return ["No set is complete yet, so there is no comparison."]
    if not methods:
        return ["No method runs on all sets.", *_checks(board, values, table)]
    sets = f"On these {len(values.sets)} sets"
    beat = {name: winners(table, name) for name in ("equal", "static")}
    found = [
        f"{sets}, {len(beat['equal'])} of {len(methods)} methods beat equal weights "
        f"(Wilcoxon, Holm), and {len(beat['static'])} beat static weights with the "
        "same number of tries."
    ]
    x = detectable(values)
    if math.isfinite(x):
        found.append(
            f"Differences below {x:.1f} Δm points cannot be seen with "
            f"{len(values.sets)} sets."
        )
    p = friedman_p(values)
    if math.isfinite(p):
        found.append(f"Friedman's test over all ranked rows has p = {p:.2g}.")
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
    if beat["static"]:
        listed = ", ".join(
            e["label"]
            + (f" (step time x{e['step_ratio']:.2g})" if "step_ratio" in e else "")
            for e in beat["static"]
        )
        found.append(f"Advice: try the rows that beat static weights: {listed}.")
    else:
        found.append(
            "Advice: no method is shown to be better than static weights with the same "
            "number of tries. Tune the learning rate and one set of weights first."
        )
    return found + _checks(board, values, table)


def _checks(
    board: Board, values: Values, table: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Checks of the comparison itself."""
    found, by_row = [], {entry["row"]: entry for entry in table}
    x = detectable(values)
    if {NULL, EQUAL} <= set(values.deltas) and math.isfinite(x):
        d = float((values.deltas[NULL] - values.deltas[EQUAL]).mean())
        word = "less" if abs(d) < x else "MORE"
        found.append(
            "Check: equal weights with other initial weights and another order of data "
            f"differ by {d:+.2f} points, {word} than the detectable difference."
        )
    if {LINEAR, EQUAL} <= set(values.deltas):
        pairs = [(board.cells[s][LINEAR], board.cells[s][EQUAL]) for s in values.sets]
        same = all(np.array_equal(a.chosen, b.chosen, equal_nan=True) for a, b in pairs)
        word = "equal" if same else "NOT equal"
        found.append(f"Check: `linear` and equal weights are {word} bit by bit.")
    means = {row: by_row[row]["delta_m"] for row in PLANTED if row in by_row}
    others = [e["delta_m"] for e in table if e["kind"] in ("method", "external")]
    if len(means) == len(PLANTED) and others:
        at = [sum(o < means[row] for o in others) + 1 for row in (ORACLE, "useless")]
        found.append(
            f"Check: by mean Δm the planted row `oracle` is at place {at[0]} and the "
            f"planted row `useless` at place {at[1]} of {len(others) + 1}."
        )
    return found


def notes(board: Board, values: Values, config: Config) -> list[str]:
    """What limits the numbers: floors, ends of grids, rows that do not run."""
    found = []
    floors = [
        f"{name} {task}"
        for name in values.sets
        for task, error, counted in zip(
            board.about[name]["tasks"],
            _mean(board.cells[name][SINGLE].chosen, 0),
            board.about[name]["counted"],
            strict=True,
        )
        if counted and error < FLOOR
    ]
    if floors:
        found.append(
            f"The denominator is {FLOOR} where the single-task error is smaller: "
            f"{', '.join(floors)}."
        )
    excluded = [
        f"{name} {task}"
        for name in values.sets
        for task, counted in zip(
            board.about[name]["tasks"], board.about[name]["counted"], strict=True
        )
        if not counted
    ]
    if excluded:
        found.append(f"Trained but not averaged: {', '.join(excluded)}.")
    for row in values.deltas:
        names = [name for name in values.sets if board.cells[name][row].failed.all()]
        if names:
            found.append(
                f"{label_of(row)} diverged at all rates on {', '.join(names)}: "
                f"Δm is set to {FAILED:g}."
            )
    for row in values.missing:
        reasons = [f"{s} ({why})" for (s, r), why in board.errors.items() if r == row]
        found.append(f"{label_of(row)} does not run on {'; '.join(reasons)}.")
    found.append(
        "If equal weights selected an end of the grid, up to "
        f"{config.extensions} rates beyond it were offered to all rows of the set. "
        "Another row that selected an end was offered up to "
        f"{config.extensions} rates for itself. The column `tries` has the largest "
        "number over sets."
    )
    return found


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"


def _signed(value: float) -> str:
    return f"{round(value, 1) + 0.0:+.1f}"


def _cells_of(entry: Mapping[str, Any]) -> list[str]:
    against = []
    for name in ("static", "equal"):
        c = entry.get(name)
        against += (
            [f"{c['better']}/{c['worse']}", f"{c['mean']:+.1f}", _p(c["adjusted"])]
            if c
            else ["", "", ""]
        )
    ratio, gflop = entry.get("step_ratio"), entry.get("gflop")
    rank = entry["rank"]
    return [
        entry["label"],
        f"{_signed(entry['delta_m'])} [{_signed(entry['low'])}, "
        f"{_signed(entry['high'])}]",
        _signed(entry["median"]),
        "" if rank is None else f"{rank:.1f}",
        *against,
        entry["worst"],
        _signed(entry["last_step"]),
        "" if ratio is None else f"{ratio:.2g}",
        "" if gflop is None else f"{gflop:.2g}",
        str(entry["tried"]),
        f"{100 * entry['edge_share']:.0f} %",
        f"{entry['diverged']}/{entry['runs']}",
    ]


HEAD = (
    "row", "Δm % [95 %]", "median", "mean rank",
    "static-5: better/worse", "Δ", "p", "equal: better/worse", "Δ", "p",
    "worst set", "Δm, last step", "step time", "GFLOP", "tries", "edge", "diverged",
)  # fmt: skip
READING = """\
Δm is the mean relative change of the test error against single-task networks, over
tasks, seeds and sets. Lower is better. Δ is the mean difference of Δm to a reference,
with the p of Wilcoxon's signed-rank test over sets after Holm's correction.
"better/worse" counts the sets with a significant difference over seeds, after Holm's
correction within the set. "edge" is the share of sets on which validation selected an
end of the grid. Step times are relative to equal weights, for one run."""
TITLES = {
    "method": "Methods",
    "control": "Controls",
    "auxiliary": "Methods with a main task (the first one), not ranked with the rest",
    "planted": "Planted rows, which check the comparison",
}


def page(
    board: Board,
    values: Values,
    table: Sequence[Mapping[str, Any]],
    config: Config,
    done: tuple[int, int],
) -> str:
    """The text of ``LEADERBOARD.md``."""
    parts = ["# Leaderboard"]
    if done[0] < done[1]:
        parts.append(f"incomplete: {done[0]} of {done[1]} jobs.")
    small = config.steps < 500 or config.seeds < 5
    if small:
        parts.append("These runs are too short for any conclusion.")
    parts.append("\n".join(f"- {x}" for x in conclusions(board, values, table)))
    if values.sets:
        few = "Student's interval over sets" if len(values.sets) < FEW_SETS else ""
        how = few or "bootstrap over sets and seeds"
        parts += [f"Sets: {', '.join(values.sets)}. Intervals: {how}.", READING]
    for kind, title in TITLES.items():
        kinds = (kind, "external") if kind == "method" else (kind,)
        lines = [_cells_of(e) for e in table if e["kind"] in kinds]
        if lines:
            parts += [f"## {title}", common.markdown(HEAD, lines)]
    if values.sets:
        groups = list(dict.fromkeys(g for e in table for g in e["groups"]))
        lines = [
            [
                e["label"],
                *(_signed(e["groups"][g]) for g in groups),
                _signed(e["mean_of_groups"]),
            ]
            for e in table
        ]
        head = ("row", *groups, "mean of groups")
        parts += ["## Δm by group of related sets", common.markdown(head, lines)]
        found = notes(board, values, config)
        parts += ["## Notes", "\n".join(f"- {text}" for text in found)]
    parts += ["## Limits", LIMITS, common.versions()]
    return "\n\n".join(parts) + "\n"


# --- files ----------------------------------------------------------------------------


def pack(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Compresses lines. Equal lines are equal bytes: no time and no name is stored."""
    buffer = io.BytesIO()
    with gzip.GzipFile("", "wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        for line in lines:
            file.write((json.dumps(line) + "\n").encode())
    return buffer.getvalue()


def unpack(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the lines of a ``results.jsonl.gz``."""
    text = gzip.decompress(path.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


def costs_of(config: Config) -> dict[str, dict[str, float]]:
    """Median costs of each row over the sets on which they were measured."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for job, cost in queue.read_small(
        config.out, queue.jobs(config), "cost.json"
    ).items():
        found.setdefault(job.row, []).append(cost)
    path = config.out / "costs.json"
    if not found and path.is_file():  # a folder that has the results only
        return json.loads(path.read_text("utf-8"))
    return {
        row: {
            key: float(np.median([cost[key] for cost in costs]))
            for key in costs[0]
            if all(cost[key] is not None for cost in costs)
        }
        for row, costs in found.items()
    }


def write(config: Config, command: str) -> tuple[list[pathlib.Path], str]:
    """Writes all files of the report. Returns their paths and the conclusions."""
    from experiments.leaderboard import figures

    wanted, path = queue.jobs(config), config.out / "results.jsonl.gz"
    lines = queue.read_rows(config.out, wanted)
    if lines or not path.is_file():
        path.write_bytes(pack(lines))
    else:
        lines = unpack(path)
    board = make_board(lines)
    done = sum(line.get("kind") == "job" for line in lines)
    values, costs = values_of(board, config.rows), costs_of(config)
    table = entries(board, values, costs)
    for name, about in board.about.items():
        problems.LOADED[name] = {"digest": about["data"], "shared": {}}
    written = [path]

    def save(name: str, value: Any) -> None:
        text = json.dumps(mtljax.training.to_json(value), indent=1, ensure_ascii=False)
        queue.write(config.out / name, text + "\n")
        written.append(config.out / name)

    save("header.json", provenance.header(config, command=command))
    save("costs.json", costs)
    found = conclusions(board, values, table)
    save(
        "leaderboard.json",
        {
            "sets": values.sets,
            "jobs": {"done": done, "all": len(wanted)},
            "friedman_p": friedman_p(values),
            "nemenyi": (
                nemenyi_distance(len(ranked_rows(values)), len(values.sets))
                if len(ranked_rows(values)) > 1 and values.sets
                else None
            ),
            "detectable": detectable(values),
            "conclusions": found,
            "rows": table,
            "errors": {f"{s}: {r}": why for (s, r), why in board.errors.items()},
        },
    )
    text = page(board, values, table, config, (done, len(wanted)))
    queue.write(config.out / "LEADERBOARD.md", text)
    written.append(config.out / "LEADERBOARD.md")
    written += figures.write(config, board, values, table)
    return written, "\n".join(found)
