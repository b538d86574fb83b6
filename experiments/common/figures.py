"""Panels, legends and lines with error bands for all figures."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtljax.training import plots


def panels(lines: int, columns: int, width: float = 3.4, height: float = 2.8, **more):
    """Returns a figure and its axes ``[lines, columns]``."""
    from matplotlib.figure import Figure

    size = (columns * width + 0.4, lines * height + 0.6)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    axes = figure.subplots(lines, columns, squeeze=False, **more)
    for axis in axes.flat:
        axis.grid(color="#E6E6E6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Any, axes: Any, columns: int | None = None) -> None:
    """Draws one legend for all panels, below them."""
    found: dict[str, Any] = {}
    for axis in np.ravel(axes):
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=columns or max(1, min(len(found), int(figure.get_figwidth() / 2.1))),
        frameon=False,
        fontsize=8,
    )


def line(
    axis: Any,
    x: Any,
    values: Any,
    look: Mapping[str, Any],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    **more: Any,
) -> None:
    """Draws the mean over the leading axis with a band of one standard deviation.

    The band is cut at ``bounds``, the possible values.
    """
    values = np.asarray(values, np.float64)
    mean = values.mean(0)
    sd = values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
    axis.plot(x, mean, linewidth=1.5, **look, **more)
    low, high = np.clip([mean - sd, mean + sd], *bounds)
    axis.fill_between(x, low, high, color=look["color"], alpha=0.13, lw=0)


def save(
    figures: Mapping[str, Any], folder: pathlib.Path, config: Any
) -> list[pathlib.Path]:
    """Saves the figures that are not None. Saves none if ``plots`` is false."""
    return [
        plots.save(figure, folder / f"{name}.png")
        for name, figure in figures.items()
        if figure is not None and config.plots
    ]
