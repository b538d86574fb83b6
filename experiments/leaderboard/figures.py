"""Figures: ranks, Δm with intervals, Δm by set, Δm over step time."""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import figures as common
from experiments.common.statistics import holm, nemenyi_distance, wilcoxon
from experiments.leaderboard.config import EQUAL, NULL, STATIC, WIDE, Config
from experiments.leaderboard.report import LEVEL, Board, Values, ranked_rows

Table = Sequence[Mapping[str, Any]]
COLORS = {
    "loss balancing": "#0072B2",
    "gradient balancing": "#D55E00",
    None: "#555555",
}
CLIP = 30.0


def _color(entry: Mapping[str, Any]) -> str:
    return "#009E73" if entry["row"] == NULL else COLORS[entry["family"]]


def cliques(values: Values, ranks: Mapping[str, float]) -> list[tuple[float, float]]:
    """Ranges of ranks without a significant difference (pairwise Wilcoxon, Holm)."""
    rows = sorted(ranks, key=lambda row: ranks[row])
    means = {row: values.deltas[row].mean(1) for row in rows}
    pairs = list(itertools.combinations(range(len(rows)), 2))
    p = holm([wilcoxon(means[rows[a]] - means[rows[b]]) for a, b in pairs])
    differ = {pair for pair, value in zip(pairs, p, strict=True) if value < LEVEL}
    found: list[tuple[int, int]] = []
    for first in range(len(rows)):
        last = first
        while last + 1 < len(rows) and not any(
            (a, last + 1) in differ for a in range(first, last + 1)
        ):
            last += 1
        if last > first and not any(last <= other for _, other in found):
            found.append((first, last))
    return [(ranks[rows[a]], ranks[rows[b]]) for a, b in found]


