"""Draws ranks, Δm with intervals and by set, cost, rates and seeds.

Families and kinds of rows differ by colour and by marker, so that the figures can be
read in grey. Legends are outside of the axes.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import figures as common
from experiments.common.report import chance
from experiments.common.statistics import holm, nemenyi_distance, wilcoxon
from experiments.leaderboard import report
from experiments.leaderboard.config import NULL, SINGLE, STATIC, WIDE, Config
from experiments.leaderboard.report import LEVEL, Board, Result, Values, counted

Table = Sequence[Mapping[str, Any]]
LOOKS = {
    "loss balancing": {"color": "#0072B2", "marker": "o"},
    "gradient balancing": {"color": "#D55E00", "marker": "s"},
    "external": {"color": "#CC79A7", "marker": "P"},
    "control": {"color": "#333333", "marker": "D"},
    "noise only": {"color": "#009E73", "marker": "^"},
}
"""Colours and markers of the rows; "noise only" is equal weights with other seeds."""
CLIP = 30.0
SMALL = 8  # points
FEW = 8  # sets whose values are drawn one by one


def family_of(entry: Mapping[str, Any]) -> str:
    """The key of a row in :data:`LOOKS`."""
    if entry["row"] == NULL:
        return "noise only"
    if entry["kind"] == "external":
        return "external"
    if entry["kind"] in ("control", "planted"):
        return "control"
    return entry["family"]


def _look(entry: Mapping[str, Any]) -> dict[str, str]:
    return LOOKS[family_of(entry)]


def _families(axis: Any, shown: Table) -> None:
    """Adds a handle of each family for the legend."""
    used = {family_of(entry) for entry in shown}
    for name, look in LOOKS.items():
        if name in used:
            axis.plot([], [], ls="", ms=4, label=name, **look)


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
    figure, axes = common.panels(1, 1, width=8.5, height=2.1 + 0.19 * half)
    axis = axes[0, 0]
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    low, high = 1, len(shown)
    axis.set_xlim(low - 0.5 * (high - low), high + 0.5 * (high - low))
    axis.set_ylim(half + 2.5, -2.6)
    axis.set_yticks([])
    axis.set_xticks([])
    axis.plot([low, high], [0, 0], color="black", lw=1)
    every = next(step for step in (1, 2, 5, 10, 20) if (high - low) / step <= 12)
    for tick in sorted({low, *range(every, high + 1, every)}):
        axis.plot([tick, tick], [0, -0.25], color="black", lw=1)
        axis.text(tick, -0.4, f"{tick:g}", ha="center", va="bottom", fontsize=SMALL)
    groups = cliques(values, {e["row"]: e["rank"] for e in shown})
    for i, entry in enumerate(shown):
        left = i < half
        y = 2.2 + (i if left else len(shown) - 1 - i)
        x = low - 0.04 * (high - low) if left else high + 0.04 * (high - low)
        axis.plot([entry["rank"]] * 2 + [x], [0, y, y], color="#BBBBBB", lw=0.7)
        axis.plot([x], [y], ls="", ms=4, **_look(entry))
        bold = entry["kind"] == "control"
        axis.text(
            x,
            y,
            f"  {entry['label']} ({entry['rank']:.1f})  ",
            ha="right" if left else "left",
            va="center",
            fontsize=SMALL,
            fontweight="bold" if bold else "normal",
        )
    for i, (a, b) in enumerate(groups):
        y = 0.5 + 1.2 * (i + 1) / (len(groups) + 1)
        axis.plot([a - 0.05, b + 0.05], [y, y], color="black", lw=2.5)
    cd = nemenyi_distance(len(shown), len(values.sets))
    axis.plot([low, min(low + cd, high)], [-1.6, -1.6], color="#888888", lw=2)
    more = ", wider than the axis" if cd > high - low else ""
    axis.text(
        low,
        -1.8,
        f"Nemenyi distance {cd:.1f} ranks{more}",
        fontsize=SMALL,
        va="bottom",
    )
    pairs = len(shown) * (len(shown) - 1) // 2
    none = report.smallest_p(len(values.sets), pairs) >= LEVEL
    axis.set_title(
        f"Mean rank over {len(values.sets)} sets (1 is the best). Black bars join rows "
        "without\na significant difference (pairwise Wilcoxon tests over sets, Holm)"
        + (f"\nWith {pairs} pairs, these sets cannot show any difference" * none),
        fontsize=9,
    )
    _families(axis, shown)
    common.legend(figure, axes)
    return figure


def delta(values: Values, table: Table) -> Any:
    """Forest plot of Δm. With few sets, their values are drawn as well."""
    shown = [e for e in table if e["rank"] is not None or e["kind"] == "auxiliary"]
    shown = sorted(shown, key=lambda e: -e["delta_m"])
    if not shown:
        return None
    figure, axes = common.panels(1, 1, width=6.4, height=1.1 + 0.19 * len(shown))
    axis = axes[0, 0]
    few = len(values.sets) < FEW
    points = [x for e in shown for x in e["by_set"].values()]
    ends = [x for e in shown for x in (e["low"], e["high"]) if np.isfinite(x)]
    middle = [e["delta_m"] for e in shown]
    inner = [*middle, *points] if few else [*middle, *np.percentile(ends, [5, 90])]
    low, high = min(inner), max(inner)
    pad = 0.08 * (high - low) + 0.5
    low, high = low - pad, high + pad
    for i, e in enumerate(shown):
        color = _look(e)["color"]
        a, b = max(e["low"], low), min(e["high"], high)
        axis.plot([a, b], [i, i], color=color, lw=1.2)
        for end, limit, mark in ((e["low"], low, "<"), (e["high"], high, ">")):
            if end < limit if mark == "<" else end > limit:
                axis.plot(limit, i, mark, color=color, ms=5, clip_on=False)
        if few:
            each = list(e["by_set"].values())
            axis.plot(each, [i] * len(each), "|", color="#777777", ms=7)
        axis.plot(e["delta_m"], i, ls="", ms=5, **_look(e))
    _families(axis, shown)
    if few:
        axis.plot([], [], "|", color="#777777", ms=7, label="one set")
    for name, style in ((STATIC, "--"), (WIDE, ":")):
        for e in table:
            if e["row"] == name:
                axis.axvline(e["delta_m"], color="#555555", ls=style, lw=1, label=name)
    axis.axvline(0, color="#AAAAAA", lw=1, zorder=0)
    axis.set_xlim(low, high)
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_yticks(range(len(shown)), [e["label"] for e in shown], fontsize=SMALL)
    axis.set_xlabel(
        "Δm in % against single-task networks; left is better\n"
        f"mean and 95 % interval over {len(values.sets)} sets; arrows: the interval "
        "goes beyond the axis",
        fontsize=SMALL,
    )
    common.legend(figure, axes, columns=4)
    return figure


def heat(board: Board, values: Values, table: Table) -> Any:
    """Δm by row and set. Cells at an end of the grid are hatched."""
    table = [e for e in table if e["row"] != SINGLE]  # the reference, always zero
    if not table:
        return None
    figure, axes = common.panels(
        1, 1, width=3.4 + 0.55 * len(values.sets), height=1.5 + 0.19 * len(table)
    )
    axis = axes[0, 0]
    axis.grid(visible=False)
    shown = np.array([[e["by_set"][s] for s in values.sets] for e in table])
    image = axis.imshow(
        shown.clip(-CLIP, CLIP), cmap="RdBu_r", vmin=-CLIP, vmax=CLIP, aspect="auto"
    )
    hatched = False
    for (i, e), (j, name) in itertools.product(
        enumerate(table), enumerate(values.sets)
    ):
        if board.cells[name][e["row"]].edge is not None:
            hatched = True
            axis.fill_between(
                [j - 0.5, j + 0.5], i - 0.5, i + 0.5, fc="none", ec="#777777",
                hatch="////", lw=0,
            )  # fmt: skip
        value = shown[i, j]
        axis.text(
            j, i, f"{value:+.0f}" if round(value) else "0",
            ha="center", va="center", fontsize=7,
            color="white" if abs(value) > 0.75 * CLIP else "black",
        )  # fmt: skip
    for i, (one, other) in enumerate(itertools.pairwise(table)):
        if one["kind"] != other["kind"]:
            axis.axhline(i + 0.5, color="white", lw=3)
    axis.set_yticks(range(len(table)), [e["label"] for e in table], fontsize=SMALL)
    axis.set_xticks(range(len(values.sets)), values.sets, fontsize=SMALL, rotation=60)
    axis.set_title(
        "Δm in % by set, mean over seeds; negative is better"
        + ("\nhatched: rate at an end of the grid" if hatched else ""),
        fontsize=SMALL,
        loc="right",
    )
    bar = figure.colorbar(image, ax=axis, aspect=30, pad=0.03)
    bar.set_label(f"Δm in %, clipped at ± {CLIP:g}", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def spread_out(values: Sequence[float], distance: float) -> np.ndarray:
    """Moves positions apart to a smallest distance, close to the given ones.

    Examples:
      >>> spread_out([0.0, 0.0, 5.0], 1.0).tolist()
      [-0.5, 0.5, 5.0]
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(values, kind="stable")
    steps = distance * np.arange(len(values))
    found = np.empty(len(values))
    found[order] = isotonic_regression(np.asarray(values)[order] - steps).x + steps
    return found


