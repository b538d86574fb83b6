"""Builds the leaderboard from the rows. Does not train.

Δm is the mean over tasks of the relative change of the test error against single-task
networks, in percent. It is positive if a row is worse. Statistics use the sets on which
every row is finished.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import mtljax
from experiments.common import problem as problems
from experiments.common import provenance, statistics
from experiments.common.selection import select
from experiments.leaderboard import packed, queue
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
    scores: Mapping[float, float] | None = None  # validation score by rate, not static


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


def scores_of(rows: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Mean validation score of the selected steps by rate, infinite if a run has none.

    The score is the mean logarithm of the errors, so that a difference of two scores is
    the logarithm of a ratio of errors.
    """
    found: dict[float, list[float]] = {}
    for row in rows:
        if not row["last"]:
            score = row["val_score"]
            found.setdefault(row["lr"], []).append(math.inf if score is None else score)
    return {lr: float(np.mean(scores)) for lr, scores in sorted(found.items())}


def cell_of(rows: Sequence[Mapping[str, Any]]) -> Cell:
    """The cell of a row. Configurations of static weights have no end of a grid."""
    static = "config" in rows[0]
    if static:
        rows = [{**row, "lr": row["config"], "rate": row["lr"]} for row in rows]
    choice = select(rows, maximise=False)
    shown = [row for row in rows if row["last"]]
    return Cell(
        chosen=np.array([_numbers(row["test"]) for row in choice.rows]),
        last=np.array([_numbers(row["test"]) for row in choice.last]),
        failed=np.array([row["val_score"] is None for row in choice.rows]),
        lr=choice.lr,
        edge=None if static else choice.edge,
        late=float(np.mean([row["late"] for row in choice.rows])),
        tried=len({row["lr"] for row in rows}),
        runs=len(shown),
        diverged=sum(bool(row["diverged"]) for row in shown),
        scores=None if static else scores_of(rows),
    )


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
        scores=scores_of(rows),
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
        single = average(getattr(base, column)[:, counted], 0)
        change = (getattr(cell, column)[:, counted] - single) / np.maximum(
            single, FLOOR
        )
    found = 100 * average(change, 1)
    return np.where(cell.failed | ~np.isfinite(found), FAILED, found)


def average(values: np.ndarray, axis: int) -> np.ndarray:
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


def partial(board: Board, values: Values) -> list[dict[str, Any]]:
    """Entries of the rows that run on some of the complete sets.

    An entry also has the Δm of equal weights on the same sets. p is that of Wilcoxon's
    test of the difference, without a correction.
    """
    found = []
    for row in values.missing:
        sets = [name for name in values.sets if row in board.cells[name]]
        if not sets or EQUAL not in values.deltas:
            continue
        cells = {name: board.cells[name] for name in sets}
        delta = np.stack(
            [
                delta_m(each[row], each[SINGLE], board.about[name]["counted"])
                for name, each in cells.items()
            ]
        )
        equal = values.deltas[EQUAL][[values.sets.index(name) for name in sets]]
        found.append(
            {
                "row": row,
                "label": label_of(row),
                "sets": len(sets),
                "delta_m": float(delta.mean()),
                "equal": float(equal.mean()),
                "p": statistics.wilcoxon((delta - equal).mean(1)),
            }
        )
    return found


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


