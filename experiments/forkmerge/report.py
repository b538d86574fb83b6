"""From rows to the table and the plots; no training code."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.forkmerge.config import LABELS, Config
from mtljax import forkmerge, metrics, training
from mtljax.training import plots, tables

Rows = Sequence[Mapping[str, Any]]


def chosen(rows: Rows, method: str) -> list[Mapping[str, Any]]:
    """The reported row of every target and seed.

    Of a merge the last; of all others, the step (and λ) that validation likes best,
    which gives these an advantage that ForkMerge does not take.
    """
    found = {}
    for row in rows:
        if row["method"] != method:
            continue
        run = (row["target"], row["seed"])
        rank = row["step"] if method.startswith("forkmerge") else row["val"]
        if run not in found or rank > found[run][0]:
            found[run] = (rank, row)
    return [row for _, row in found.values()]


def values_of(rows: Rows, method: str, config: Config) -> np.ndarray:
    """Test accuracy in percent, ``[seeds, targets]``."""
    picked = {(r["target"], r["seed"]): 100 * r["test"] for r in chosen(rows, method)}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return np.array([[picked[t, s] for t in config.domains] for s in seeds])


def make_table(rows: Rows, config: Config) -> dict[str, dict[str, Any]]:
    """Label -> column -> values over seeds."""
    methods = [m for m in LABELS if any(r["method"] == m for r in rows)]
    values = {m: values_of(rows, m, config) for m in methods}
    baseline = values["stl"].mean(0)
    table = {}
    for method, found in values.items():
        row: dict[str, Any] = dict(zip(config.domains, found.T, strict=True))
        row["average"] = found.mean(1)
        if method != "stl":
            higher = [True] * len(config.domains)
            # The paper prints gains: the larger the better.
            row["gain % over STL"] = -metrics.delta_m(found, baseline, higher)
            row["targets worse than STL"] = float((found.mean(0) < baseline).sum())
        table[LABELS[method]] = row
    return table


def columns_of(config: Config) -> dict[str, Any]:
    """Columns and which way is better."""
    found = dict.fromkeys([*config.domains, "average", "gain % over STL"], "max")
    return found | {"targets worse than STL": "min"}


DIGITS = {"gain % over STL": 2, "targets worse than STL": 0}


def digits_of(config: Config) -> dict[str, int]:
    """Digits after the point of every column."""
    return dict.fromkeys([*config.domains, "average"], 1) | DIGITS


def write_table(
    table: Mapping[str, Mapping[str, Any]], config: Config, command: str
) -> pathlib.Path:
    """``table.md``: the command, the table, the versions."""
    text = tables.markdown_table(
        table,
        columns_of(config),
        digits=digits_of(config),
        exclude=[LABELS["stl"]],
    )
    about = training.environment()
    about = {**about.pop("versions"), **about}
    lines = [
        f"# Digits of {len(config.domains)} domains, {config.seeds} seeds",
        "",
        f"`{command}`",
        "",
        text,
        "",
        "Test accuracy in percent on the target of each run, mean ± standard deviation "
        f"over seeds; {config.train_size or 'all'} training examples a domain, "
        f"{config.steps} steps. The target's validation examples ({config.val_size}) "
        "choose the step (and λ) that is reported for all rows but ForkMerge's, which "
        "are the last merge; it uses them for the merge weights.",
        "",
        "| " + " | ".join(about) + " |",
        "|" + ":--|" * len(about),
        "| " + " | ".join(str(v) for v in about.values()) + " |",
        "",
    ]
    path = config.out / "table.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_rows(rows: Rows, config: Config) -> pathlib.Path:
    """``results.jsonl``: a line per reported run, with the whole configuration."""
    path = config.out / "results.jsonl"
    about = {"config": training.to_json(config), **training.environment()}
    about["config"].pop("data_dir")
    with path.open("w", encoding="utf-8") as file:
        for method in LABELS:
            for row in chosen(rows, method):
                file.write(json.dumps(training.to_json({**row, **about})) + "\n")
    return path


def transfer(rows: Rows, config: Config) -> dict[str, Any]:
    """Gain and discrepancy over λ at the last step, ``[targets, L]``, seed means."""
    last = config.steps

    def mean(target, method, lam, field):
        found = [
            r[field]
            for r in rows
            if r["step"] == last
            and r["method"] == method
            and r["target"] == target
            and r.get("lambda") == lam
        ]
        return float(np.mean(found))

    lambdas = [None, *config.lambdas]
    method = lambda lam: "stl" if lam is None else "lambda_grid"
    grid = {
        field: np.array(
            [
                [mean(t, method(lam), lam, field) for lam in lambdas]
                for t in config.domains
            ]
        )
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
    axes[0].set_ylabel("transfer gain, points of validation accuracy")
    axes[1].set_ylabel("confidence score discrepancy")
    for axis in axes:
        axis.set_xticks(list(at), [f"{x:g}" for x in found["lambdas"]])
        axis.set_xlabel("auxiliary weight λ")
        axis.grid(color="#E6E6E6")
        axis.set_axisbelow(True)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def weights_figure(rows: Rows, config: Config) -> Any:
    """Merge weights of the target-only branch and of the other, merge by merge."""
    history = {}
    for target in config.domains:
        mine = [r for r in rows if r["method"] == "forkmerge" and r["target"] == target]
        history[target] = plots.curve(
            [{**r, "kind": "eval"} for r in mine], "weights", "eval"
        )
    names = ["target only", "with auxiliaries"]
    return plots.weight_trajectories(history, names, normalise=False)


def write_plots(rows: Rows, config: Config) -> list[pathlib.Path]:
    """The figures that the rows allow."""
    methods = {row["method"] for row in rows}
    written = []
    if "forkmerge" in methods:
        figure = weights_figure(rows, config)
        written.append(plots.save(figure, config.out / "weights.png"))
    if "lambda_grid" in methods:
        figure = transfer_figure(transfer(rows, config), config.domains)
        written.append(plots.save(figure, config.out / "transfer.png"))
    return written