def cost(table: Table) -> Any:
    """Δm over the time of a step, with the Pareto front."""
    shown = [e for e in table if e.get("step_ratio") and e["kind"] != "planted"]
    shown = [e for e in shown if e["row"] != SINGLE]
    if len(shown) < 2:
        return None
    height = max(4.2, 0.17 * len(shown) + 0.8)
    figure, axes = common.panels(1, 1, width=6.4, height=height)
    axis = axes[0, 0]
    x = np.array([e["step_ratio"] for e in shown])
    y = np.array([min(e["delta_m"], CLIP) for e in shown])
    label_space = 1.25 * (y.max() - y.min() or 1.0) / (6.0 * height)
    at = spread_out(y.tolist(), max(label_space, 1e-9))
    right = x.max() * 1.18
    for e, own, place in zip(shown, y, at, strict=True):
        axis.plot(
            [e["step_ratio"], right], [own, place], color="#CCCCCC", lw=0.6, zorder=1
        )
        axis.plot(e["step_ratio"], own, ls="", ms=5, zorder=3, **_look(e))
        more = f" ({e['delta_m']:+.0f})" if e["delta_m"] > CLIP else ""
        text = f" {e['label']}{more}"
        axis.text(right, place, text, fontsize=SMALL, va="center", clip_on=False)
    front, best = [], np.inf
    for e in sorted(shown, key=lambda e: (e["step_ratio"], e["delta_m"])):
        if e["delta_m"] < best:
            best = e["delta_m"]
            front.append((e["step_ratio"], best))
    front.append((x.max(), best))
    axis.step(
        *zip(*front, strict=True), where="post", color="#777777", lw=1.2, ls="--",
        label="Pareto front", zorder=2,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(x.min() / 1.1, right)
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50) if x.min() / 1.1 < t < right]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    ends = [*y, *at]
    axis.set_ylim(min(ends) - label_space, max(ends) + label_space)
    sets = shown[0]["sets"]
    axis.set_xlabel("time of a step relative to equal weights (one run, no vmap)")
    clipped = f", clipped at {CLIP:g}" if any(y == CLIP) else ""
    axis.set_ylabel(f"mean Δm in % over {sets} sets{clipped}; lower is better")
    _families(axis, shown)
    common.legend(figure, axes, columns=4)
    return figure