def ranks(values: Values, table: Table) -> Any:
    """Diagram of critical differences."""
    shown = sorted((e for e in table if e["rank"] is not None), key=lambda e: e["rank"])
    if len(shown) < 2 or len(values.sets) < 2:
        return None
    half = -(-len(shown) // 2)
    figure, axes = common.panels(1, 1, width=8.5, height=1.6 + 0.19 * half)
    axis = axes[0, 0]
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    low, high = 1, len(shown)
    axis.set_xlim(low - 0.45 * (high - low), high + 0.45 * (high - low))
    axis.set_ylim(half + 3.5, -2)
    axis.set_yticks([])
    axis.set_xticks([])
    axis.plot([low, high], [0, 0], color="black", lw=1)
    ticks = np.unique(np.linspace(low, high, min(len(shown), 9)).round())
    for tick in ticks:
        axis.plot([tick, tick], [0, -0.25], color="black", lw=1)
        axis.text(tick, -0.4, f"{tick:g}", ha="center", va="bottom", fontsize=7)
    groups = cliques(values, {e["row"]: e["rank"] for e in shown})
    for i, entry in enumerate(shown):
        left = i < half
        y = 2.2 + (i if left else len(shown) - 1 - i)
        x = low - 0.04 * (high - low) if left else high + 0.04 * (high - low)
        axis.plot([entry["rank"]] * 2 + [x], [0, y, y], color="#BBBBBB", lw=0.7)
        bold = entry["row"] in (NULL, EQUAL, STATIC, WIDE)
        axis.text(
            x,
            y,
            f" {entry['label']} ({entry['rank']:.1f}) ",
            ha="right" if left else "left",
            va="center",
            fontsize=7,
            color=_color(entry),
            fontweight="bold" if bold else "normal",
        )
    for i, (a, b) in enumerate(groups):
        y = 0.5 + 1.2 * (i + 1) / (len(groups) + 1)
        axis.plot([a - 0.05, b + 0.05], [y, y], color="black", lw=2.5)
    cd = nemenyi_distance(len(shown), len(values.sets))
    axis.plot([low, min(low + cd, high)], [-1.5, -1.5], color="#888888", lw=2)
    axis.text(low, -1.65, f"Nemenyi {cd:.1f}", fontsize=6, va="bottom", color="#666666")
    axis.set_title(
        f"Mean rank over {len(values.sets)} sets (1 is the best). Bars join rows "
        "without a significant difference",
        fontsize=8,
    )
    return figure


def delta(values: Values, table: Table) -> Any:
    """Forest plot of Δm."""
    shown = [e for e in table if e["rank"] is not None or e["kind"] == "auxiliary"]
    shown = sorted(shown, key=lambda e: -e["delta_m"])
    if not shown:
        return None
    figure, axes = common.panels(1, 1, width=6, height=0.8 + 0.19 * len(shown))
    axis = axes[0, 0]
    for i, e in enumerate(shown):
        axis.plot([e["low"], e["high"]], [i, i], color=_color(e), lw=1.2)
        marker = "D" if e["kind"] == "auxiliary" else "o"
        axis.plot(e["delta_m"], i, marker, color=_color(e), ms=4)
    for name, style in ((STATIC, "--"), (WIDE, ":")):
        for e in table:
            if e["row"] == name:
                axis.axvline(e["delta_m"], color="#555555", ls=style, lw=1, label=name)
    ends = [x for e in shown for x in (e["low"], e["high"]) if np.isfinite(x)]
    middle = [e["delta_m"] for e in shown]
    limits = np.percentile([*ends, *middle], [0, 90])
    axis.set_xlim(limits[0] - 1, limits[1] + 0.1 * (limits[1] - limits[0]) + 1)
    axis.set_yticks(range(len(shown)), [e["label"] for e in shown], fontsize=7)
    axis.set_xlabel(
        f"Δm in % against single-task networks, mean and 95 % interval, "
        f"{len(values.sets)} sets"
    )
    axis.legend(fontsize=7, frameon=False)
    return figure


def heat(board: Board, values: Values, table: Table) -> Any:
    """Δm by row and set. Cells at an end of the grid are hatched."""
    if not table:
        return None
    figure, axes = common.panels(
        1, 1, width=2.5 + 0.5 * len(values.sets), height=1.2 + 0.19 * len(table)
    )
    axis = axes[0, 0]
    axis.grid(visible=False)
    shown = np.array([[e["by_set"][s] for s in values.sets] for e in table])
    image = axis.imshow(
        shown.clip(-CLIP, CLIP), cmap="RdBu_r", vmin=-CLIP, vmax=CLIP, aspect="auto"
    )
    for (i, e), (j, name) in itertools.product(
        enumerate(table), enumerate(values.sets)
    ):
        at_edge = board.cells[name][e["row"]].edge is not None
        if at_edge:
            axis.fill_between(
                [j - 0.5, j + 0.5], i - 0.5, i + 0.5, fc="none", ec="#777777",
                hatch="////", lw=0,
            )  # fmt: skip
        axis.text(j, i, f"{shown[i, j]:.0f}", ha="center", va="center", fontsize=5)
    axis.set_yticks(range(len(table)), [e["label"] for e in table], fontsize=6)
    axis.set_xticks(range(len(values.sets)), values.sets, fontsize=6, rotation=60)
    figure.colorbar(image, ax=axis, label=f"Δm in %, clipped at ± {CLIP:g}")
    return figure


def cost(table: Table) -> Any:
    """Δm over the time of a step, with the Pareto front."""
    shown = [e for e in table if e.get("step_ratio") and e["kind"] != "planted"]
    if len(shown) < 2:
        return None
    figure, axes = common.panels(1, 1, width=6, height=4.2)
    axis = axes[0, 0]
    for e in shown:
        axis.plot(e["step_ratio"], e["delta_m"], "o", color=_color(e), ms=4)
        axis.annotate(
            e["label"],
            (e["step_ratio"], e["delta_m"]),
            fontsize=6,
            xytext=(3, 2),
            textcoords="offset points",
        )
    front, best = [], np.inf
    for e in sorted(shown, key=lambda e: (e["step_ratio"], e["delta_m"])):
        if e["delta_m"] < best:
            best = e["delta_m"]
            front.append((e["step_ratio"], best))
    axis.step(*zip(*front, strict=True), where="post", color="#888888", lw=1)
    axis.set_xscale("log")
    axis.set_xlabel("time of a step relative to equal weights (one run)")
    axis.set_ylabel("mean Δm in %")
    return figure


def write(
    config: Config, board: Board, values: Values, table: Table
) -> list[pathlib.Path]:
    """Saves the figures for which there are rows."""
    if not config.plots or not ranked_rows(values):
        return []
    figures = {
        "ranks": ranks(values, table),
        "delta": delta(values, table),
        "heat": heat(board, values, table),
        "cost": cost(table),
    }
    return common.save(figures, config.out, config)
