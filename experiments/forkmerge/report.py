"""Builds the tables and the figures from the rows. Does not train."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import report as common
from experiments.common import statistics
from experiments.common.report import Column, Report
from experiments.common.selection import Choice, edge_notes, select
from experiments.common.statistics import comparison_table
from experiments.forkmerge.config import CONTROLS, LABELS, Config
from experiments.forkmerge.train import MERGED
from mtljax import forkmerge, metrics

Rows = Sequence[Mapping[str, Any]]


def of(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """Selects the rows with the given values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


RUN = ("target", "aux", "seed")


def choose(rows: Rows) -> Choice:
    """Selects the steps of a method, and one learning rate for all its targets."""
    return select(rows, "val", run=RUN)


def chosen(rows: Rows) -> list[dict[str, Any]]:
    """Every run of one method: ``test_last``, and at the chosen step ``test``.

    Of a merge both are those of the last merge: it chooses no step. λ is chosen by
    validation in both.
    """
    choice = choose(rows)
    end = max(row["step"] for row in rows)
    last = [r for r in rows if r["lr"] == choice.lr and r["step"] == end]
    final = choose(last).rows
    merged = any(row["method"] in MERGED for row in rows)
    marks = {"edge": choice.edge, "late": 0.0 if merged else choice.late}
    return [
        {**row, "test_last": at["test"], "label": LABELS[row["method"]], **marks}
        for row, at in zip(final if merged else choice.rows, final, strict=True)
    ]


def reported(rows: Rows) -> list[dict[str, Any]]:
    """Returns the rows of the tables, with one learning rate, step and λ per run.

    The points of the analysis follow, with all λ.
    """
    kept: list[dict[str, Any]] = []
    for part in ("table", "pairs", "intervals"):
        for method in LABELS:
            mine = of(rows, part=part, method=method)
            for interval in sorted({row.get("interval", 0) for row in mine}):
                same = [r for r in mine if r.get("interval", 0) == interval]
                kept += chosen(same)
    return kept + transfer_points(rows)


def values_of(
    rows: Rows,
    config: Config,
    auxiliaries: Sequence[str] = (),
    column: str = "test_last",
) -> np.ndarray:
    """Returns test scores in percent, ``[seeds, targets]``.

    With ``auxiliaries`` it returns the scores of pairs, ``[seeds, auxiliaries,
    targets]``. The entries of a target with itself are NaN.
    """
    percent = lambda score: math.nan if score is None else 100 * score
    found = {(r["target"], r["aux"], r["seed"]): percent(r[column]) for r in rows}
    targets, seeds = config.domains, config.seed_range
    if not auxiliaries:
        return np.array([[found[t, "all", s] for t in targets] for s in seeds])
    return np.array(
        [
            [[found.get((t, a, s), math.nan) for t in targets] for a in auxiliaries]
            for s in seeds
        ]
    )


