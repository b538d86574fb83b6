"""Builds tables and answers from the rows. Does not train or draw figures."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.common import report as common
from experiments.common.report import Column, Report, markdown, pm
from experiments.common.selection import Choice, select
from experiments.common.statistics import comparison_table
from experiments.fs_mtl import paper
from experiments.fs_mtl.config import (
    BALANCERS,
    NATIVE,
    STL,
    Config,
    Entry,
    entries,
)

Rows = Sequence[Mapping[str, Any]]
SINGLE = ("STL", "F-STL")
"""Lines of single-task networks, which are not compared."""


class Runs(NamedTuple):
    """Rows and measurements on one data set."""

    name: str
    tasks: tuple[str, ...]
    rows: dict[Entry, Rows]
    radii: dict[Entry, dict[float | None, Rows]]  # all that were tried
    steps_per_epoch: int


def choose_radius(found: Mapping[Entry, Rows]) -> tuple[Choice, Rows]:
    """The radius by validation, as its learning rate, and the rows at it."""
    tagged = [
        {**row, "lr": entry.rho}
        for entry, rows in found.items()
        for row in rows
        if row["kind"] == "eval"
    ]
    choice = select(tagged)
    best = next(rows for e, rows in found.items() if e.rho == choice.lr)
    about = {"rho": choice.lr, "edge": choice.edge}
    return choice, [{**row, **about} for row in best]


def at_lengths(
    config: Config, entry: Entry, rows: Rows, epoch: int
) -> dict[Entry, Rows]:
    """A line at each of its lengths, by the epochs it ran."""
    longer = {2: "plain2", 4: "plain4"}
    return {
        entry._replace(variant=longer.get(times, entry.variant)): [
            row for row in rows if row["step"] <= times * config.epochs * epoch
        ]
        for times in entry.lengths(config)
    }


def chosen(rows: Rows) -> list[dict[str, Any]]:
    """Returns the row of each seed at the epoch selected by validation."""
    return select(rows).rows


def last(rows: Rows) -> list[dict[str, Any]]:
    """Returns the last evaluation of each seed."""
    return select(rows).last


def lines(runs: Runs) -> dict[str, list[Entry]]:
    """Groups entries by table line. The two single-task runs form one line."""
    found: dict[str, list[Entry]] = {}
    for entry in runs.rows:
        found.setdefault(entry.label, []).append(entry)
    return {
        label: group
        for label, group in found.items()
        if group[0].method != STL or len(group) == 2
    }


def column(
    runs: Runs, group: list[Entry], metric: str, task: int, *, at=chosen
) -> np.ndarray:
    """Returns a metric of a task over seeds, from the entry that trained the task."""
    entry = group[0] if len(group) == 1 else group[task]
    return np.array(
        [row[f"test_{runs.tasks[task]}_{metric}"] for row in at(runs.rows[entry])]
    )


def accuracy(runs: Runs, group: list[Entry], *, at=chosen) -> np.ndarray:
    """Returns the mean accuracy of the tasks in percent, over seeds."""
    each = [column(runs, group, "acc", task, at=at) for task in (0, 1)]
    return 100 * np.mean(each, axis=0)


def table_rows(runs: Runs) -> dict[str, dict[str, Any]]:
    """Returns the values of all lines over seeds."""
    body = {}
    for label, group in lines(runs).items():
        one, two = (100 * column(runs, group, "acc", task) for task in (0, 1))
        row: dict[str, Any] = {
            runs.tasks[0]: one,
            runs.tasks[1]: two,
            "average": accuracy(runs, group),
            "last epoch": accuracy(runs, group, at=last),
        }
        for metric in ("ece", "brier", "entropy"):
            each = [column(runs, group, metric, task) for task in (0, 1)]
            row[metric] = np.mean(each, axis=0)
        if len(group) == 1:
            probed = [r for r in runs.rows[group[0]] if "probe_inter_loss" in r]
            for name in ("inter_loss", "inter_flat", "intra"):
                shares = [100 * found[f"probe_{name}"] for found in last(probed)]
                row[name.replace("_", "-")] = shares
        row["backward passes"] = sum(entry.backward_passes for entry in group)
        body[label] = row
    return body


def make_report(runs: Runs) -> Report:
    """The table of all lines."""
    neutral = ("inter-loss", "inter-flat", "intra", "backward passes")
    best = (*runs.tasks, "average", "last epoch")
    columns: dict[str, Column] = dict.fromkeys(best, ("max", 2))
    columns |= {"ece": ("min", 4), "brier": ("min", 4), "entropy": ("", 3)}
    return Report(columns | dict.fromkeys(neutral, ("", 0)), table_rows(runs))


def beside_paper(runs: Runs) -> str:
    """Formats our averages and gains and the published ones (Tables 1 and 6)."""
    groups = lines(runs)
    head = ["line", "ours, average", "ours, F - X", "paper, average", "paper, F - X"]
    body = []
    for label, group in groups.items():
        ours = accuracy(runs, group)
        base = re.sub("^(F-|direct |SAMO-|second-aggre |each-aggre )", "", label)
        gain = theirs = "-"
        if base != label and base in groups:
            gain = pm(ours - accuracy(runs, groups[base]))
        cell, plain = (paper.published(runs.name, x) for x in (label, base))
        if base != label and cell and plain:
            theirs = f"{cell.average - plain.average:+.2f}"
        shown = "-" if cell is None else f"{cell.average:.2f}"
        if cell is not None and cell.sd is not None:
            shown += f" ± {cell.sd:.2f}"
        body.append([label, pm(ours), gain, shown, theirs])
    return markdown(head, body)


def _pairs(runs: Runs, one: str, two: str) -> np.ndarray | None:
    """Returns differences in points of accuracy, paired by seed."""
    groups = lines(runs)
    if one not in groups or two not in groups:
        return None
    return accuracy(runs, groups[one]) - accuracy(runs, groups[two])


def _labels(config: Config) -> list[str]:
    known = (*BALANCERS, NATIVE)
    return [Entry(m, "plain").label for m in known if m in config.methods]


def caution_1(config: Config, runs: Runs) -> str:
    """Tests the effect of the split at equal radius, norm and adaptivity."""
    head = ["balancer", "split - direct", "direct - plain", "split - plain"]
    head.append("paper's split - direct")
    body, means = [], []
    for base in _labels(config):
        split, direct = f"F-{base}", f"direct {base}"
        pairs = ((split, direct), (direct, base), (split, base))
        found = [_pairs(runs, *pair) for pair in pairs]
        if found[0] is not None and base != Entry(NATIVE, "plain").label:
            means.append(found[0])
        one, two = (paper.published(runs.name, x) for x in (split, direct))
        theirs = f"{one.average - two.average:+.2f}" if one and two else "-"
        cells = ["-" if points is None else pm(points) for points in found]
        body.append([base, *cells, theirs])
    text = markdown(head, body)
    if means:
        everything = np.mean(means, axis=0)  # a balancer is no run of its own
        text += (
            "\n\nThe mean over balancers of degree 0 or 1, by seed: split - direct = "
            f"{pm(everything)} points (n = {len(everything)}; "
            f"{(everything > 0).sum()} positive)."
        )
    return text


def caution_2(config: Config, runs: Runs) -> str:
    """Measures the share of the gain that needs a balancer."""
    wanted = [("F-STL", "STL"), ("F-LS", "LS"), ("RLW+SAM", "LS"), ("RLW+SAM", "F-LS")]
    for base in _labels(config):
        wanted += [(f"F-{base}", base), (f"F-{base}", "F-LS"), (base, "LS")]
    found = {" - ".join(pair): _pairs(runs, *pair) for pair in wanted}
    body = [[name, pm(x)] for name, x in found.items() if x is not None]
    return markdown(["comparison", "points of accuracy"], body)


def conflict_table(runs: Runs, kind: str, head: str) -> str:
    """Formats the percentage of probe batches in conflict over epochs."""
    shares = conflict_shares(runs, kind)
    epochs = sorted({epoch for found in shares.values() for epoch in found})
    if not epochs:
        return ""
    body = [
        [label, *(pm(found[e], 0) if e in found else "-" for e in epochs)]
        for label, found in shares.items()
    ]
    return markdown([head, *(f"epoch {e}" for e in epochs)], body)


def radius_table(runs: Runs) -> str:
    """Markdown: accuracy on validation and test at every radius that was tried."""
    tried_radii = {rho for tried in runs.radii.values() for rho in tried}
    radii = sorted(rho for rho in tried_radii if rho is not None)

    def cell(rows: Rows, split: str) -> str:
        return pm([100 * row[f"{split}_score"] for row in chosen(rows)])

    body = [
        [f"{entry.label}, {split}", *(cell(tried[rho], split) for rho in radii)]
        for entry, tried in runs.radii.items()
        for split in ("val", "test")
    ]
    head = ["line", *(f"radius {rho:g}" for rho in radii)]
    return markdown(head, body) if body else ""


def intra_conflict(runs: Runs, entry: Entry) -> float:
    """Share of probe batches with a conflict inside a task, first half of the run."""
    found = [row for row in runs.rows[entry] if "probe_intra" in row]
    end = max((row["step"] for row in found), default=0)
    values = [row["probe_intra"] for row in found if row["step"] <= end / 2]
    return float(np.mean(values)) if values else math.nan


def premise(runs: Runs) -> str:
    """The premise of the claim on the split: conflict inside a task of plain lines."""
    shares = {
        entry.label: intra_conflict(runs, entry)
        for entry in runs.rows
        if entry.variant == "plain" and entry.method != STL
    }
    return ", ".join(f"{label} {100 * x:.0f} %" for label, x in shares.items())


def at_passes(found: Mapping[str, np.ndarray], base: str) -> str | None:
    """The plain line with the backward passes of an F-line, as far as it was run."""
    wanted = f"{base}, {4 if base == 'LS' else 2}x epochs"
    return wanted if wanted in found else None


def comparisons(runs: Runs) -> list[str]:
    """The paired differences that claims are about."""
    groups = {label: g for label, g in lines(runs).items() if len(g) == 1}
    found = {label: accuracy(runs, group) for label, group in groups.items()}
    ece = {
        label: np.mean([column(runs, g, "ece", task) for task in (0, 1)], 0)
        for label, g in groups.items()
    }
    bases = [base for base in found if f"F-{base}" in found]
    if not bases or len(found[bases[0]]) < 2:
        return []
    flat = [f"F-{base}" for base in bases]
    mean = lambda table, labels: np.mean([table[label] for label in labels], 0)
    pairs = {"F-X - X, mean": (mean(found, bases), mean(found, flat))}
    equal = [at_passes(found, base) for base in bases]
    if all(equal):
        longer = [label for label in equal if label]
        pairs["F-X - X at equal passes, mean"] = mean(found, longer), mean(found, flat)
    wanted = [(f"F-{base}", base) for base in bases]
    wanted += [(f"F-{b}", at) for b, at in zip(bases, equal, strict=True) if at]
    wanted += [(f"F-{base}", f"direct {base}") for base in bases]
    wanted += [("F-CAGrad", "F-LS"), ("RLW+SAM", "F-CAGrad")]
    for one, two in wanted:
        if one in found and two in found:
            pairs[f"{one} - {two}"] = found[two], found[one]
    parts = ["Points of accuracy:", comparison_table(pairs)]
    calibration = {"F-X - X, mean": (mean(ece, bases), mean(ece, flat))}
    parts += ["Expected calibration error:", comparison_table(calibration, digits=4)]
    shares = conflict_shares(runs)
    common_ = [base for base in bases if base in shares and f"F-{base}" in shares]
    by_epoch = {
        f"F-X - X, mean, epoch {epoch}": (
            np.mean([shares[base][epoch] for base in common_], 0),
            np.mean([shares[f"F-{base}"][epoch] for base in common_], 0),
        )
        for epoch in (shares[f"F-{common_[0]}"] if common_ else ())
        if all(epoch in shares[base] for base in common_)
    }
    if by_epoch:
        parts += ["Batches with a conflict of tasks, points:"]
        parts += [comparison_table(by_epoch, digits=1)]
    return parts


def conflict_shares(
    runs: Runs, kind: str = "inter_loss"
) -> dict[str, dict[int, np.ndarray]]:
    """Label -> epoch -> percent of probe batches in conflict, over seeds."""
    name, found = f"probe_{kind}", dict[str, dict[int, np.ndarray]]()
    for entry, rows in runs.rows.items():
        mine = [row for row in rows if name in row]
        for step in sorted({row["step"] for row in mine}):
            values = [100 * row[name] for row in mine if row["step"] == step]
            epoch = step // runs.steps_per_epoch
            found.setdefault(entry.label, {})[epoch] = np.array(values)
    return found


def write(config: Config, runs: Runs, command: str, notes: str) -> list[pathlib.Path]:
    """Writes ``<set>/table.md``, and ``<set>/results.jsonl`` with lines of results."""
    missing = [e.label for e in entries(config) if e not in runs.rows]
    ball = "adaptive" if config.adaptive else "not adaptive"
    radii = ", ".join(f"{rho:g}" for rho in config.rhos)
    parts = [
        f"# {runs.name}: {len(lines(runs))} lines, {config.seeds} seeds",
        f"`{command.replace(' --report-only', '')}`",
        f"Data: {notes}. Model {config.model}, {config.epochs} epochs of "
        f"{runs.steps_per_epoch} steps, Adam {config.lr:g}, batch size "
        f"{config.batch_size}. SAM: {ball}, {config.norm} norm; validation picks one "
        f"of the radii {radii} for each F-line, and other orders of the same balancer "
        "have it.",
        f"Not finished: {', '.join(missing)}." if missing else "",
        make_report(runs).markdown(exclude=SINGLE),
        "Accuracy in percent on the test split, mean ± sd over seeds, at the epoch "
        "that validation chose (the paper chose on the test set); bold is the best of "
        "the multi-task lines. ECE, Brier score and predictive entropy (nats) at that "
        "epoch. Conflict: percent of the probe's training batches at its last "
        "measurement. Backward passes through the trunk are those of a step.",
        "## Differences, paired over seeds",
        *comparisons(runs),
        f"Conflict inside a task, mean of the first half of training: {premise(runs)}. "
        "Below 10 % the claim about the split is not tested.",
        "## Comparison with the paper (Tables 1 and 6)",
        beside_paper(runs),
        "Levels differ by construction (another re-creation of the data, another "
        "network and length where the preset says so): compare the gains.",
        "## Caution 1: is it the split, at equal radius?",
        caution_1(config, runs),
        "For a linear balancer split and direct are the same numbers (F-LS has no "
        "direct line of its own). The paper's direct run is not known to use the "
        "radius of its split run.",
        "## Caution 2: how much needs a balancer?",
        caution_2(config, runs),
        "## Conflict while training",
        conflict_table(runs, "inter_loss", "⟨g₁, g₂⟩ < 0, % of batches"),
        f"Paper, Multi-MNIST: plain {paper.CONFLICT['plain']}, "
        f"F- {paper.CONFLICT['split']} (epoch: percent).",
        conflict_table(runs, "intra", "⟨gᵢ, hᵢ⟩ < 0, % of batches and tasks"),
        "## Radii",
        radius_table(runs),
    ]
    return common.write(
        config.folder(runs.name), config, result_lines(runs, config.study), parts
    )


def result_lines(runs: Runs, study: str = "") -> list[dict[str, Any]]:
    """Lines by entry, seed and column; last those of all radii, as a study."""
    lines: list[dict[str, Any]] = []
    for entry, rows in runs.rows.items():
        about: dict[str, Any] = {"study": study} if study else {}
        plain = entry._replace(variant="plain")
        if plain in runs.rows:
            about["plain_intra_conflict"] = intra_conflict(runs, plain)
        lines += _lines_of(runs, entry, rows, about)
    for entry, tried in runs.radii.items():
        for rho, rows in tried.items():
            lines += _lines_of(runs, entry, rows, {"study": "radii", "rho": rho})
    return lines


def _lines_of(
    runs: Runs, entry: Entry, rows: Rows, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    lines = []
    for row, end in zip(chosen(rows), last(rows), strict=True):
        probed = [
            r["probe_inter_loss"]
            for r in rows
            if r.get("seed") == row["seed"] and "probe_inter_loss" in r
        ]
        mine = {
            "set": runs.name,
            "entry": entry.name,
            "label": entry.label,
            "row": entry.label,
            "late": select(rows).late,
            "backward_passes": entry.backward_passes,
            "conflict_share": 100 * float(np.mean(probed)) if probed else None,
        }
        for column, at in (("chosen", row), ("last", end)):
            ece = [v for k, v in at.items() if k.endswith("_ece")]
            more = {"column": column, "test_accuracy": 100 * at["test_score"]}
            more["test_ece"] = np.mean(ece)
            lines.append({**mine, **about, **at, **more})
    return lines
