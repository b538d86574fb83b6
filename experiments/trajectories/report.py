"""Builds tables and files from the lines of the results. Does not train."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import report as common
from experiments.common.report import pm
from experiments.common.statistics import comparison_table
from experiments.trajectories import analysis
from experiments.trajectories.analysis import FACTOR_NAMES, FACTORS, Groups
from experiments.trajectories.config import Config


def write(
    config: Config, lines: Sequence[Mapping[str, Any]], command: str
) -> list[pathlib.Path]:
    """Writes ``results.jsonl``, ``table.md`` and the figures."""
    blocks = analysis.blocks(lines)
    parts = ["# Trajectories"]
    parts += [f"`{command}`, {config.seeds} seeds. Written by the command; not edited."]
    for lr, groups in blocks.items():
        parts += [f"# All rows at the learning rate {lr:g}"]
        parts += make_table(config, groups)
    rows = [*lines, *analysis.claim_lines(config, lines)]
    written = common.write(config.out, config, rows, parts, command=command)
    if config.plots:
        from experiments.trajectories import figures

        written += figures.write(config, next(iter(blocks.values())))
    return written


def number(value: float, digits: int = 3) -> str:
    """Formats a number, signed if the sign matters. Shows non-finite values."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}g}"


def marked(delta, *, lower: bool, factor: float = 1.0) -> str:
    """Formats a difference with the marks ✓ better, ✗ worse, · insignificant."""
    value = factor * float(delta.delta)
    mark = "·"
    if bool(delta.significant):
        mark = "✓" if (value < 0) == lower else "✗"
    return f"{value:+.3g} {mark}" if math.isfinite(value) else "not finite"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table of texts, all columns aligned to the left."""
    return common.markdown(head, rows, left=len(head))


def make_table(config: Config, groups: Groups) -> list[str]:
    """All tables of a learning rate for which there are rows, as markdown."""
    tables = (
        ("The target of FashionMTL", _flattest),
        ("What other tasks change for the target", _differences),
        ("Table 1: transfer, and what the factors did", _transfer),
        ("Figure 1 in words: the gap at equal own-task training loss", _gaps),
        ("Figure 4: other optimizers against the plain sum, % change", _optimisers),
        (
            "Figures 5 and 6: similarity to the sum, at fixed numbers of tasks",
            _correlations,
        ),
        ("Runs", _runs),
    )
    found = [(title, table(config, groups)) for title, table in tables]
    return [part for title, text in found if text for part in (f"## {title}", text)]


def _differences(config: Config, groups: Groups) -> str:
    if config.seeds < 2:
        return ""
    tables = [
        comparison_table(pairs, digits=3, head=quantity)
        for quantity, pairs in analysis.target_differences(config, groups).items()
    ]
    return "\n\n".join(tables)


def _flattest(config: Config, groups: Groups) -> str:
    rows = analysis.flattest(config, groups)
    if len(rows) < 2:
        return ""
    lines = [
        [
            name,
            pm(100 * v["score"], 1),
            *(f"{v[f].mean():.3g} ± {v[f].std(ddof=1):.2g}" for f in FACTORS),
            f"{v['min_loss'].mean():.2g}",
        ]
        for name, v in rows
    ]
    worst, flat = rows[0][0], min(rows, key=lambda r: r[1]["sharpness"].mean())[0]
    text = markdown(
        ["trained", "test accuracy %", *(FACTOR_NAMES[f] for f in FACTORS), "min loss"],
        lines,
    )
    return (
        f"{text}\n\nBy the means the worst generaliser is '{worst}', the flattest "
        f"'{flat}'; in the paper they are one."
    )


def _transfer(config: Config, groups: Groups) -> str:
    rows = analysis.transfer_rows(config, groups)
    if not rows:
        return ""
    lines = [
        [
            row.setting,
            row.task,
            ", ".join(row.others),
            pm(100 * row.single, 1),
            marked(row.deltas["score"], lower=False, factor=100),
            *(marked(row.deltas[f], lower=True) for f in FACTORS),
        ]
        for row in rows
    ]
    head = ["setting", "task", "with", "alone %", "Δ transfer, points"]
    text = markdown([*head, *(f"Δ {FACTOR_NAMES[f]}" for f in FACTORS)], lines)
    counts = analysis.agreements(rows)
    tally = markdown(
        ["factor", "explains the sign", "contradicts it", "one is insignificant"],
        [
            [FACTOR_NAMES[f], str(c.agree), str(c.disagree), str(c.insignificant)]
            for f, c in counts.items()
        ],
    )
    return (
        f"{text}\n\n✓ better, ✗ worse, · insignificant: the ± 2 sd intervals of seeds "
        f"overlap. Less of a factor counts as better.\n\n{tally}"
    )


def _gaps(config: Config, groups: Groups) -> str:
    lines = []
    for row in analysis.transfer_rows(config, groups):
        name = f"{row.setting}, {row.task} with {', '.join(row.others)}"
        lines.append(f"- {name}: {row.gap.describe()}")
    return "\n".join(lines)


def _optimisers(config: Config, groups: Groups) -> str:
    rows = analysis.optimiser_rows(config, groups)
    if not rows:
        return ""
    names = ("min_loss", *FACTORS)
    lines = [
        [
            f"{row.setting}: {' + '.join(row.tasks)}",
            row.task,
            row.method,
            f"{number(row.change['score'])}{'' if row.significant else ' ·'}",
            *(number(row.change[n]) for n in names),
        ]
        for row in rows
    ]
    head = ["set", "task", "method", "score", *(FACTOR_NAMES[n] for n in names)]
    verdicts = [
        f"{method} by {FACTOR_NAMES[factor]}"
        for (method, factor), explains in analysis.explained(rows).items()
        if explains
    ]
    text = (
        f"explained in all its points: {', '.join(verdicts)}"
        if verdicts
        else (
            "no method has all its points in the quadrants where a factor could "
            "explain it (a better score with less of it, or a worse one with more)"
        )
    )
    return f"{markdown(head, lines)}\n\n· insignificant. Of these, {text}."


def _correlations(config: Config, groups: Groups) -> str:
    lines = []
    for found in analysis.scatters(config, groups):
        for name, c in analysis.correlations(found).items():
            inside = ", ".join(
                f"T={k}: {v:+.2f} (n={int((found.sizes == k).sum())})"
                for k, v in c.within.items()
                if math.isfinite(v)
            )
            low, high = (float(v) for v in c.interval)
            lines.append(
                [
                    f"{found.setting}, {found.target}",
                    FACTOR_NAMES[name],
                    str(c.points),
                    _coefficient(c.spearman),
                    f"[{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else "-",
                    _coefficient(c.kendall),
                    _coefficient(c.partial),
                    inside or "too few",
                ]
            )
    if not lines:
        return ""
    head = ["target", "similarity with", "sets", "Spearman", "95 %", "Kendall"]
    text = markdown([*head, "partial on T", "within T"], lines)
    parts = [text, "- is not defined: fewer than three sets, or nothing left to vary."]
    return "\n\n".join([*parts, *_seeds(config, groups)])


def _seeds(config: Config, groups: Groups) -> list[str]:
    """The coefficients of each seed over all targets, and their controls."""
    found = analysis.conflict_lines(config, groups)
    if len(found) < 2:
        return []
    names = {
        "partial": "similarity",
        "null": "similarity of orthogonal gradients of the same norms",
        "excess": "difference of the two",
    }
    values = {
        f"{text}, {name}": np.array([x[f"{measure}_spearman_{name}"] for x in found])
        for measure, text in names.items()
        for name in ("sharpness", "score")
    }
    return [
        "A point is a task in a set. Sharpness and score are relative to the task "
        "alone.",
        comparison_table(
            {
                k: (np.zeros(len(x)), x)
                for k, x in values.items()
                if np.isfinite(x).all()
            },
            head="Spearman's coefficient, partial on T",
        ),
    ]


def _coefficient(value: Any) -> str:
    return f"{float(value):+.2f}" if math.isfinite(float(value)) else "-"


def _runs(_: Config, groups: Groups) -> str:
    lines = [
        [
            g.setting,
            " + ".join(g.tasks),
            g.method,
            f"{g.lr:g}{' (at the edge of those tried)' if g.lr_at_edge else ''}",
            str(g.nonfinite),
        ]
        for g in groups.values()
    ]
    head = ["setting", "tasks", "method", "learning rate", "non-finite measurements"]
    text = markdown(head, lines)
    return (
        f"{text}\n\nMeasurements that were not finite are left out of every mean and "
        "counted here: mostly the split similarity or its interval, where a squared "
        "length was estimated as negative."
    )
