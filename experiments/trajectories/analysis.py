"""Computes numbers from the lines of the results. Does not train or draw."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.trajectories.config import SUM, Config
from experiments.trajectories.data import TARGET
from mtljax import trajectory

FACTORS = ("sharpness", "covariance", "fisher")
LEVELS = (0.3, 0.2, 0.1, 0.05)
"""Of the own-task training loss, where test scores are compared."""
FACTOR_NAMES = {
    "min_loss": "minimum loss",
    "sharpness": "sharpness",
    "covariance": "covariance trace",
    "fisher": "Fisher trace",
    "score": "score",
}
ARRAYS = (
    *("step", "train_loss", "train_score", "val_score", "test_score"),
    *("sharpness", "covariance", "fisher", "similarity", "null"),
)


class Group(NamedTuple):
    """All seeds of a row."""

    setting: str
    tasks: tuple[str, ...]
    method: str
    lr: float
    lr_at_edge: bool
    measured: Mapping[str, Any]
    nonfinite: int  # number of NaN or infinite measurements
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]  # [S, C, T]; step [S, C]

    def of(self, name: str, task: str) -> np.ndarray:
        """Returns a quantity of one task at C checkpoints, ``[S, C]``."""
        return self.values[name][:, :, self.tasks.index(task)]


Groups = dict[tuple[str, tuple[str, ...], str], Group]
Line = dict[str, Any]


def group(lines: Sequence[Mapping[str, Any]]) -> Groups:
    """Groups the seeds of each row. Missing measurements become NaN."""
    found: dict[tuple[str, tuple[str, ...], str], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = line["setting"], tuple(line["tasks"]), line["method"]
        found.setdefault(key, []).append(line)
    return {key: _group(key, mine) for key, mine in found.items()}


def _group(key, lines) -> Group:
    tasks = len(key[1])

    def array(line, name):
        if name == "step":
            return np.array(line[name], float)
        blank = [None] * tasks
        rows = [blank if row is None else row for row in line[name]]
        return np.array(rows, float)  # None becomes NaN

    setting, names, method = key
    first = lines[0]
    return Group(
        setting=setting,
        tasks=names,
        method=method,
        lr=first["lr"],
        lr_at_edge=first["lr_at_edge"],
        measured=first["measured"],
        nonfinite=sum(n or 0 for line in lines for n in line["nonfinite"]),
        seeds=tuple(line["seed"] for line in lines),
        values={name: np.stack([array(x, name) for x in lines]) for name in ARRAYS},
    )


def blocks(lines: Sequence[Mapping[str, Any]]) -> dict[float, Groups]:
    """Groups of every learning rate, in the order in which they were trained."""
    rates = dict.fromkeys(line["lr"] for line in lines)
    return {lr: group([x for x in lines if x["lr"] == lr]) for lr in rates}


def first_passage(found: Group, task: str, level: float) -> np.ndarray:
    """Test scores ``[S]`` where the task's training loss first falls below a level."""
    below = found.of("train_loss", task) < level
    scores = found.of("test_score", task)
    first = scores[np.arange(len(scores)), below.argmax(1)]
    return np.where(below.any(1), first, np.nan)


Pair = tuple[np.ndarray, np.ndarray]


def target_rows(groups: Groups) -> dict[str, Group]:
    """Returns the target of FashionMTL alone and in pairs, trained with the sum."""
    found = {}
    for (setting, tasks, method), mine in groups.items():
        if setting == "fashion_mtl" and method == SUM and len(tasks) <= 2:
            others = [task for task in tasks if task != TARGET]
            found[f"+ {others[0]}" if others else "alone"] = mine
    return found


