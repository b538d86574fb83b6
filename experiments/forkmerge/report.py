"""From rows to the tables and the plots; no training code."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import report as common
from experiments.common.report import Report
from experiments.common.selection import Choice, edge_notes, select
from experiments.common.statistics import benjamini_hochberg, paired
from experiments.forkmerge import shared
from experiments.forkmerge.config import LABELS, Config
from mtljax import forkmerge, metrics

Rows = Sequence[Mapping[str, Any]]


def of(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


RUN = ("target", "aux", "seed")


def choose(rows: Rows, part: str, method: str) -> Choice:
    """The learning rate and the steps of a method, the rate for all its targets."""
    return select(of(rows, part=part, method=method), "val", run=RUN)


def tune(rows: Rows, part: str, method: str) -> float | None:
    """The learning rate of the best validation score, mean over targets and seeds."""
    return choose(rows, part, method).lr


def chosen(rows: Rows) -> list[dict[str, Any]]:
    """The reported row of every run of one method.

    Of a merge the last; of all others, the step (and λ) that validation chooses, which
    gives these an advantage that ForkMerge does not take.
    """
    choice = select(rows, "val", run=RUN)
    merged = any(row["method"].startswith("forkmerge") for row in rows)
    return choice.last if merged else choice.rows


def reported(rows: Rows) -> list[dict[str, Any]]:
    """The rows that tables are made of: a learning rate, a step, a λ a run."""
    kept: list[dict[str, Any]] = []
    for part in ("table", "pairs", "intervals", "shared"):
        for method in LABELS:
            mine = of(rows, part=part, method=method)
            for interval in sorted({row.get("interval", 0) for row in mine}):
                same = [r for r in mine if r.get("interval", 0) == interval]
                kept += chosen(same)
    return kept


def targets_of(config: Config, part: str) -> tuple[str, ...]:
    """Targets of a part."""
    return shared.TASKS if part == "shared" else config.domains


def values_of(
    rows: Rows, targets: Sequence[str], config: Config, auxiliaries: Sequence[str] = ()
) -> np.ndarray:
    """Test scores in percent, ``[seeds, targets]``.

    With auxiliaries those of pairs, ``[seeds, auxiliaries, targets]``; NaN where the
    target is its own.
    """
    percent = lambda score: math.nan if score is None else 100 * score
    found = {(r["target"], r["aux"], r["seed"]): percent(r["test"]) for r in rows}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    if not auxiliaries:
        return np.array([[found[t, "all", s] for t in targets] for s in seeds])
    return np.array(
        [
            [[found.get((t, a, s), math.nan) for t in targets] for a in auxiliaries]
            for s in seeds
        ]
    )


def make_report(rows: Rows, config: Config, part: str) -> Report:
    """The table of a part, from reported rows."""
    targets = targets_of(config, part)
    methods = [m for m in LABELS if of(rows, part=part, method=m)]
    found = {m: of(rows, part=part, method=m) for m in methods}
    values = {m: values_of(found[m], targets, config) for m in methods}
    alone = values["stl"]
    table = {}
    for method, scores in values.items():
        row: dict[str, Any] = dict(zip(targets, scores.T, strict=True))
        row["average"] = scores.mean(1)
        if method != "stl":
            if alone.mean(0).all():  # else there is nothing to be relative to
                # The paper prints gains: the larger the better.
                row["gain % over STL"] = -metrics.delta_m(
                    scores, alone.mean(0), [True] * len(targets)
                )
            row["targets worse than STL"] = float(
                (scores.mean(0) < alone.mean(0)).sum()
            )
        row["learning rate"] = found[method][0]["lr"]
        table[LABELS[method]] = row
    columns: dict[str, Any] = dict.fromkeys(
        [*targets, "average", "gain % over STL"], "max"
    )
    columns |= {"targets worse than STL": "min", "learning rate": ""}
    digits = dict.fromkeys([*targets, "average"], 1)
    digits |= {"gain % over STL": 2, "targets worse than STL": 0, "learning rate": 2}
    return Report(columns, table, digits)


class Pairs(NamedTuple):
    """Transfer gains of a method, in points of test accuracy."""

    gains: np.ndarray  # [auxiliaries, targets], mean over seeds; NaN on the diagonal
    p_values: np.ndarray  # of a paired t-test over seeds, two-sided

    @property
    def negative(self) -> int:
        return int((self.gains < 0).sum())

    def significant(self, sign: int) -> int:
        """Pairs whose gain of this sign has p < 0.05."""
        return int(((sign * self.gains > 0) & (self.p_values < 0.05)).sum())

    @property
    def discoveries(self) -> int:
        """Significant pairs after Benjamini and Hochberg, at 5 %."""
        p = self.p_values[np.isfinite(self.p_values)]
        return int((benjamini_hochberg(p) < 0.05).sum())


def pair_gains(rows: Rows, config: Config) -> dict[str, Pairs]:
    """Method -> gains of all pairs over STL, from reported rows."""
    stl = of(rows, part="table", method="stl")
    alone = values_of(stl, config.domains, config)
    found = {}
    for method in ("ew", "forkmerge"):
        mine = of(rows, part="pairs", method=method)
        if mine:
            scores = values_of(mine, config.domains, config, config.domains)
            gains = np.asarray(
                forkmerge.transfer_gain(scores, alone[:, None]), np.float64
            )
            p = np.full(gains.shape[1:], math.nan)
            if len(gains) > 1:
                p = paired(np.zeros_like(gains), gains).p
            found[method] = Pairs(gains.mean(0), p)
    return found


def pairs_text(pairs: Mapping[str, Pairs]) -> str:
    """Counts as a Markdown table."""
    lines = []
    for method, found in pairs.items():
        gains = found.gains[np.isfinite(found.gains)]
        counts = found.negative, found.significant(-1), found.significant(1)
        extremes = f"{gains.mean():+.2f}", f"{gains.min():+.2f}"
        lines.append(
            [LABELS[method], gains.size, *counts, found.discoveries, *extremes]
        )
    head = ["method", "pairs", "worse than STL", "significantly worse"]
    head += ["significantly better", "after correction", "mean gain", "worst gain"]
    return common.markdown(head, lines)


def interval_gains(rows: Rows, config: Config) -> dict[int, np.ndarray]:
    """Δt -> gain of ForkMerge over STL in points, ``[seeds, targets]``."""
    alone = values_of(of(rows, part="table", method="stl"), config.domains, config)
    found = {}
    for part in ("intervals", "table"):
        for row in of(rows, part=part, method="forkmerge"):
            interval = row["interval"]
            mine = of(rows, part=part, method="forkmerge", interval=interval)
            if interval not in found:
                found[interval] = values_of(mine, config.domains, config) - alone
    return dict(sorted(found.items()))


def intervals_text(found: Mapping[int, np.ndarray], config: Config) -> str:
    """Gains by Δt as a Markdown table."""
    targets = config.domains
    table = {
        f"{interval} ({-(-config.steps // interval)} merges)": {
            **dict(zip(targets, gains.T, strict=True)),
            "mean of targets": gains.mean(1),
        }
        for interval, gains in found.items()
    }
    columns: dict[str, Any] = dict.fromkeys([*targets, "mean of targets"], "max")
    digits = dict.fromkeys(columns, 2)
    return Report(columns, table, digits).markdown(head="Δt")


def sections(rows: Rows, kept: Rows, config: Config) -> list[str]:
    """The body of ``table.md``, a section a part; ``kept`` are the reported rows."""
    parts = []
    stl, size = [LABELS["stl"]], config.train_size or "all"
    if of(kept, part="table"):
        choices = {LABELS[m]: choose(rows, "table", m) for m in ("stl", "ew")}
        parts += [
            f"## {len(config.domains)} domains, each in turn the target",
            make_report(kept, config, "table").markdown(exclude=stl),
            "Test accuracy in percent on the target of each run, mean ± standard "
            f"deviation over {config.seeds} seeds (training set, first weights, "
            f"batches); {size} training examples a domain, {config.steps} steps. The "
            f"target's validation examples ({config.val_size}) choose the step (and λ, "
            "and the learning rates of STL and EW) for all rows but ForkMerge's, which "
            "are the last merge; it uses them for the merge weights.",
            " ".join(edge_notes(choices)),
        ]
    pairs = pair_gains(kept, config) if of(kept, part="pairs") else {}
    if pairs:
        parts += [
            "## One auxiliary at a time",
            pairs_text(pairs),
            "Transfer gain: test accuracy minus that of STL with the same seed, in "
            "points, mean over seeds; significant: paired t-test over seeds, "
            "two-sided, p < 0.05, and in the next column after the correction of "
            "Benjamini and Hochberg for the number of pairs. All pairs: `pairs.png`.",
        ]
    if of(kept, part="intervals"):
        parts += [
            "## Steps between merges, ForkMerge with two branches",
            intervals_text(interval_gains(kept, config), config),
            "Gain over STL with the same seed, in points of test accuracy.",
        ]
    if of(kept, part="shared"):
        parts += [
            "## One input, three tasks (multidigits), each in turn the target",
            make_report(kept, config, "shared").markdown(exclude=stl),
            "Test accuracy in percent on left and right, percent of the variance that "
            f"is explained on ink; {config.shared_train_size} training canvases.",
        ]
    return parts


def write_table(rows: Rows, kept: Rows, config: Config, command: str) -> pathlib.Path:
    """``table.md``: the command, the tables, the versions."""
    parts = ["# ForkMerge", f"`{command}`", *sections(rows, kept, config)]
    return common.write_table(config.out / "table.md", parts)


def write_rows(rows: Rows, config: Config) -> pathlib.Path:
    """``results.jsonl``: first what made them, then a line a reported run."""
    return common.write_rows(config.out / "results.jsonl", config, map(rounded, rows))


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Seven digits are all there is in a float32."""
    short = lambda x: float(f"{x:.7g}") if isinstance(x, float) else x
    return jax.tree.map(short, dict(row), is_leaf=lambda x: x is None)
