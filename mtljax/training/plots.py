"""Figures of runs, intended for visual inspection as PNG files.

Each function returns a :class:`matplotlib.figure.Figure`, made without pyplot, global
state or display. :func:`save` writes it. A method has the same colour and dash in all
figures that are given the same list ``methods``.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtljax.balancer import task_vector
from mtljax.extras import require

# The "bright" and "muted" palettes of Paul Tol, interleaved, for colour-blind readers.
PALETTE = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377",
    "#332288", "#999933", "#882255", "#44AA99", "#CC6677", "#117733",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX<>*hp"
INK = "#333333"

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
}


class Curve(NamedTuple):
    """Values over time of one method.

    ``steps`` has shape ``[P]``. ``values`` has shape ``[P]``, or ``[S, P]`` with seeds.
    A last axis ``[..., N]`` is added for N values, one per task or per pair of tasks.
    They may also be a dict of N such arrays by name.
    """

    steps: Any
    values: Any


def curve(rows: Sequence[Mapping[str, Any]], name: str, kind: str = "train") -> Curve:
    """Collects a metric from the rows of a run and stacks the seeds.

    Args:
      rows: Rows of :func:`mtljax.training.fit` or :func:`read_jsonl`.
      name: Name of the metric, for example ``"losses"``.
      kind: ``"train"`` or ``"eval"``.

    Returns:
      Steps ``[P]`` and values ``[S, P, ...]``, for the steps that all seeds have.

    Raises:
      ValueError: If no row has the metric.

    Examples:
      >>> from mtljax.training.plots import curve
      >>> rows = [{"step": s, "kind": "train", "seed": k, "losses": [s, k]}
      ...         for s in (1, 2, 3) for k in (0, 1)]
      >>> curve(rows, "losses").values.shape
      (2, 3, 2)
    """
    found: dict[Any, dict[int, Any]] = {}
    for row in rows:
        if row.get("kind") == kind and name in row:
            found.setdefault(row.get("seed"), {})[row["step"]] = row[name]
    if not found:
        raise ValueError(f"No {kind} row has {name!r}.")
    steps = sorted(set.intersection(*(set(f) for f in found.values())))
    values = [[f[s] for s in steps] for f in found.values()]
    return Curve(np.asarray(steps), np.asarray(values, np.float64))


def style(method: str, methods: Sequence[str]) -> dict[str, Any]:
    """Returns colour and dash of a method, by its position in ``methods``.

    Examples:
      >>> from mtljax.training.plots import style
      >>> style("b", ["a", "b"])
      {'color': '#EE6677', 'linestyle': '-'}
    """
    i = list(methods).index(method)
    n = len(PALETTE)
    # In the second half of a long list, neighbours differ in the dash as well.
    dash = (i // n + (i >= 6)) % len(DASHES)
    return {"color": PALETTE[i % n], "linestyle": DASHES[dash]}


def _figure(panels: int, *, columns: int, width: float, height: float, legend: bool):
    require("mtljax.training.plots", "train", "matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    lines = math.ceil(panels / columns)
    size = (columns * width + (1.9 if legend else 0.0), lines * height + 0.5)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        axes = figure.subplots(lines, columns, squeeze=False)
    for spare in axes.flat[panels:]:
        spare.set_visible(False)
    return figure, list(axes.flat[:panels])


def _legend(figure, axis, count: int) -> None:
    import matplotlib as mpl

    handles, labels = axis.get_legend_handles_labels()
    with mpl.rc_context(_STYLE):
        if count > 5:
            figure.legend(handles, labels, loc="outside right upper")
        else:
            axis.legend(handles, labels)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Computes a centred running mean over the last axis, shorter at both ends.

    Examples:
      >>> import numpy as np
      >>> from mtljax.training.plots import smooth
      >>> smooth(np.array([0.0, 3.0, 6.0, 3.0]), 3)
      array([1.5, 3. , 4. , 4.5])
    """
    window = max(1, min(window, values.shape[-1]))
    if window <= 1:
        return values
    kernel = np.ones(window)
    count = np.convolve(np.ones(values.shape[-1]), kernel, mode="same")
    total = [
        np.convolve(v, kernel, "same") for v in values.reshape(-1, values.shape[-1])
    ]
    return np.reshape(total, values.shape) / count