def target_differences(config: Config, groups: Groups) -> dict[str, dict[str, Pair]]:
    """Quantity -> comparison -> the target alone and in another row, ``[S]`` each."""
    alone = baseline_of(groups, "fashion_mtl", TARGET)
    if alone is None:
        return {}
    base = aggregates(config, alone, TARGET)
    found: dict[str, dict[str, Pair]] = {}
    for mine in target_rows(groups).values():
        if mine is alone:
            continue
        values = aggregates(config, mine, TARGET)
        label = f"{' + '.join(mine.tasks)} - {TARGET}"
        points = {"test accuracy, points": (100 * base["score"], 100 * values["score"])}
        first, last = (100 * g.of("test_score", TARGET)[:, -1] for g in (alone, mine))
        points["test accuracy at the last step, points"] = first, last
        for level in LEVELS:
            a, b = (100 * first_passage(g, TARGET, level) for g in (alone, mine))
            points[f"test accuracy at first passage of {level:g}, points"] = a, b
        with np.errstate(divide="ignore", invalid="ignore"):
            for factor in FACTORS:
                points[f"log {FACTOR_NAMES[factor]}"] = (
                    np.log(base[factor]),
                    np.log(values[factor]),
                )
        for quantity, pair in points.items():
            fine = np.isfinite(pair[0]) & np.isfinite(pair[1])
            if fine.sum() > 1:
                kept = pair[0][fine], pair[1][fine]
                found.setdefault(quantity, {})[label] = kept
    return found


