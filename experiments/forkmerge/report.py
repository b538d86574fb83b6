"""From rows to the tables and the plots; no training code."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.forkmerge import shared
from experiments.forkmerge.config import LABELS, Config
from mtljax import forkmerge, metrics, training
from mtljax.training import plots, tables

Rows = Sequence[Mapping[str, Any]]


def of(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def rank(score: float | None) -> float:
    """A validation score to choose by; a run that diverged is the last choice."""
    return -math.inf if score is None else score


def tune(rows: Rows, part: str, method: str) -> float:
    """The learning rate of the best validation score, mean over targets and seeds.

    Every run counts with its best step. The smaller rate of two equals.
    """
    found = of(rows, part=part, method=method)
    best: dict[Any, dict[Any, float]] = {}
    for row in found:
        runs = best.setdefault(row["lr"], {})
        run = (row["target"], row["seed"])
        runs[run] = max(runs.get(run, -math.inf), rank(row["val"]))
    return max(sorted(best), key=lambda lr: np.mean(list(best[lr].values())))


def chosen(rows: Rows) -> list[Mapping[str, Any]]:
    """The reported row of every run of one method.

    Of a merge the last; of all others, the step (and λ) that validation likes best,
    which gives these an advantage that ForkMerge does not take.
    """
    found = {}
    for row in rows:
        run = (row["target"], row["aux"], row["seed"])
        merged = row["method"].startswith("forkmerge")
        value = row["step"] if merged else rank(row["val"])
        if run not in found or value > found[run][0]:
            found[run] = (value, row)
    return [row for _, row in found.values()]


def reported(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that tables are made of: a learning rate, a step, a λ a run."""
    kept = []
    for part in ("table", "pairs", "intervals", "shared"):
        for method in LABELS:
            mine = of(rows, part=part, method=method)
            if len({row["lr"] for row in mine}) > 1:
                mine = of(mine, lr=tune(mine, part, method))
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


def make_table(rows: Rows, config: Config, part: str) -> dict[str, dict[str, Any]]:
    """Label -> column -> values over seeds, from reported rows."""
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
    return table


def columns_of(targets: Iterable[str]) -> dict[str, Any]:
    """Columns and which way is better."""
    found: dict[str, Any] = dict.fromkeys(
        [*targets, "average", "gain % over STL"], "max"
    )
    return found | {"targets worse than STL": "min", "learning rate": ""}


def digits_of(targets: Iterable[str]) -> dict[str, int]:
    """Digits after the point of every column."""
    found = dict.fromkeys([*targets, "average"], 1)
    more = {"gain % over STL": 2, "targets worse than STL": 0, "learning rate": 2}
    return found | more


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


def p_value(differences: np.ndarray) -> np.ndarray:
    """Two-sided p of a t-test of mean zero along the first axis; NaN for one seed.

    Examples:
      >>> round(float(p_value(np.array([1.0, 2.0, 3.0]))), 4)
      0.0742
    """
    count = len(differences)
    if count < 2:
        return np.full(differences.shape[1:], math.nan)
    spread = differences.std(0, ddof=1) / math.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = differences.mean(0) / spread
    left = (count - 1) / (count - 1 + np.square(t))
    return np.asarray(jax.scipy.special.betainc((count - 1) / 2, 0.5, left))


def pair_gains(rows: Rows, config: Config) -> dict[str, Pairs]:
    """Method -> gains of all pairs over STL, from reported rows."""
    stl = of(rows, part="table", method="stl")
    alone = values_of(stl, config.domains, config)
    found = {}
    for method in ("ew", "forkmerge"):
        mine = of(rows, part="pairs", method=method)
        if mine:
            scores = values_of(mine, config.domains, config, config.domains)
            gains = forkmerge.transfer_gain(scores, alone[:, None])
            found[method] = Pairs(
                np.asarray(gains).mean(0), p_value(np.asarray(gains, np.float64))
            )
    return found