def by_method(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the rows of the table by method."""
    found = {method: of(rows, part="table", method=method) for method in LABELS}
    return {method: mine for method, mine in found.items() if mine}


def make_report(rows: Rows, config: Config) -> Report:
    """The table of all methods, from reported rows."""
    targets = config.domains
    found = by_method(rows)
    alone = values_of(found["stl"], config)
    table = {}
    for method, mine in found.items():
        scores = values_of(mine, config)
        row: dict[str, Any] = dict(zip(targets, scores.T, strict=True))
        row["average"] = scores.mean(1)
        row["at the chosen step"] = values_of(mine, config, column="test").mean(1)
        if method != "stl":
            if alone.mean(0).all():  # otherwise a relative gain is undefined
                # The paper prints gains, for which higher is better.
                row["gain % over STL"] = -metrics.delta_m(
                    scores, alone.mean(0), [True] * len(targets)
                )
            row["targets worse than STL"] = float(
                (scores.mean(0) < alone.mean(0)).sum()
            )
        row["learning rate"] = mine[0]["lr"]
        table[LABELS[method]] = row
    scores = (*targets, "average", "at the chosen step")
    columns: dict[str, Column] = dict.fromkeys(scores, ("max", 1))
    columns |= {"gain % over STL": ("max", 2), "targets worse than STL": ("min", 0)}
    columns["learning rate"] = ("", 2)
    return Report(columns, table)


def gains_text(rows: Rows, config: Config) -> str:
    """Paired differences of the mean over targets, at the last step."""
    values = {m: values_of(x, config).mean(1) for m, x in by_method(rows).items()}
    pairs = [("forkmerge", control) for control in CONTROLS]
    pairs += [("alone_x2", "stl"), ("ew", "stl"), ("forkmerge_each", "forkmerge")]
    return comparison_table(
        {
            f"{LABELS[a]} - {LABELS[b]}": (values[b], values[a])
            for a, b in pairs
            if a in values and b in values
        }
    )


class Pairs(NamedTuple):
    """Transfer gains of a method, in points of test accuracy."""

    gains: np.ndarray  # [auxiliaries, targets], mean over seeds; NaN on the diagonal
    p_values: np.ndarray  # of a paired t-test over seeds, two-sided
    sd: np.ndarray  # over seeds
    seeds: np.ndarray  # [seeds], mean over pairs

    @property
    def negative(self) -> int:
        return int((self.gains < 0).sum())

    def significant(self, sign: int) -> int:
        """Counts the pairs whose gain has this sign and p < 0.05."""
        return int(((sign * self.gains > 0) & (self.p_values < 0.05)).sum())

    @property
    def discoveries(self) -> int:
        """Number of significant pairs after the Benjamini-Hochberg correction, 5 %."""
        p = self.p_values[np.isfinite(self.p_values)]
        return int((statistics.benjamini_hochberg(p) < 0.05).sum())


def pair_gains(rows: Rows, config: Config) -> dict[str, Pairs]:
    """Returns the gains of all pairs over STL for each method, from reported rows."""
    stl = of(rows, part="table", method="stl")
    alone = values_of(stl, config)
    found = {}
    for method in ("ew", "forkmerge"):
        mine = of(rows, part="pairs", method=method)
        if mine:
            scores = values_of(mine, config, config.domains)
            gains = np.asarray(
                forkmerge.transfer_gain(scores, alone[:, None]), np.float64
            )
            p = sd = np.full(gains.shape[1:], math.nan)
            if len(gains) > 1:
                test = statistics.paired(np.zeros_like(gains), gains)
                p, sd = test.p, test.sd
            seeds = np.nanmean(gains, (1, 2))
            found[method] = Pairs(gains.mean(0), p, sd, seeds)
    return found


def pairs_text(pairs: Mapping[str, Pairs], seeds: int) -> str:
    """Formats the counts as a Markdown table."""
    lines = []
    for method, found in pairs.items():
        gains = found.gains[np.isfinite(found.gains)]
        counts = found.negative, found.significant(-1), found.significant(1)
        extremes = [f"{gains.mean():+.2f}", f"{gains.min():+.2f}"]
        if seeds > 1:
            least = statistics.minimum_detectable(seeds) * np.nanmean(found.sd)
            extremes.append(f"{least:.2f}")
        lines.append(
            [LABELS[method], gains.size, *counts, found.discoveries, *extremes]
        )
    head = ["method", "pairs", "worse than STL", "significantly worse"]
    head += ["significantly better", "after correction", "mean gain", "worst gain"]
    head += ["detectable in one pair"] if seeds > 1 else []
    return common.markdown(head, lines)


def intervals_text(rows: Rows, config: Config) -> str:
    """Formats the gain of ForkMerge over STL for each Δt as a Markdown table."""
    targets, table = config.domains, {}
    alone = values_of(of(rows, part="table", method="stl"), config)
    mine = of(rows, method="forkmerge")
    found = {r["interval"]: r["part"] for r in mine if r["part"] == "table"}
    found |= {r["interval"]: r["part"] for r in mine if r["part"] == "intervals"}
    for interval, part in sorted(found.items()):
        same = of(mine, part=part, interval=interval)
        gains = values_of(same, config) - alone
        table[f"{interval} ({-(-config.steps // interval)} merges)"] = {
            **dict(zip(targets, gains.T, strict=True)),
            "mean of targets": gains.mean(1),
        }
    columns: dict[str, Column] = dict.fromkeys(
        [*targets, "mean of targets"], ("max", 2)
    )
    return Report(columns, table).markdown(head="Δt")


def transfer_points(rows: Rows) -> list[dict[str, Any]]:
    """Returns gain, discrepancy and cosine of each pair, weight and seed, twice.

    The gain over STL at the same rate and the discrepancy are those of the column: at
    the last step, or at the step that validation selects. The cosine is the mean over
    the evaluations of the run.
    """
    mine = of(rows, part="analysis")
    rates = {row["lr"] for row in mine}
    stl = [r for r in of(rows, part="table", method="stl") if r["lr"] in rates]
    alone = select(stl, "val", run=RUN)
    found = select(mine, "val", run=(*RUN, "lambda"))
    cosines: dict[Any, list[float]] = {}
    for row in mine:
        cosines.setdefault(_place(row), []).append(row["cosine"])
    points = []
    for column in ("chosen", "last"):
        at, base = (
            getattr(choice, "rows" if column == "chosen" else "last")
            for choice in (found, alone)
        )
        scores = {(row["target"], row["seed"]): row["test"] for row in base}
        for row in at:
            gain = row["test"] - scores[row["target"], row["seed"]]
            points.append(
                {
                    "part": "points",
                    "row": f"λ = {row['lambda']:g}",
                    "column": column,
                    **{k: row[k] for k in (*RUN, "lr", "lambda")},
                    "gain": 100 * gain,
                    "discrepancy": row["csd"],
                    "cosine": float(np.mean(cosines[_place(row)])),
                }
            )
    return points


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in (*RUN, "lambda"))


MEASURES = {
    "cosine": "gradient cosine",
    "discrepancy": "confidence score discrepancy",
}
"""Fields of the points that may predict the gain."""


def correlations(points: Rows) -> list[dict[str, Any]]:
    """Returns Spearman's coefficients with the gain for each seed.

    They are over all points, and averaged over those at each weight λ. The second
    coefficient does not contain the common dependence on λ.
    """
    lines = []
    for column in ("chosen", "last"):
        for seed in sorted({point["seed"] for point in points}):
            mine = of(points, column=column, seed=seed)
            groups = [of(mine, row=row) for row in sorted({p["row"] for p in mine})]
            line = {
                "part": "analysis",
                "row": "pairs and weights",
                "column": column,
                "seed": seed,
            }
            for measure in MEASURES:
                line[f"spearman_{measure}_gain"] = _spearman(mine, measure)
                within = [_spearman(group, measure) for group in groups]
                mean = None if None in within else float(np.mean(np.array(within)))
                line[f"spearman_{measure}_gain_equal_weight"] = mean
            lines.append(line)
    return lines


def _spearman(points: Rows, measure: str) -> float | None:
    """Coefficient with the gain, or None for constants, for which it is undefined."""
    from scipy import stats

    values, gains = ([point[key] for point in points] for key in (measure, "gain"))
    if len(set(values)) == 1 or len(set(gains)) == 1:
        return None
    test: Any = stats.spearmanr(values, gains)
    return float(test.statistic)


def correlations_text(points: Rows) -> str:
    """Formats the coefficients as a Markdown table."""
    found = correlations(points)
    pairs = {}
    for column in ("last", "chosen"):
        lines = of(found, column=column)
        for suffix, over in (("", ""), ("_equal_weight", ", at equal λ")):
            for measure, text in MEASURES.items():
                values = [line[f"spearman_{measure}_gain{suffix}"] for line in lines]
                if None not in values:
                    row = f"{text}{over}, {column} step"
                    pairs[row] = np.zeros(len(values)), values
    return comparison_table(pairs, head="Spearman's coefficient with the gain")


def sections(kept: Rows, config: Config) -> list[str]:
    """Returns the sections of ``table.md``. ``kept`` are the reported rows."""
    size = config.train_size or "all"
    table = of(kept, part="table")
    marks = {r["label"]: Choice([], [], r["lr"], r["edge"], r["late"]) for r in table}
    parts = [
        f"## {len(config.domains)} domains, each in turn the target",
        make_report(kept, config).markdown(exclude=[LABELS["stl"]]),
        "Test accuracy in percent on the target of each run at the last step, mean ± "
        f"standard deviation over {config.seeds} seeds (training set, first weights, "
        f"batches); {size} training examples a domain, {config.steps} steps. The "
        f"target's validation examples ({config.val_size}) choose the learning rate "
        "and λ, in the second column also the step, and the merge weights.",
        gains_text(kept, config),
        "Differences of the mean over targets at the last step, in points.",
        " ".join(edge_notes(marks)),
    ]
    pairs = pair_gains(kept, config) if of(kept, part="pairs") else {}
    if pairs:
        mean = {LABELS[m]: (0 * p.seeds, p.seeds) for m, p in pairs.items()}
        parts += [
            "## One auxiliary at a time",
            pairs_text(pairs, config.seeds),
            "Transfer gain: test accuracy minus that of STL with the same seed, both "
            "at the last step, in points; significant: paired t-test over seeds, "
            "two-sided, p < 0.05, and in the next column after the correction of "
            "Benjamini and Hochberg for the number of pairs. All pairs: `pairs.png`.",
            comparison_table(mean, head="mean over pairs"),
        ]
    if of(kept, part="intervals") and of(kept, part="table", method="forkmerge"):
        parts += [
            "## Steps between merges, ForkMerge with two branches",
            intervals_text(kept, config),
            "Gain over STL with the same seed at the last step, in points.",
        ]
    points = of(kept, part="points")
    if points:
        runs = len(of(points, column="last", seed=points[0]["seed"]))
        parts += [
            "## Which measure predicts the gain?",
            correlations_text(points),
            f"Spearman's coefficient over {runs} runs with one auxiliary task (all "
            f"pairs, λ = {', '.join(f'{x:g}' for x in config.lambdas)}), computed for "
            "each seed. At equal λ: the mean of the coefficients over the pairs at "
            "each λ. The cosine is that of the gradients of target and auxiliary "
            "loss with respect to the trunk, averaged over batches and over the "
            "evaluations of a run. The discrepancy is measured on the target's test "
            "examples. All runs: `analysis.png`.",
        ]
    return parts


def result_lines(kept: Rows) -> Iterator[dict[str, Any]]:
    """A line for each reported run at the chosen and at the last step.

    Runs of the table's Δt are among those of the intervals too. The points of the
    analysis and their coefficients follow.
    """
    more = [
        {**row, "part": "intervals"}
        for row in of(kept, part="table", method="forkmerge")
        if of(kept, part="intervals")
    ]
    points = of(kept, part="points")
    for row in [*(row for row in kept if row["part"] != "points"), *more]:
        label = row["label"]
        if row["part"] == "intervals":
            label = f"Δt = {row['interval']}"
        for column, score in (("chosen", row["test"]), ("last", row["test_last"])):
            accuracy = None if score is None else 100 * score
            found = {"row": label, "column": column, "test_accuracy": accuracy}
            yield rounded(found | dict(row))
    for line in [*points, *correlations(points)]:
        yield rounded(line)


def write(kept: Rows, config: Config, command: str) -> list[pathlib.Path]:
    """Writes ``results.jsonl`` with the reported runs, and ``table.md``."""
    parts = ["# ForkMerge", f"`{command}`", *sections(kept, config)]
    return common.write(config.out, config, result_lines(kept), parts)


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds to seven digits, the precision of float32."""
    short = lambda x: float(f"{x:.7g}") if isinstance(x, float) else x
    return jax.tree.map(short, dict(row), is_leaf=lambda x: x is None)