CURVES = {
    "equal weights": {"color": "#333333", "marker": "D", "ls": ":"},
    "single task": {"color": "#009E73", "marker": "^", "ls": "-."},
    "loss balancing": {"color": "#0072B2", "marker": "o", "ls": "-"},
    "gradient balancing": {"color": "#D55E00", "marker": "s", "ls": "--"},
}
HATCHES = {"equal weights": "", "loss balancing": "///", "gradient balancing": "..."}
MARKS = ((1, 2, 5, 10, 20, 50, 100), (1, 1.5, 2, 3), (1, 1.1, 1.2, 1.3, 1.4, 1.5))
"""Ticks of a ratio, for large and for small ones."""


def curves_of(
    board: Board, values: Values, table: Table
) -> dict[str, list[Mapping[float, float]]]:
    """Scores by rate of all cells (row and set) of the families in :data:`CURVES`."""
    found: dict[str, list[Mapping[float, float]]] = {}
    for entry in table:
        name = entry["row"] if entry["row"] in CURVES else entry["family"]
        if name not in CURVES or report.kind_of(entry["row"]) == "auxiliary":
            continue
        if entry["kind"] == "control" and entry["row"] not in CURVES:
            continue
        cells = (board.cells[s][entry["row"]] for s in values.sets)
        found.setdefault(name, []).extend(cell.scores for cell in cells if cell.scores)
    return {name: found[name] for name in CURVES if name in found}


def excess(scores: Mapping[float, float], rate: float) -> float:
    """Error at a rate divided by the error at the best rate.

    Examples:
      >>> round(excess({0.1: np.log(0.5), 0.3: np.log(0.25)}, 0.1), 6)
      2.0
    """
    best = min(scores.values())
    return float(np.exp(scores[rate] - best)) if np.isfinite(best) else np.nan


