"""Draws the figures of the FS-MTL experiment from its result rows."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.common import figures
from experiments.common.figures import line
from experiments.fs_mtl import paper
from experiments.fs_mtl.config import STL, Config, Entry
from experiments.fs_mtl.report import Runs
from mtljax.training import plots

PLAIN = ("plain", "plain2", "plain4")
FAMILY = {
    **dict.fromkeys(PLAIN, ("#4477AA", "-")),
    "split": ("#EE6677", "-"),
    "direct": ("#228833", "--"),
    "samo": ("#AA3377", "-."),
    "second": ("#CCBB44", "-"),
    "each": ("#66CCEE", "-"),
}
"""Colour and dash of each variant, equal in all panels."""
RLW = ("#CCBB44", "--")  # shares its panel with F-LS


def _look(entry: Entry) -> tuple[str, str]:
    return RLW if entry.method == "random_loss_weighting" else FAMILY[entry.variant]


def _panels(count: int, columns: int = 3):
    columns = min(columns, count)
    figure, axes = figures.panels(-(-count // columns), columns, 3.2)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def _by_method(runs: Runs) -> dict[str, list[Entry]]:
    """Groups the entries into panels: one per balancer, and one without balancer.

    Of a plain line, the longest run contains the shorter ones.
    """
    found: dict[str, list[Entry]] = {}
    for entry in runs.rows:
        at = PLAIN.index(entry.variant) if entry.variant in PLAIN else len(PLAIN)
        longer = [entry._replace(variant=variant) for variant in PLAIN[at + 1 :]]
        if entry.method != STL and not any(one in runs.rows for one in longer):
            loss = entry.method in ("linear", "random_loss_weighting")
            base = entry._replace(variant="plain").label
            found.setdefault("LS, RLW" if loss else base, []).append(entry)
    return found


def _curves(
    runs: Runs,
    field: str,
    ylabel: str,
    xlabel: str,
    x_of: Callable[[np.ndarray, Entry], np.ndarray],
    *,
    reference: Mapping[str, Mapping[int, float]] | None = None,
    limits: tuple[float, float] | None = None,
):
    """Draws one panel per balancer and one line per variant, mean ± 1 sd."""
    methods = _by_method(runs)
    figure, axes = _panels(len(methods))
    for axis, (name, group) in zip(axes, methods.items(), strict=True):
        for entry in group:
            if not any(field in row for row in runs.rows[entry]):
                continue
            steps, values = plots.curve(runs.rows[entry], field, "eval")
            colour, dash = _look(entry)
            look = {"color": colour, "linestyle": dash}
            plain = entry._replace(variant="plain")
            label = (plain if entry.variant in PLAIN else entry).label
            x, y = x_of(steps, entry), 100 * values
            line(axis, x, y, look, bounds=(0, 100), label=label)
        for variant, points in (reference or {}).items():
            axis.plot(
                list(points), list(points.values()), color=FAMILY[variant][0],
                marker="x", linestyle="none", markersize=4, label=f"paper, {variant}",
            )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(xlabel)
        if limits:
            axis.set_ylim(limits)
            axis.set_yticks(range(0, 101, 25))
        axis.legend(fontsize=7, frameon=False, ncols=2 if limits else 1)
    for axis in axes[::3]:
        axis.set_ylabel(ylabel)
    return figure


def write(config: Config, runs: Runs) -> list[pathlib.Path]:
    """Writes the test accuracy over epochs and over cost, and the conflicts."""
    epochs = lambda steps, _: steps / runs.steps_per_epoch
    passes = lambda steps, entry: steps * entry.backward_passes
    accuracy = ("test_score", "test accuracy, %")
    inside = {
        variant: {e: p for e, p in points.items() if e <= config.epochs}
        for variant, points in paper.CONFLICT.items()
    }
    made: dict[str, Any] = {
        "accuracy_over_epochs": _curves(runs, *accuracy, "epoch", epochs),
        "accuracy_over_cost": _curves(runs, *accuracy, "backward passes", passes),
        "conflict_inter_loss": _curves(
            *(runs, "probe_inter_loss", "inter-loss conflict, %", "epoch", epochs),
            reference=inside if runs.name == "multi_mnist" else None,
            limits=(-3, 145),  # space for the legend
        ),
    }
    return figures.save(made, config.folder(runs.name), config)