def pairs_text(pairs: Mapping[str, Pairs]) -> list[str]:
    """Counts as a Markdown table."""
    lines = [
        "| method | pairs | worse than STL | significantly worse | "
        "significantly better | mean gain | worst gain |",
        "|:--" + "|--:" * 6 + "|",
    ]
    for method, found in pairs.items():
        gains = found.gains[np.isfinite(found.gains)]
        cells = [
            LABELS[method],
            gains.size,
            found.negative,
            found.significant(-1),
            found.significant(1),
            f"{gains.mean():+.2f}",
            f"{gains.min():+.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


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


def intervals_text(found: Mapping[int, np.ndarray], config: Config) -> list[str]:
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
    return [tables.markdown_table(table, columns, digits=2, head="Δt")]


def sections(rows: Rows, config: Config) -> list[str]:
    """The body of ``table.md``, a section a part."""
    lines = []
    size = config.train_size or "all"
    if of(rows, part="table"):
        table = make_table(rows, config, "table")
        lines += [
            f"## {len(config.domains)} domains, each in turn the target",
            "",
            tables.markdown_table(
                table,
                columns_of(config.domains),
                digits=digits_of(config.domains),
                exclude=[LABELS["stl"]],
            ),
            "",
            "Test accuracy in percent on the target of each run, mean ± standard "
            f"deviation over {config.seeds} seeds (training set, first weights, "
            f"batches); {size} training examples a domain, {config.steps} steps. The "
            f"target's validation examples ({config.val_size}) choose the step (and λ, "
            "and the learning rates of STL and EW) for all rows but ForkMerge's, which "
            "are the last merge; it uses them for the merge weights.",
            "",
        ]
    pairs = pair_gains(rows, config) if of(rows, part="pairs") else {}
    if pairs:
        lines += [
            "## One auxiliary at a time",
            "",
            *pairs_text(pairs),
            "",
            "Transfer gain: test accuracy minus that of STL with the same seed, in "
            "points, mean over seeds; significant: paired t-test over seeds, "
            "two-sided, p < 0.05, not corrected for the number of pairs. All pairs: "
            "`pairs.png`.",
            "",
        ]
    if of(rows, part="intervals"):
        lines += [
            "## Steps between merges, ForkMerge with two branches",
            "",
            *intervals_text(interval_gains(rows, config), config),
            "",
            "Gain over STL with the same seed, in points of test accuracy.",
            "",
        ]
    if of(rows, part="shared"):
        lines += [
            "## One input, three tasks (multidigits), each in turn the target",
            "",
            tables.markdown_table(
                make_table(rows, config, "shared"),
                columns_of(shared.TASKS),
                digits=digits_of(shared.TASKS),
                exclude=[LABELS["stl"]],
            ),
            "",
            "Test accuracy in percent on left and right, percent of the variance that "
            f"is explained on ink; {config.shared_train_size} training canvases.",
            "",
        ]
    return lines


def write_table(rows: Rows, config: Config, command: str) -> pathlib.Path:
    """``table.md``: the command, the tables, the versions."""
    about = training.environment()
    about = {**about.pop("versions"), **about}
    lines = [
        "# ForkMerge",
        "",
        f"`{command}`",
        "",
        *sections(rows, config),
        "| " + " | ".join(about) + " |",
        "|" + ":--|" * len(about),
        "| " + " | ".join(str(v) for v in about.values()) + " |",
        "",
    ]
    path = config.out / "table.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_rows(rows: Rows, config: Config) -> pathlib.Path:
    """``results.jsonl``: first what made them, then a line a reported run."""
    path = config.out / "results.jsonl"
    about = {"config": training.to_json(config), **training.environment()}
    about["config"].pop("data_dir")
    with path.open("w", encoding="utf-8") as file:
        for row in [about, *rows]:
            file.write(json.dumps(training.to_json(rounded(row))) + "\n")
    return path


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Seven digits are all there is in a float32."""
    short = lambda x: float(f"{x:.7g}") if isinstance(x, float) else x
    return jax.tree.map(short, dict(row), is_leaf=lambda x: x is None)


def transfer(rows: Rows, config: Config) -> dict[str, Any]:
    """Gain and discrepancy over λ at the last step, ``[targets, L]``, seed means."""
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
    """Transfer gain and discrepancy over λ, a line per target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2)
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
        axis.grid(color="#E6E6E6")
        axis.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def pairs_figure(pairs: Mapping[str, Pairs], domains: Sequence[str]) -> Any:
    """Transfer gain of every pair, a matrix a method, as the paper's Figure 5."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(4.3 * len(pairs) + 0.8, 3.9), layout="constrained", dpi=150
    )
    axes = figure.subplots(1, len(pairs), squeeze=False)[0]
    most = max(float(np.nanmax(np.abs(found.gains))) for found in pairs.values())
    image: Any = None
    for axis, (method, found) in zip(axes, pairs.items(), strict=True):
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


def intervals_figure(found: Mapping[int, np.ndarray], domains: Sequence[str]) -> Any:
    """Gain over Δt, a line a target and their mean, as the paper's Figure 7."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained", dpi=150)
    axis = figure.subplots()
    intervals = list(found)
    gains = np.stack([found[i] for i in intervals])  # [Δt, seeds, targets]
    for t, domain in enumerate(domains):
        look = plots.style(domain, list(domains))
        axis.plot(
            intervals, gains[..., t].mean(1), label=domain, marker="o", ms=3, **look
        )
    means = gains.mean(2)
    axis.errorbar(
        intervals,
        means.mean(1),
        means.std(1, ddof=1) if means.shape[1] > 1 else None,
        label="mean of targets ± sd",
        color="black",
        linewidth=2,
        capsize=3,
    )
    axis.axhline(0, color="#777777", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(intervals, [str(i) for i in intervals])
    axis.minorticks_off()
    axis.set_xlabel("Δt, steps between merges")
    axis.set_ylabel("gain over STL, points (test)")
    axis.grid(color="#E6E6E6")
    axis.set_axisbelow(True)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def weights_figure(rows: Rows, config: Config) -> Any:
    """Merge weight of the branch with auxiliaries, merge by merge, a panel a target.

    At the smallest Δt there is: the paper's Figure 9. A thin line is a seed.
    """
    from matplotlib.figure import Figure

    mine = [
        row
        for row in of(rows, method="forkmerge")
        if row["part"] in ("table", "intervals")
    ]
    interval = min(row["interval"] for row in mine)
    count = len(config.domains)
    figure = Figure(figsize=(2.0 * count + 1.0, 2.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis, target in zip(axes, config.domains, strict=True):
        found = of(mine, target=target, interval=interval)
        steps, values = plots.curve(
            [{**row, "kind": "eval"} for row in found], "weights", "eval"
        )
        shares = np.asarray(values)[..., 1]  # [seeds, merges]
        look = plots.style(target, list(config.domains))
        for seed in shares:
            axis.plot(steps, seed, color=look["color"], linewidth=0.8, alpha=0.35)
        axis.plot(steps, shares.mean(0), color=look["color"], linewidth=2, marker="o")
        axis.set_title(target, size=10)
        axis.set_xlabel("step")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(color="#E6E6E6")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("Λ of target + all")
    figure.suptitle(
        f"Merge weights, a merge every {interval} steps: seeds and their mean", size=10
    )
    return figure


def write_plots(rows: Rows, kept: Rows, config: Config) -> list[pathlib.Path]:
    """The figures that the rows allow."""
    figures = {}
    if of(rows, part="table", method="forkmerge"):
        figures["weights"] = weights_figure(rows, config)
    if of(rows, part="table", method="lambda_grid"):
        figures["transfer"] = transfer_figure(transfer(rows, config), config.domains)
    if of(rows, part="pairs"):
        figures["pairs"] = pairs_figure(pair_gains(kept, config), config.domains)
    if of(rows, part="intervals"):
        found = interval_gains(kept, config)
        figures["intervals"] = intervals_figure(found, config.domains)
    return [plots.save(f, config.out / f"{name}.png") for name, f in figures.items()]