def rates(board: Board, values: Values, table: Table) -> Any:
    """Validation error over the learning rate by family, and the selected rates."""
    found = curves_of(board, values, table)
    offered = [set(one) for cells in found.values() for one in cells]
    grid = sorted(set.intersection(*offered)) if offered else []
    if len(grid) < 2:
        return None
    figure, axes = common.panels(1, 2, width=3.9, height=3.2)
    left, right = axes[0]
    sets, tops, every = len(values.sets), [], sorted(set.union(*offered))
    for k, (name, cells) in enumerate(found.items()):
        errors = np.array([[excess(one, lr) for lr in grid] for one in cells])
        low, middle, high = np.nanpercentile(errors, [25, 50, 75], axis=0)
        known = np.isfinite(high)
        at = np.array(grid)[known] * 1.06 ** (k - 1.5)
        left.errorbar(
            at, middle[known], np.stack([middle - low, high - middle])[:, known],
            elinewidth=0.8, capsize=2, ms=4, lw=1.3, **CURVES[name],
            label=f"{name} ({counted(len(cells) // sets, 'row')} x "
            f"{counted(sets, 'set')})",
        )  # fmt: skip
        tops += high[known].tolist()
    top = max(tops, default=1.0) * 1.1
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(0.97, top)
    marks = next(m for m in MARKS if m[-2] < top or m is MARKS[-1])
    marks = [t for t in marks if t < top]
    left.set_yticks(marks, [f"{t:g}" for t in marks])
    left.minorticks_off()
    left.set_xlabel("learning rate of Adam")
    left.set_ylabel("validation error / error at the best rate")
    left.set_title("Median and quartiles over the cells (a row on a set)", fontsize=9)
    # Single-task networks select a rate for each task.
    bars = {name: cells for name, cells in found.items() if name != SINGLE}
    for k, (name, cells) in enumerate(bars.items()):
        best = [min(one, key=lambda lr: (one[lr], lr)) for one in cells]
        share = [100 * np.mean([b == lr for b in best]) for lr in every]
        place = np.arange(len(every)) + 0.27 * (k - (len(bars) - 1) / 2)
        right.bar(
            place, share, 0.24, color=CURVES[name]["color"], hatch=HATCHES[name],
            edgecolor="white", lw=0.5,
        )  # fmt: skip
    names = [f"{lr:.0e}".replace("e-0", "e-") for lr in every]
    right.set_xticks(range(len(every)), names, fontsize=SMALL)
    right.set_xlabel("learning rate of Adam")
    right.set_ylabel("cells that select the rate, in %")
    extra = " (outer rates: extensions of the grid)" if len(every) > len(grid) else ""
    right.set_title(f"Selected rate{extra}", fontsize=9)
    common.legend(figure, axes, columns=2)
    return figure


def seeds(values: Values) -> Any:
    """Differences between methods and between seeds, by set."""
    spread = report.seed_spread(values)
    if not spread:
        return None
    names = list(spread)[::-1]
    figure, axes = common.panels(1, 1, width=6.4, height=1.5 + 0.3 * len(names))
    axis = axes[0, 0]
    methods = len(report.methods_of(values))
    count = next(iter(values.deltas.values())).shape[1]
    tops = [max(one.within, one.between, one.noise) for one in spread.values()]
    tiny = 1e-3 * max(tops, default=1.0) or 1e-3
    for i, name in enumerate(names):
        one = spread[name]
        w, b, n = (max(x, tiny) for x in (one.within, one.between, one.noise))
        first = i == 0
        axis.plot([min(w, b, n), max(w, b, n)], [i, i], color="#DDDDDD", lw=3, zorder=1)
        axis.plot(
            n, i, "|", ms=14, mew=2, color="#333333", zorder=2,
            label="expected between methods from seeds alone" if first else None,
        )  # fmt: skip
        axis.plot(
            w, i, "o", ms=6, mfc="white", color="#0072B2", zorder=3,
            label=f"between the {count} seeds of a method" if first else None,
        )  # fmt: skip
        axis.plot(
            b, i, "s", ms=6, color="#D55E00", zorder=3,
            label=f"between the means of {methods} methods" if first else None,
        )  # fmt: skip
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [k * 10.0**e for e in range(-3, 4) for k in (1, 2, 5)]
    ticks = [t for t in ticks if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    equals = {name: "" if spread[name].p < 1e-4 else "= " for name in names}
    labels = [f"{name} (p {equals[name]}{chance(spread[name].p)})" for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=SMALL)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlabel("standard deviation in Δm points")
    axis.set_title(
        "Methods differ by more than seeds if the square is far right of the bar\n"
        "(p: Friedman's test over seeds, Holm over the sets)",
        fontsize=9,
    )
    common.legend(figure, axes, columns=2)
    return figure


def write(config: Config, result: Result) -> list[pathlib.Path]:
    """Saves the figures for which there are rows."""
    board, values, table = result[:3]
    if not config.plots or not report.ranked_rows(values):
        return []
    figures = {
        "ranks": ranks(values, table),
        "delta": delta(values, table),
        "heat": heat(board, values, table),
        "cost": cost(table),
        "rates": rates(board, values, table),
        "seeds": seeds(values),
    }
    return common.save(figures, config.report_to or config.out, config)