def claim_lines(config: Config, lines: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Lines that claims read, from the lines of all runs.

    The first rate of a setting is its primary one.
    """
    primary: dict[str, float] = {}
    for line in lines:
        primary.setdefault(line["setting"], line["lr"])
    found = []
    for lr, groups in blocks(lines).items():
        for setting in dict.fromkeys(key[0] for key in groups):
            mine = {key: g for key, g in groups.items() if key[0] == setting}
            edge = any(g.lr_at_edge for g in mine.values())
            about = {"setting": setting, "lr": lr, "primary": lr == primary[setting]}
            about |= {"column": "chosen", "edge": "end" if edge else None}
            made = [
                *_target_lines(config, mine),
                *_explained_lines(config, mine),
                *conflict_lines(config, mine),
            ]
            found += [{**about, **line} for line in made]
    return found


def _target_lines(config: Config, groups: Groups) -> list[Line]:
    """Numbers of the target of FashionMTL by row and seed.

    Where a training loss was never reached, those at the end of the run.
    """
    lines = []
    for row, mine in target_rows(groups).items():
        values = aggregates(config, mine, TARGET)
        metrics = {
            "test_accuracy": 100 * values["score"],
            "train_loss_last": mine.of("train_loss", TARGET)[:, -1],
            "sharpness": values["sharpness"],
            "sharpness_at_loss_0.1": passage(mine, TARGET, 0.1, "sharpness"),
            "fisher_peak": values["fisher"],
        }
        for level in LEVELS:
            at = passage(mine, TARGET, level, "test_score")
            metrics[f"test_at_loss_{level:g}"] = 100 * at
        for i, seed in enumerate(mine.seeds):
            numbers = {name: float(found[i]) for name, found in metrics.items()}
            lines.append({"row": row, "seed": seed, **numbers})
    return lines


def _explained_lines(config: Config, groups: Groups) -> list[Line]:
    """1 or 0 for every row and factor, and for every optimizer and factor.

    A factor explains a transfer if both change significantly, and less of the factor
    comes with a better score. It explains an optimizer if that holds for the signs of
    the changes of all tasks in all sets.
    """
    lines = []
    for row in transfer_rows(config, groups):
        about = {"row": "pairs and factors", "task": row.task}
        about["others"] = ", ".join(row.others)
        for factor, found in agreements([row]).items():
            lines.append({**about, "factor": factor, "explains": int(found.agree)})
    found = explained(optimiser_rows(config, groups))
    for (method, factor), explains in found.items():
        about = {"row": "optimizers and factors", "method": method}
        lines.append({**about, "factor": factor, "explains": int(explains)})
    return lines


def conflict_lines(config: Config, groups: Groups) -> list[Line]:
    """Spearman's coefficients with gradient similarity for each seed, T partialled out.

    A point is a task in a set. Sharpness and score are relative to those of the task
    alone, because tasks differ in both. The similarity to the sum depends on the norms
    of the task gradients as well as on their angles. The coefficients of its value for
    orthogonal gradients of the same norms (``null``) and of the rest (``excess``) tell
    which of the two a coefficient is due to.
    """
    sizes, changes = [], []
    measures: dict[str, list[np.ndarray]] = {"partial": [], "null": [], "excess": []}
    for multi, task, single in compared(groups):
        mine, alone = (aggregates(config, found, task) for found in (multi, single))
        sizes.append(len(multi.tasks))
        measures["partial"].append(mine["similarity"])
        measures["null"].append(mine["null"])
        measures["excess"].append(mine["similarity"] - mine["null"])
        ratio = np.log(mine["sharpness"]) - np.log(alone["sharpness"])
        changes.append({"sharpness": ratio, "score": mine["score"] - alone["score"]})
    if len(set(sizes)) < 2:
        return []
    lines = []
    for i, seed in enumerate(next(iter(groups.values())).seeds):
        line: Line = {"row": "task sets", "seed": seed}
        for measure, name in itertools.product(measures, ("sharpness", "score")):
            x = [values[i] for values in measures[measure]]
            y = [change[name][i] for change in changes]
            found = trajectory.rank_correlation(x, y, covariate=sizes)
            line[f"{measure}_spearman_{name}"] = float(found.partial)
        lines.append(line)
    return lines


def passage(found: Group, task: str, level: float, name: str) -> np.ndarray:
    """What was measured ``[S]`` from the first passage on; the last if none was."""
    values, rows = found.of(name, task), found.of("train_loss", task) < level
    result = []
    for value, below in zip(values, rows, strict=True):
        start = int(below.argmax()) if below.any() else len(value) - 1
        known = np.flatnonzero(np.isfinite(value))
        after = known[known >= start]
        at = after[0] if len(after) else known[-1] if len(known) else -1
        result.append(value[at])
    return np.array(result)


def aggregates(config: Config, found: Group, task: str) -> dict[str, np.ndarray]:
    """Returns one number per seed for each quantity of a task (footnote 5)."""
    mine = lambda name: found.of(name, task)
    sharp = max(1, math.ceil(config.last / config.sharpness_every))
    aggregate = trajectory.aggregate
    values = {
        "score": aggregate(
            mine("test_score"), "at_best", config.best, by=mine("val_score")
        ),
        "sharpness": aggregate(mine("sharpness"), "last", sharp),
        "covariance": aggregate(mine("covariance"), "last", config.last),
        "fisher": aggregate(mine("fisher"), "largest", config.largest),
        "min_loss": np.nanmin(mine("train_loss"), 1),
        # The initial point is excluded, because it is equal in all runs.
        "similarity": np.nanmean(mine("similarity")[:, 1:], 1),
        "null": np.nanmean(mine("null")[:, 1:], 1),
    }
    return {name: np.asarray(value) for name, value in values.items()}


def baseline_of(groups: Groups, setting: str, task: str) -> Group | None:
    """Returns the single-task row of a task."""
    return groups.get((setting, (task,), SUM))


def compared(groups: Groups) -> list[tuple[Group, str, Group]]:
    """Returns multi-task rows of the sum, with each task and its single-task row."""
    found = []
    for (setting, tasks, method), mine in groups.items():
        if len(tasks) < 2 or method != SUM:
            continue
        for task in tasks:
            single = baseline_of(groups, setting, task)
            if single is not None:
                trajectory.check_comparable(_protocol(mine), _protocol(single))
                found.append((mine, task, single))
    return found


def _protocol(found: Group) -> dict[str, Any]:
    """Returns the measurement protocol, including the tasks in the probe set."""
    return {k: v for k, v in found.measured.items() if k != "probe_set"}


class TransferRow(NamedTuple):
    """One line of Table 1."""

    setting: str
    task: str
    others: tuple[str, ...]
    single: np.ndarray  # scores over seeds
    deltas: dict[str, trajectory.Delta]
    gap: trajectory.GeneralizationGap


def transfer_rows(config: Config, groups: Groups) -> list[TransferRow]:
    """Returns Table 1: transfer and the changes of the factors."""
    rows = []
    for multi, task, single in compared(groups):
        a, b = (aggregates(config, g, task) for g in (multi, single))
        deltas = {
            name: trajectory.factor_delta(a[name], b[name])
            for name in ("score", *FACTORS)
        }
        gap = trajectory.generalization_gap(
            single.of("train_loss", task),
            single.of("test_score", task),
            multi.of("train_loss", task),
            multi.of("test_score", task),
        )
        others = tuple(t for t in multi.tasks if t != task)
        rows.append(TransferRow(multi.setting, task, others, b["score"], deltas, gap))
    return rows


def agreements(rows: Sequence[TransferRow]) -> dict[str, trajectory.SignAgreement]:
    """Counts how often the sign of each factor's change explains the transfer."""

    def stacked(name):
        deltas = [row.deltas[name] for row in rows]
        return trajectory.Delta(
            *(jnp.stack([d[i] for d in deltas], -1) for i in range(3))
        )

    if not rows:
        return {}
    return {
        name: trajectory.sign_agreement(stacked(name), stacked("score"), lower=True)
        for name in FACTORS
    }


class OptimiserRow(NamedTuple):
    """One point of Figure 4: a method on one task of a set, compared with the sum."""

    setting: str
    tasks: tuple[str, ...]
    task: str
    method: str
    change: dict[str, float]  # percent
    significant: bool  # of the change in score


def optimiser_rows(config: Config, groups: Groups) -> list[OptimiserRow]:
    """Returns the changes of the other optimizers relative to the plain sum."""
    rows = []
    for (setting, tasks, method), mine in groups.items():
        base = groups.get((setting, tasks, SUM))
        if method == SUM or base is None:
            continue
        for task in tasks:
            a, b = (aggregates(config, g, task) for g in (mine, base))
            change = {
                name: float(trajectory.percent_change(a[name].mean(), b[name].mean()))
                for name in FACTOR_NAMES
            }
            sure = trajectory.factor_delta(a["score"], b["score"]).significant
            rows.append(OptimiserRow(setting, tasks, task, method, change, bool(sure)))
    return rows


def explained(rows: Sequence[OptimiserRow]) -> dict[tuple[str, str], bool]:
    """Whether a factor has the opposite sign of the score in all rows of a method."""
    return {
        (method, factor): all(
            np.sign(row.change["score"]) * np.sign(row.change[factor]) < 0
            for row in rows
            if row.method == method
        )
        for method in dict.fromkeys(row.method for row in rows)
        for factor in ("min_loss", *FACTORS)
    }


class Scatter(NamedTuple):
    """Figures 5 and 6 of one target, with one point for each set that contains it."""

    setting: str
    target: str
    sizes: np.ndarray  # T of each point
    values: dict[str, np.ndarray]  # name -> [points, seeds]


def scatters(config: Config, groups: Groups) -> list[Scatter]:
    """Returns the sets of each target, trained with the sum."""
    found: dict[tuple[str, str], list[Group]] = {}
    for (setting, tasks, method), mine in groups.items():
        if method != SUM or len(tasks) < 2:
            continue
        for task in tasks:
            if setting != "fashion_mtl" or task == TARGET:
                found.setdefault((setting, task), []).append(mine)
    result = []
    for (setting, task), mine in found.items():
        if len(mine) < 2:
            continue
        each = [aggregates(config, g, task) for g in mine]
        values = {name: np.stack([e[name] for e in each]) for name in each[0]}
        sizes = np.array([len(g.tasks) for g in mine])
        result.append(Scatter(setting, task, sizes, values))
    return result


def correlations(found: Scatter) -> dict[str, trajectory.RankCorrelation]:
    """Returns rank correlations of similarity with each quantity, over set means."""
    x = found.values["similarity"].mean(1)
    return {
        name: trajectory.rank_correlation(
            x,
            found.values[name].mean(1),
            covariate=found.sizes,
            groups=found.sizes,
            key=jax.random.key(0),
        )
        for name in (*FACTORS, "score")
    }


def flattest(config: Config, groups: Groups) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Returns the FashionMTL target in the rows of Figure 1, worst score first."""
    found = target_rows(groups).items()
    rows = [(name, aggregates(config, mine, TARGET)) for name, mine in found]
    return sorted(rows, key=lambda row: float(row[1]["score"].mean()))