def _draw(axis, steps, values, *, look, label, window) -> None:
    seeds = np.atleast_2d(smooth(np.asarray(values, np.float64), window))
    mean = seeds.mean(0)
    marker = "o" if len(steps) == 1 else None  # a line of one point is invisible
    axis.plot(steps, mean, label=label, linewidth=1.5, marker=marker, **look)
    if len(seeds) > 1:
        sd = seeds.std(0, ddof=1)
        low, high = mean - sd, mean + sd
        if axis.get_yscale() == "log":  # the band must stay positive
            low = np.maximum(low, mean**2 / high)
        axis.fill_between(
            steps, low, high, color=look["color"], alpha=0.12, linewidth=0
        )


def _named(
    history: Mapping[str, Curve], names: Sequence[str] | None
) -> tuple[dict[str, Curve], list[str]]:
    """Returns the curves with values ``[..., N]``, and the N names."""
    dicts = [c.values for c in history.values() if isinstance(c.values, Mapping)]
    if names is None and not dicts:
        raise ValueError("Pass the names, or curves whose values are dicts by name.")
    names = list(dicts[0] if names is None else names)
    return {
        method: Curve(steps, task_vector(values, names, axis=-1, numpy=np))
        for method, (steps, values) in history.items()
    }, names


def loss_curves(
    history: Mapping[str, Curve],
    task_names: Sequence[str] | None = None,
    *,
    ylabel: str = "train loss",
    log: bool = True,
    window: int = 1,
    methods: Sequence[str] | None = None,
) -> Any:
    """Draws one panel per task and one line per method, mean over seeds ± 1 sd.

    Args:
      history: Curve of each method, with values ``[P, T]`` or ``[S, P, T]``, or dicts
        by task.
      task_names: T names. By default those of the dicts.
      ylabel: Name of the values, with a unit if they have one.
      log: Whether the vertical axis is logarithmic.
      window: Points of a centred running mean. 1 draws the values unchanged.
      methods: All methods of the report, which determine the colours.

    Returns:
      The figure.
    """
    history, task_names = _named(history, task_names)
    names = list(methods or history)
    figure, axes = _figure(
        len(task_names), columns=3, width=3.3, height=3.0, legend=len(history) > 5
    )
    for t, (axis, task) in enumerate(zip(axes, task_names, strict=True)):
        if log:
            axis.set_yscale("log")
        for method, (steps, values) in history.items():
            column = np.asarray(values)[..., t]
            look = style(method, names)
            _draw(axis, steps, column, look=look, label=method, window=window)
        if log:
            _plain_log(axis)
        axis.set_title(task)
        axis.set_xlabel("step")
        _steps_axis(axis)
    axes[0].set_ylabel(ylabel)
    _legend(figure, axes[0], len(history))
    return figure