def counted(count: int, noun: str) -> str:
    """A number and its noun.

    Examples:
      >>> counted(1, "set"), counted(2, "set")
      ('1 set', '2 sets')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")


def of_kind(values: Values, *kinds: str) -> list[str]:
    """Rows of some kinds."""
    return [row for row in values.deltas if kind_of(row) in kinds]


def methods_of(values: Values) -> list[str]:
    """Rows that are compared: methods of the library, and external ones."""
    return of_kind(values, "method", "external")


def ranked_rows(values: Values) -> list[str]:
    """Rows with a rank: methods, external ones and the controls with weights."""
    ranked = (*methods_of(values), EQUAL, NULL, STATIC, WIDE)
    return [row for row in values.deltas if row in ranked]


def families(values: Values) -> list[list[str]]:
    """Rows whose tests are corrected together."""
    others = (of_kind(values, kind) for kind in ("auxiliary", "planted"))
    return [family for family in (methods_of(values), *others) if family]


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
        raw = [statistics.wilcoxon(d.mean(1)) for d in differences.values()]
        significant = _within_sets(list(differences.values()))
        for i, (row, adjusted) in enumerate(
            zip(rows, statistics.holm(raw), strict=True)
        ):
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
    p = statistics.paired(np.zeros_like(d.transpose(2, 0, 1)), d.transpose(2, 0, 1)).p
    # Equal differences of all seeds have no variance: no effect, or a certain one.
    p = np.where(np.isnan(p), np.where(d.mean(2) == 0, 1.0, 0.0), p)
    return np.stack([statistics.holm(p[:, s]) for s in range(d.shape[1])], 1) < LEVEL


def interval(delta: np.ndarray) -> tuple[float, float]:
    """Interval of the mean Δm over sets and seeds at 95 %.

    The bootstrap over sets and seeds; with few sets, Student's interval over the means
    of the sets.
    """
    if len(delta) >= FEW_SETS:
        return statistics.bootstrap_sets(delta)[1:]
    if len(delta) < 2:
        return (math.nan, math.nan)
    means = delta.mean(1)
    found = statistics.paired(np.zeros_like(means), means)
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
    methods, sets = methods_of(values), len(values.sets)
    if EQUAL not in values.deltas or sets < 2 or not methods:
        return math.nan
    base = values.deltas[EQUAL].mean(1)
    sds = [(values.deltas[row].mean(1) - base).std(ddof=1) for row in methods]
    return float(np.median(sds) * statistics.minimum_detectable(sets))


def smallest_p(sets: int, methods: int) -> float:
    """Smallest p that Wilcoxon's test over sets can have after Holm's correction.

    A method that is better on all of n sets has p = 2^(1 - n).

    Examples:
      >>> smallest_p(6, 2), smallest_p(2, 11)
      (0.0625, 1.0)
    """
    return min(1.0, methods * 2.0 ** (1 - sets))


class Spread(NamedTuple):
    """Differences between methods and between seeds on a set, in Δm points.

    Attributes:
      within: Standard deviation over seeds, root mean square over the methods.
      between: Standard deviation over methods of their means over seeds.
      noise: The same as seeds alone would cause: the residual standard deviation of
        methods and seeds, divided by the root of the number of seeds. The part that all
        methods of a seed share, for example its split, is not in it.
      p: Friedman's test of the methods with seeds as blocks, by Holm over the sets.
    """

    within: float
    between: float
    noise: float
    p: float


def seed_spread(values: Values) -> dict[str, Spread]:
    """Compares the differences between methods with those between seeds, by set."""
    methods = methods_of(values)
    if len(methods) < 2 or values.deltas[methods[0]].shape[1] < 2:
        return {}
    deltas = np.stack([values.deltas[row] for row in methods], 2)  # sets, seeds, rows
    _, seeds, rows = deltas.shape
    rest = deltas - deltas.mean(1, keepdims=True) - deltas.mean(2, keepdims=True)
    rest = rest + deltas.mean((1, 2), keepdims=True)
    residual = np.square(rest).sum((1, 2)) / ((seeds - 1) * (rows - 1))
    p = statistics.holm([_blocks_p(one) for one in deltas])
    return {
        name: Spread(
            within=float(np.sqrt(deltas[i].var(0, ddof=1).mean())),
            between=float(deltas[i].mean(0).std(ddof=1)),
            noise=float(np.sqrt(residual[i] / seeds)),
            p=float(p[i]),
        )
        for i, name in enumerate(values.sets)
    }


def _blocks_p(scores: np.ndarray) -> float:
    """p of Friedman's test of ``[blocks, rows]``, 1 if all rows are equal."""
    equal = (scores == scores[:, :1]).all()
    return 1.0 if equal else statistics.friedman(scores, maximise=False).p


def _friedman(values: Values) -> statistics.Friedman:
    """Friedman's test of the mean Δm over seeds of all ranked rows."""
    scores = [values.deltas[row].mean(1) for row in ranked_rows(values)]
    return statistics.friedman(np.stack(scores, 1), maximise=False)


def ranks_of(values: Values) -> dict[str, float]:
    """Mean rank over sets of the mean Δm over seeds. Ties share a rank."""
    rows = ranked_rows(values)
    if not rows or not values.sets:
        return {}
    return dict(zip(rows, _friedman(values).ranks, strict=True))


def friedman_p(values: Values) -> float:
    """p of Friedman's test over all ranked rows."""
    enough = len(ranked_rows(values)) > 1 and len(values.sets) > 1
    return _friedman(values).p if enough else math.nan


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


class Result(NamedTuple):
    """All that the report says.

    Attributes:
      board: Cells of all sets.
      values: Δm on the complete sets.
      table: Entries of the rows.
      done: Numbers of finished and of all jobs.
      costs: Costs by row.
      references: References by set, or the reason why there is none.
    """

    board: Board
    values: Values
    table: list[dict[str, Any]]
    done: tuple[int, int]
    costs: Mapping[str, Mapping[str, Any]]
    references: Mapping[str, Mapping[str, Any] | str]


