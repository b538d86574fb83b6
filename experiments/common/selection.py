"""Selects the step and the learning rate of each row by validation.

For each run at each rate, the step with the best validation score is selected. The
earliest step wins a tie. The value of a rate is the mean of these scores over the runs.
The rate with the best mean is selected, and the smaller rate wins a tie. A non-finite
score is worse than every finite score. All runs of a row have the same rate. Test
metrics are never read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]
Rows = Sequence[Row]


class Choice(NamedTuple):
    """The steps and the rate selected by validation for the runs of a row.

    Attributes:
      rows: Reported evaluation of each run.
      last: Last evaluation of the same runs, at the same rate.
      lr: Learning rate.
      edge: ``"low"`` or ``"high"`` if the rate is at the end of a grid of several
        rates.
      late: Share of the runs that report one of their last two evaluations.
    """

    rows: list[dict[str, Any]]
    last: list[dict[str, Any]]
    lr: float | None
    edge: str | None
    late: float


def select(
    rows: Rows,
    score: str = "val_score",
    *,
    maximise: bool = True,
    run: Sequence[str] = ("seed",),
    last_step: float = math.inf,
) -> Choice:
    """Selects one rate for all runs, and one step for each run.

    Args:
      rows: Rows of a training run. Rows of another ``kind`` than ``"eval"`` are
        ignored. A row has ``"step"``, and ``"lr"`` if there are several rates.
      score: Name of the validation score.
      maximise: Whether higher scores are better.
      run: Fields that identify a run among those of equal rate.
      last_step: Last step to consider.

    Returns:
      The choice. The runs are in the order of their labels.
    Examples:
      >>> rows = [{"seed": 0, "lr": lr, "step": step, "val_score": value}
      ...         for lr, step, value in [(.1, 1, .5), (.1, 2, .6), (.3, 1, .6)]]
      >>> choice = select(rows)
      >>> choice.lr, choice.rows[0]["step"], choice.edge
      (0.1, 2, 'low')
    """
    sign = 1.0 if maximise else -1.0
    found: dict[Any, dict[Any, list[Row]]] = {}
    for row in rows:
        if row.get("kind", "eval") == "eval" and row["step"] <= last_step:
            label = tuple(row.get(name) for name in run)
            found.setdefault(row.get("lr"), {}).setdefault(label, []).append(row)
    if not found:
        return Choice([], [], None, None, 0.0)

    def value(row: Row) -> float:
        plain = row.get(score)
        if plain is None or not math.isfinite(plain):
            return -math.inf
        return sign * float(plain)

    best = {
        lr: {label: max(mine, key=value) for label, mine in sorted(runs.items())}
        for lr, runs in found.items()
    }
    rates = sorted(best, key=lambda lr: -math.inf if lr is None else lr)
    means = [np.mean([value(row) for row in best[lr].values()]) for lr in rates]
    at = int(np.argmax(means))
    lr = rates[at]
    edge = {0: "low", len(rates) - 1: "high"}.get(at) if len(rates) > 1 else None
    late, last = 0, []
    for label, row in best[lr].items():
        steps = sorted(r["step"] for r in found[lr][label])
        late += len(steps) > 2 and row["step"] >= steps[-2]
        last.append(max(found[lr][label], key=lambda r: r["step"]))
    chosen = [dict(row) for row in best[lr].values()]
    return Choice(chosen, [dict(r) for r in last], lr, edge, late / len(chosen))


def select_each(
    rows: Rows, column: str = "rows", **options: Any
) -> list[dict[str, Any]]:
    """Returns the reported rows of each task, which has its own rate.

    With ``column="last"``, they are the last rows.
    """
    tasks = dict.fromkeys(r["task"] for r in rows if r.get("kind", "eval") == "eval")
    groups = [[row for row in rows if row.get("task") == task] for task in tasks]
    choices = [select(group, **options) for group in groups]
    return [row for choice in choices for row in getattr(choice, column)]


def search(
    train: Callable[[Sequence[float]], Mapping[str, Rows]],
    choose: Callable[[Rows], Choice],
    rates: Sequence[float],
    extensions: int = 2,
) -> tuple[dict[str, list[Row]], dict[str, Choice], list[float]]:
    """Trains all rows of a table at all rates, and beyond an end that a row chose.

    Args:
      train: The rows of every method at some rates.
      choose: The choice of a method, from its rows at all rates so far.
      rates: The grid.
      extensions: Times that the grid is extended by a factor of three, for all methods.

    Returns:
      All rows, the choices, and the rates that all methods were offered.

    Examples:
      >>> train = lambda rates: {"sum": [
      ...     {"seed": 0, "lr": lr, "step": 1, "val_score": -abs(lr - 0.9)}
      ...     for lr in rates]}
      >>> search(train, select, (0.1, 0.3))[2]
      [0.1, 0.3, 0.9, 2.7]
    """
    found: dict[str, list[Row]] = {}
    choices: dict[str, Choice] = {}
    grid, wanted = sorted(rates), sorted(rates)
    for left in range(extensions, -1, -1):
        for name, rows in train(wanted).items():
            found.setdefault(name, []).extend(rows)
        choices = {name: choose(rows) for name, rows in found.items()}
        ends = {choice.edge for choice in choices.values()}
        beyond = {"low": grid[0] / 3, "high": grid[-1] * 3}
        wanted = [float(f"{beyond[end]:.6g}") for end in beyond if end in ends]
        if not wanted or not left:
            break
        grid = sorted([*grid, *wanted])
    return found, choices, grid


def edge_notes(choices: Mapping[str, Choice]) -> list[str]:
    """Returns warnings on rates at the end of a grid and on unconverged runs.

    Examples:
      >>> edge_notes({"sum": Choice([], [], 0.1, "high", 0.8)})
      ['Chose the largest learning rate offered: sum.',
      'Most runs report one of their last two evaluations (still improving): sum.']
    """
    notes = []
    for edge, size in (("low", "smallest"), ("high", "largest")):
        names = [name for name, choice in choices.items() if choice.edge == edge]
        if names:
            notes.append(f"Chose the {size} learning rate offered: {', '.join(names)}.")
    late = [name for name, choice in choices.items() if choice.late > 0.5]
    if late:
        notes.append(
            "Most runs report one of their last two evaluations (still improving): "
            f"{', '.join(late)}."
        )
    return notes
