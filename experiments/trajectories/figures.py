"""Draws the figures of the trajectories experiment from groups of runs."""

import pathlib

import numpy as np

from experiments.common import figures as common
from experiments.common.figures import legend, panels
from experiments.trajectories.analysis import FACTOR_NAMES, FACTORS, Group, Groups
from experiments.trajectories.config import SUM, Config
from experiments.trajectories.data import COPY, DOMAIN, NOISY, OTHER, TARGET

LOOKS = {
    (TARGET,): ("alone", "#222222", "o"),
    (TARGET, OTHER): (f"+ {OTHER}", "#228833", "s"),
    (TARGET, NOISY): (f"+ {NOISY}", "#EE6677", "^"),
    (TARGET, DOMAIN): (f"+ {DOMAIN}", "#4477AA", "D"),
    (TARGET, COPY): (f"+ {COPY}", "#CCBB44", "v"),
}
"""Name, colour and marker of the rows of Figures 1 and 3."""


def write(config: Config, groups: Groups) -> list[pathlib.Path]:
    """Writes both figures if the runs exist."""
    found = {tasks: groups.get(("fashion_mtl", tasks, SUM)) for tasks in LOOKS}
    rows = [(mine, LOOKS[tasks]) for tasks, mine in found.items() if mine is not None]
    made = {"gap": gap_figure(rows), "factors": factor_figure(rows)} if rows else {}
    return common.save(made, config.out, config)


def binned(loss: np.ndarray, values: np.ndarray, per_decade: int = 4):
    """Returns centres, means and deviations over runs in bins of the log loss."""
    good = np.isfinite(loss) & np.isfinite(values) & (loss > 0)
    place = np.floor(np.log10(np.where(good, loss, 1)) * per_decade + 1e-6)
    found = []
    for bin_ in np.unique(place[good])[::-1]:
        inside = good & (place == bin_)
        runs = [
            values[r][inside[r]].mean() for r in range(len(loss)) if inside[r].any()
        ]
        sd = np.std(runs, ddof=1) if len(runs) > 1 else np.nan
        found.append((10 ** ((bin_ + 0.5) / per_decade), np.mean(runs), sd))
    return np.array(found).T


def _against_loss(
    axis, mine: Group, name: str, look, factor: float = 1.0, *, log: bool = False
) -> None:
    """Draws checkpoints, means and two standard deviations; geometric ones if log."""
    label, colour, marker = look
    loss, values = mine.of("train_loss", TARGET), factor * mine.of(name, TARGET)
    axis.plot(
        loss.ravel(), values.ravel(), marker, color=colour, alpha=0.22, markersize=3.5,
        linestyle="none", markeredgewidth=0,
    )  # fmt: skip
    centre, mean, sd = binned(loss, np.log(values) if log else values)
    ends = np.stack([mean, mean - 2 * np.nan_to_num(sd), mean + 2 * np.nan_to_num(sd)])
    mean, low, high = np.exp(ends) if log else ends
    axis.errorbar(
        centre, mean, yerr=(mean - low, high - mean), color=colour, marker=marker,
        markersize=5, capsize=2, linewidth=1.6, elinewidth=1.0, label=label,
    )  # fmt: skip


def _loss_axis(axis, ticks: tuple[float, ...] = (1.0, 3.0)) -> None:
    """Sets a logarithmic axis with few ticks. Training progresses to the right."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_locator(LogLocator(subs=ticks))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def gap_figure(rows):
    """Draws Figure 1: test accuracy against the target's own training loss."""
    figure, axes = panels(1, 1, 6.0, 4.0)
    axis = axes[0, 0]
    for mine, look in rows:
        _against_loss(axis, mine, "test_score", look, 100)
    _loss_axis(axis)
    top = max(float(np.nanmax(m.of("test_score", TARGET))) for m, _ in rows)
    axis.set_ylim(100 * top - 22, 100 * top + 1.5)
    axis.set_xlabel("own-task training loss, nats (training goes right)")
    axis.set_ylabel("test accuracy of the target, %")
    axis.set_title("FashionMTL: dots are checkpoints, lines means ± 2 sd over seeds",
                   fontsize=9.5)  # fmt: skip
    axis.legend(frameon=False, loc="lower right")
    return figure


def factor_figure(rows):
    """Draws Figure 3: the three factors against the target's own training loss."""
    figure, axes = panels(1, 3, 3.9, 3.4)
    units = {"sharpness": "sharpness, nats", "covariance": "covariance trace"}
    for axis, factor in zip(axes.flat, FACTORS, strict=True):
        # Signed estimates are unchanged. A negative estimate is shown below zero.
        log = min(float(np.nanmin(m.of(factor, TARGET))) for m, _ in rows) > 0
        for mine, look in rows:
            _against_loss(axis, mine, factor, look, log=log)
        _loss_axis(axis, (1.0,))
        axis.set_xlabel("own-task training loss, nats")
        axis.set_ylabel(units.get(factor, FACTOR_NAMES[factor]))
        axis.set_yscale("log" if log else "symlog")
    legend(figure, axes, 4)
    return figure