# --- files ----------------------------------------------------------------------------


def costs_of(config: Config, old: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Costs of each row: medians over the measured sets, and seconds over all sets.

    Args:
      config: Configuration with the folder of the jobs.
      old: Content of ``leaderboard.json``, which has the costs if there are no jobs.
    """
    wanted = queue.jobs(config)
    found: dict[str, list[Mapping[str, Any]]] = {}
    for job, cost in queue.read_small(config.out, wanted, "cost.json").items():
        found.setdefault(job.row, []).append(cost)
    costs = {
        row: {
            key: float(np.median([cost[key] for cost in costs]))
            for key in costs[0]
            if all(cost[key] is not None for cost in costs)
        }
        for row, costs in found.items()
    }
    times = queue.read_small(config.out, wanted, "time.json")
    for job, seconds in times.items():
        mine = costs.setdefault(job.row, {})
        mine["cpu_s"] = mine.get("cpu_s", 0.0) + seconds["cpu"]
    return costs or dict(old.get("costs", {}))


def result_of(
    config: Config,
    lines: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any] | str],
) -> Result:
    """Computes all numbers of the report from the lines of the finished jobs."""
    board = make_board(lines)
    values = values_of(board, config.rows)
    done = sum(line.get("kind") == "job" for line in lines)
    table, jobs = entries(board, values, costs), len(queue.jobs(config))
    return Result(board, values, table, (done, jobs), costs, references)


def write(config: Config, command: str) -> tuple[list[pathlib.Path], str]:
    """Writes all files of the report. Returns their paths and the conclusions.

    The files are ``results.jsonl.gz``, ``header.json``, ``leaderboard.json``,
    ``LEADERBOARD.md`` and the figures. If the folder has no jobs, its packed rows are
    read, and their header remains.
    """
    from experiments.leaderboard import figures, page, reference

    source = config.out / packed.ROWS
    lines = queue.read_rows(config.out, queue.jobs(config))
    fresh = bool(lines) or not source.is_file()
    lines = lines if fresh else packed.unpack(source)
    old = read_json(config.out / "leaderboard.json")
    references = old.get("references", {})
    if fresh:
        board = make_board(lines)
        references = {
            name: reference.cached(config, board.about[name])
            for name in complete_sets(board, config.rows)
        }
    result = result_of(config, lines, costs_of(config, old), references)
    for name, about in result.board.about.items():
        problems.LOADED[name] = {"digest": about["data"], "shared": {}}
    head = {} if fresh else read_json(config.out / "header.json")
    earlier = packed.earlier(config.out)
    head = head or provenance.header(
        config, command=command, **({"earlier": earlier} if earlier else {})
    )
    folder = config.report_to or config.out
    drawn = figures.write(config, result)
    queue.write(folder / "header.json", to_text(head))
    said = as_json(result)
    queue.write(folder / "leaderboard.json", to_text(said))
    text = page.text(result, config, head, [path.stem for path in drawn])
    queue.write(folder / "LEADERBOARD.md", text)
    (folder / packed.ROWS).write_bytes(packed.pack(lines))
    names = (packed.ROWS, "header.json", "leaderboard.json", "LEADERBOARD.md")
    found = [said["answer"], *page.conclusions(result.values, result.table)]
    found += said["checks"]
    return [*(folder / name for name in names), *drawn], "\n".join(found)


def as_json(result: Result) -> dict[str, Any]:
    """The content of ``leaderboard.json``."""
    from experiments.leaderboard import page

    board, values, table, (done, count), costs, references = result
    ranked = ranked_rows(values)
    return {
        "answer": page.answer(values, table),
        "conclusions": page.conclusions(values, table) + page.cost_of(result),
        "checks": page.checks(board, values, table) + page.reference_check(result),
        "sets": values.sets,
        "jobs": {"done": done, "all": count},
        "friedman_p": friedman_p(values),
        "nemenyi": (
            statistics.nemenyi_distance(len(ranked), len(values.sets))
            if len(ranked) > 1 and values.sets
            else None
        ),
        "detectable": detectable(values),
        "seeds": {name: one._asdict() for name, one in seed_spread(values).items()},
        "rows": table,
        "partial": partial(board, values),
        "costs": dict(costs),
        "references": dict(references),
        "errors": {f"{s}: {r}": why for (s, r), why in board.errors.items()},
    }


def to_text(value: Any) -> str:
    """Formats a JSON file."""
    plain = mtljax.training.to_json(value)
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file, empty if it does not exist."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
