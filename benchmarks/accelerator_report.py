"""Numbers that ``benchmarks.accelerator`` derives from its rows.

``python -m benchmarks.accelerator_report`` writes ``results/accelerator.md`` from
``results/accelerator.json``.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
TIMED = ("mlp", "transformer", "resnet18")
LINE = (
    "part",
    "side",
    "check",
    "model",
    "tasks",
    "size",
    "method",
    "engine",
    "strategy",
)
LINE += ("precision",)


def printed(row: Row) -> str:
    """Formats a row as one line."""
    words = [str(row[name]) for name in LINE if row.get(name) is not None]
    for name in ("rel_error", "ms", "compile_s", "peak_mb"):
        if row.get(name) is not None:
            words.append(f"{name}={row[name]:.3g}")
    if row.get("error"):
        words.append(f"ERROR {row['error']}")
    return " ".join(words)


def cells(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Groups the rows with a time by model, size, T and precision."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["part"] in TIMED and row["ms"] is not None:
            key = tuple(row[name] for name in ("model", "size", "tasks", "precision"))
            found.setdefault(key, []).append(row)
    return found


def fastest(rows: list[Row]) -> Row | None:
    """Returns the row with the smallest time."""
    return min(rows, key=lambda row: row["ms"], default=None)


def cell_summary(key: tuple[Any, ...], rows: list[Row]) -> Row:
    """Returns the best engine of a cell, the choice of ``auto``, and TorchJD's ratio.

    The function also writes the regret of ``auto`` into its row.
    """
    ours = [row for row in rows if row["side"] == "mtljax"]
    theirs = [row for row in rows if row["side"] == "TorchJD"]
    exact = [
        row
        for row in ours
        if row["method"] == "upgrad" and row["engine"] in ("stacked", "gramian", "auto")
    ]
    best = fastest([row for row in exact if row["engine"] != "auto"])
    auto = fastest([row for row in exact if row["engine"] == "auto"])
    equal = fastest([row for row in ours if row["method"] == "linear"])
    peer = fastest([row for row in theirs if row["method"] == "upgrad"])
    peer_equal = fastest([row for row in theirs if row["method"] == "linear"])
    found: Row = dict(zip(("model", "size", "tasks", "precision"), key, strict=True))
    if best:
        found |= {
            "best": f"{best['engine']}, {best['strategy']}",
            "best_ms": best["ms"],
        }
    if auto:
        found |= {"auto": auto["auto"], "auto_ms": auto["ms"]}
    if best and auto:
        # `auto` itself may be the fastest, by noise or because it is a third program.
        auto["regret"] = auto["ms"] / best["ms"] - 1
        found["regret"] = auto["regret"]
    if equal:
        found["equal_ms"] = equal["ms"]
        if auto:
            found["overhead"] = auto["ms"] / equal["ms"]
    if peer:
        found |= {"torchjd": peer["engine"], "torchjd_ms": peer["ms"]}
        if auto:
            found["torchjd_over_auto"] = peer["ms"] / auto["ms"]
    if equal and peer_equal:
        found["torch_equal_over_equal"] = peer_equal["ms"] / equal["ms"]
        loss, other = equal["loss"], peer_equal["loss"]
        found["losses_apart"] = abs(loss - other) / max(abs(other), 1e-30)
    return found


def summary_of(rows: list[Row], failed: list[Row]) -> Row:
    """Returns the counts of the checks and one row per timed cell."""
    checks = [row for row in rows if row["part"] in ("smoke", "correctness")]
    errors = [row["rel_error"] for row in checks if row["rel_error"] is not None]
    return {
        "checks": {
            "rows": len(checks),
            "failed": [printed(row) for row in failed],
            "largest_rel_error": max(errors, default=None),
        },
        "cells": [cell_summary(key, each) for key, each in cells(rows).items()],
    }


# --- the page -----------------------------------------------------------------------

RESULTS = pathlib.Path(__file__).parent / "results"
COLUMNS = (
    ("equal weights", ("mtljax", "linear", "losses", "auto")),
    ("Gramian", ("mtljax", "upgrad", "gramian", "auto")),
    ("stacked, vmap", ("mtljax", "upgrad", "stacked", "vmap")),
    ("stacked, map", ("mtljax", "upgrad", "stacked", "map")),
    ("representation", ("mtljax", "upgrad", "representation", "auto")),
    ("reuse, every 16", ("mtljax", "upgrad", "reuse16", "auto")),
    ("TorchJD equal", ("TorchJD", "linear", "backward", None)),
)


def page(found: Row) -> str:
    """Returns the Markdown page of a file."""
    about, rows = found["about"], found["rows"]
    checks = [row for row in rows if row["part"] in ("smoke", "correctness")]
    compared = [row for row in checks if row["rel_error"] is not None]
    within = [row for row in compared if row["rel_error"] <= row["tolerance"]]
    late = [row for row in checks if row["error"]]
    largest = max(row["rel_error"] for row in compared)
    runs = [*about.get("earlier", ()), about]
    started = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    shown = {k: each for k, each in cells(rows).items() if k[-1] == "tf32"}
    complete = [cell_summary(k, each) for k, each in shown.items()]
    regrets = [cell["regret"] for cell in complete if "regret" in cell]
    lines = [
        "# One accelerator",
        "",
        f"`python -m benchmarks.accelerator`, {about['device']}, jax {about['jax']}, "
        f"torch {about['torch']}, TorchJD {about['torchjd']}. {started} of "
        f"together {sum(run['seconds'] for run in runs):.0f} s. The rows of this "
        f"library are from {about['commit'][:7]}; those of TorchJD can be from any of "
        "the runs.",
        "",
        f"**Correctness.** {len(compared)} comparisons with the CPU in float64 "
        "(methods that sample numbers: float32), of "
        f"which {len(within)} are within their tolerance. The largest relative error "
        f"is {largest:.1e}. {len(late) or 'No'} jobs or cases had no time left.",
        "",
        "**Steps** with UPGrad, in ms (median). Matrix products use TF32. Cells "
        "without a number were not compiled within the time of the run. The last two "
        "columns are the fastest of TorchJD's ways to compute UPGrad, and its time "
        'divided by that of `engine="auto"`. In the '
        f'{len(regrets)} cells with all engines, `engine="auto"` takes at most '
        f"{max(regrets, default=0):.0%} more time than the fastest one.",
        "",
        "| model | T | "
        + " | ".join(name for name, _ in COLUMNS)
        + " | TorchJD | ratio |",
        "|:--|--:|" + "--:|" * (len(COLUMNS) + 2),
    ]
    for key, each in shown.items():
        model, size, tasks, _ = key
        times = {
            (row["side"], row["method"], row["engine"], row["strategy"]): row["ms"]
            for row in each
        }
        summary = cell_summary(key, each)
        fields = [times.get(column) for _, column in COLUMNS]
        fields += [summary.get("torchjd_ms")]
        texts = ["" if ms is None else f"{ms:.3g}" for ms in fields]
        ratio = summary.get("torchjd_over_auto")
        texts.append("" if ratio is None else f"{ratio:.1f}")
        lines.append(f"| {model}, {size} | {tasks} | " + " | ".join(texts) + " |")
    lines += [
        "",
        "**Compilation** in seconds, up to sixteen programs at the same time, so that "
        "one program alone takes less:",
        "",
        "| model | T | equal weights | Gramian | stacked, vmap | stacked, map |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for (model, size, tasks, _), each in shown.items():
        seconds = {
            (row["side"], row["method"], row["engine"], row["strategy"]): row
            for row in each
        }
        found_rows = [seconds.get(column) for _, column in COLUMNS[:4]]
        if any(found_rows):
            texts = ["" if not row else f"{row['compile_s']:.1f}" for row in found_rows]
            lines.append(f"| {model}, {size} | {tasks} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, *memory(rows)]) + "\n"


def memory(rows: list[Row]) -> list[str]:
    """Returns the lines of the table of the peak memory."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        if row["part"] == "peaks" and row["peak_mb"] is not None:
            key = row["model"], row["size"], row["tasks"]
            found.setdefault(key, {})[row["engine"]] = row["peak_mb"]
    lines = [
        "",
        "**Memory**: the largest amount that the allocator held, in MiB.",
        "",
        "| model | T | equal weights | Gramian | stacked, vmap |",
        "|:--|--:|--:|--:|--:|",
    ]
    for (model, size, tasks), peaks in found.items():
        engines = ("losses", "gramian", "stacked")
        texts = [f"{peaks[e]:.0f}" if e in peaks else "" for e in engines]
        lines.append(f"| {model}, {size} | {tasks} | " + " | ".join(texts) + " |")
    return lines


def main() -> None:
    """Writes the page."""
    found = json.loads((RESULTS / "accelerator.json").read_text())
    (RESULTS / "accelerator.md").write_text(page(found))


if __name__ == "__main__":
    main()