def _steps_axis(axis) -> None:
    """Formats steps as 0, 5k, 10k, so that labels of panels do not overlap."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    short = lambda x: f"{x / 1e3:g}k" if abs(x) >= 1e3 else f"{x:g}"
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axis.margins(x=0.02)


def _plain_log(axis) -> None:
    """Labels a logarithmic axis with 0.2, 0.3, 0.5, 1, ... instead of powers."""
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    low, high = axis.get_ylim()
    if high < 3 * low:  # too narrow for the labels 1, 2, 3, 5
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _small_multiples(
    history: Mapping[str, Curve],
    line_names: Sequence[str],
    *,
    ylabel: str,
    window: int,
    level: float,
) -> Any:
    """Draws one panel per method with N lines, all panels on one scale."""
    figure, axes = _figure(
        len(history), columns=4, width=2.5, height=2.1, legend=len(line_names) > 0
    )
    for i, (axis, (method, (steps, values))) in enumerate(
        zip(axes, history.items(), strict=True)
    ):
        axis.axhline(level, color="#777777", linewidth=1.0, linestyle=(0, (4, 3)))
        for k, name in enumerate(line_names):
            look = {"color": PALETTE[k % len(PALETTE)], "linestyle": "-"}
            column = np.asarray(values)[..., k]
            _draw(axis, steps, column, look=look, label=name, window=window)
        axis.set_title(method)
        _steps_axis(axis)
        if i % 4 == 0:
            axis.set_ylabel(ylabel)
        if i + 4 >= len(history):
            axis.set_xlabel("step")
    low = min(axis.dataLim.y0 for axis in axes)
    high = max(axis.dataLim.y1 for axis in axes)
    pad = 0.05 * (high - low) or 0.1
    for axis in axes:
        axis.set_ylim(low - pad, high + pad)
    _legend(figure, axes[0], 99)
    return figure


def weight_shares(weights: Any) -> np.ndarray:
    """Divides weights ``[..., T]`` by the sum of their absolute values.

    Examples:
      >>> from mtljax.training.plots import weight_shares
      >>> weight_shares([3.0, 1.0])
      array([0.75, 0.25])
    """
    array = np.asarray(weights, np.float64)
    total = np.abs(array).sum(-1, keepdims=True)
    return array / np.where(total > 0, total, 1.0)


def weight_trajectories(
    history: Mapping[str, Curve],
    task_names: Sequence[str] | None = None,
    *,
    window: int = 1,
    shown: Sequence[str] | None = None,
) -> Any:
    """Draws the task weights over time, one panel per method, mean ± 1 sd.

    Weights are divided by the sum of their absolute values, because methods have
    different scales.

    Args:
      history: Curve of the weights of each method, ``[P, T]`` or ``[S, P, T]``, or
        dicts by task.
      task_names: T names. By default those of the dicts.
      window: Points of a centred running mean.
      shown: Names of the tasks that are drawn, by default all. The shares are those of
        all tasks.

    Returns:
      The figure. A dashed line marks equal weights.
    """
    history, task_names = _named(history, task_names)
    shown = list(task_names if shown is None else shown)
    places = [task_names.index(name) for name in shown]
    shares = {
        method: Curve(steps, weight_shares(values)[..., places])
        for method, (steps, values) in history.items()
    }
    return _small_multiples(
        shares,
        shown,
        ylabel="share of the weights",
        window=window,
        level=1.0 / len(task_names),
    )


def cosine_over_time(
    history: Mapping[str, Curve],
    pair_names: Sequence[str] | None = None,
) -> Any:
    """Draws the cosine of each pair of task gradients over time, per method.

    Args:
      history: Curve of the cosines of each method, ``[P, N]`` or ``[S, P, N]`` for N
        pairs, or dicts by pair.
      pair_names: N names, for example ``"seg · depth"``. By default those of the dicts.

    Returns:
      The figure. Below the dashed line at 0 the task gradients conflict.
    """
    history, pair_names = _named(history, pair_names)
    return _small_multiples(
        history,
        pair_names,
        ylabel="cosine of gradients",
        window=1,
        level=0.0,
    )


def tradeoff_scatter(
    points: Mapping[str, tuple[Any, Any]],
    *,
    xlabel: str,
    ylabel: str,
    reference: tuple[float, float] | None = None,
    better: tuple[str, str] = ("max", "max"),
    methods: Sequence[str] | None = None,
) -> Any:
    """Draws two metrics, with one point per method: mean over seeds and ± 1 sd.

    Args:
      points: For each method, the values of x and the values of y over seeds.
      xlabel: First metric, with its unit.
      ylabel: Second metric, with its unit.
      reference: The two single-task results, drawn as dashed lines.
      better: Better direction of each axis, ``"max"`` or ``"min"``.
      methods: All methods of the report, which determine the colours.

    Returns:
      The figure, with one marker and colour per method.
    """
    names = list(methods or points)
    figure, (axis,) = _figure(1, columns=1, width=5.2, height=4.6, legend=True)
    for method, values in points.items():
        x, y = (np.atleast_1d(np.asarray(v, np.float64)) for v in values)
        sds = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in (x, y)]
        axis.errorbar(
            x.mean(),
            y.mean(),
            xerr=sds[0],
            yerr=sds[1],
            label=method,
            linestyle="none",
            marker=MARKERS[names.index(method) % len(MARKERS)],
            markersize=7,
            color=style(method, names)["color"],
            ecolor=style(method, names)["color"] + "66",
            elinewidth=1.2,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
    axis.margins(0.12)
    axis.autoscale_view()
    if reference is not None:
        line = {"color": "#777777", "linewidth": 1.0, "linestyle": (0, (4, 3))}
        axis.axvline(reference[0], **line)
        axis.axhline(reference[1], **line)
        axis.annotate(
            "single task",
            (0.0, reference[1]),
            xycoords=axis.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            ha="left",
            color="#777777",
            fontsize=8,
        )
    arrows = [{"max": "→", "min": "←"}[direction] for direction in better]
    axis.set_xlabel(f"{xlabel}   (better {arrows[0]})")
    axis.set_ylabel(f"{ylabel}   (better {arrows[1]})")
    _legend(figure, axis, 99)
    return figure


def save(figure: Any, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a figure as PNG and creates the folder if needed.

    Args:
      figure: A figure of this module.
      path: The file.

    Returns:
      The path.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
