"""Draws the figures of the ForkMerge experiment from its result rows."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import figures as common
from experiments.common.figures import legend, panels
from experiments.forkmerge.config import LABELS, Config
from experiments.forkmerge.report import MEASURES, Pairs, Rows, of, pair_gains
from mtljax import forkmerge
from mtljax.training import plots


def transfer(rows: Rows, config: Config) -> dict[str, Any]:
    """Returns gain and discrepancy over λ at the last step, ``[targets, L]``."""
    rows = [row for row in rows if row["part"] == "table"]
    rates = {row["lr"] for row in of(rows, method="lambda_grid")}
    last = [r for r in rows if r["step"] == config.steps and r["lr"] in rates]

    def mean(target, lam, field):
        method = "stl" if lam is None else "lambda_grid"
        found = of(last, method=method, target=target, **{"lambda": lam})
        return float(np.mean([row[field] for row in found]))

    lambdas = [None, *config.lambdas]
    grid = {
        field: np.array([[mean(t, x, field) for x in lambdas] for t in config.domains])
        for field in ("val", "csd")
    }
    gains = forkmerge.transfer_gain(grid["val"], grid["val"][:, :1])
    kinds = forkmerge.negative_transfer(gains, np.array([0.0, *config.lambdas]))
    return {
        "lambdas": [0.0, *config.lambdas],
        "gain": np.asarray(gains),
        "csd": grid["csd"],
        "strong": np.asarray(kinds.strong),
        "best_lambda": np.asarray(kinds.best_weight),
    }


def transfer_figure(found: Mapping[str, Any], domains: Sequence[str]) -> Any:
    """Draws transfer gain and discrepancy over λ, with one line per target."""
    figure, axes = panels(1, 2, 3.8, 2.9)
    axes = axes[0]
    at = range(len(found["lambdas"]))
    for i, domain in enumerate(domains):
        look = plots.style(domain, list(domains))
        kind = " (strong negative)" if found["strong"][i] else ""
        axes[0].plot(at, 100 * found["gain"][i], label=domain + kind, **look)
        axes[1].plot(at, found["csd"][i], **look)
    axes[0].axhline(0, color="#777777", linewidth=1)
    axes[0].set_ylabel("transfer gain, points (validation)")
    axes[1].set_ylabel("confidence score discrepancy")
    for axis in axes:
        axis.set_xticks(list(at), [f"{x:g}" for x in found["lambdas"]])
        axis.set_xlabel("auxiliary weight λ")
    legend(figure, axes)
    return figure


def pairs_figure(pairs: Mapping[str, Pairs], domains: Sequence[str]) -> Any:
    """Draws the transfer gain of each pair, one matrix per method (Figure 5)."""
    figure, axes = panels(1, len(pairs), 4.3, 3.4)
    axes = axes[0]
    most = max(float(np.nanmax(np.abs(found.gains))) for found in pairs.values())
    image: Any = None
    for axis, (method, found) in zip(axes, pairs.items(), strict=True):
        axis.grid(visible=False)
        image = axis.imshow(found.gains, cmap="RdBu", vmin=-most, vmax=most)
        for (a, t), gain in np.ndenumerate(found.gains):
            if math.isfinite(gain):
                star = "*" if found.p_values[a, t] < 0.05 else ""
                colour = "white" if abs(gain) > 0.6 * most else "black"
                text = f"{gain:+.1f}{star}"
                axis.text(t, a, text, ha="center", va="center", color=colour, size=9)
        places = range(len(domains))
        axis.set_xticks(places, domains, rotation=30, ha="right")
        axis.set_yticks(places, domains)
        axis.set_xlabel("target")
        axis.set_title(f"{LABELS[method]}: {found.negative} pairs negative", size=10)
    axes[0].set_ylabel("auxiliary")
    figure.colorbar(image, ax=axes, label="gain over STL, points", shrink=0.8)
    return figure


def analysis_figure(points: Rows, config: Config) -> Any:
    """Draws the gain over cosine and over discrepancy (Figures 2 and 3).

    A point is the mean of a pair and a weight over the seeds.
    """
    figure, axes = panels(1, 2, 3.8, 3.0)
    axes = axes[0]
    last = of(points, column="last")
    pairs = sorted({(point["target"], point["aux"]) for point in last})
    names = [f"λ = {x:g}" for x in config.lambdas]

    def mean(name, pair, field):
        mine = of(last, row=name, target=pair[0], aux=pair[1])
        return float(np.mean([point[field] for point in mine]))

    for axis, (measure, text) in zip(axes, MEASURES.items(), strict=True):
        for name, marker in zip(names, itertools.cycle("osD^v")):
            look = plots.style(name, names) | {"linestyle": "none", "marker": marker}
            x = [mean(name, pair, measure) for pair in pairs]
            y = [mean(name, pair, "gain") for pair in pairs]
            axis.plot(x, y, label=name, ms=4, **look)
        axis.axhline(0, color="#777777", linewidth=1)
        axis.set_xlabel(text)
    axes[0].set_ylabel("transfer gain, points")
    legend(figure, axes)
    return figure


def write(rows: Rows, kept: Rows, config: Config) -> list[pathlib.Path]:
    """Writes the figures that the rows allow. ``kept`` are the reported rows."""
    made = {}
    if of(rows, part="table", method="lambda_grid"):
        made["transfer"] = transfer_figure(transfer(rows, config), config.domains)
    if of(rows, part="pairs"):
        made["pairs"] = pairs_figure(pair_gains(kept, config), config.domains)
    if points := of(kept, part="points"):
        made["analysis"] = analysis_figure(points, config)
    return common.save(made, config.out, config)
