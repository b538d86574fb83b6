"""Reads the committed leaderboard, for ``RESULTS.md`` and the site.

The report of the leaderboard writes ``experiments/leaderboard/results``. This module
reads ``leaderboard.json`` and ``header.json``, and needs no rows and no data.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from experiments.common.claims import ROOT
from experiments.common.report import markdown

FOLDER = ROOT / "leaderboard" / "results"
PAGE = "leaderboard/results/LEADERBOARD.md"
SHOWN = ("equal weights", "equal weights, other seeds", "static-5", "static-25")
"""Controls that the short table has in addition to the methods."""
HEAD = (
    "row",
    "Δm % [95 %]",
    "sets better / worse than equal weights",
    "p",
    "step time",
)


def read(folder: pathlib.Path = FOLDER) -> dict[str, Any] | None:
    """Returns the content of ``leaderboard.json``, or None if there is no such file.

    The entry ``dirty`` says whether the report was written with uncommitted changes.
    """
    path = folder / "leaderboard.json"
    if not path.is_file():
        return None
    head = json.loads((folder / "header.json").read_text("utf-8"))
    found = json.loads(path.read_text("utf-8"))
    return {**found, "dirty": bool(head["dirty"]) or not head["commit"]}


def number(value: float | None) -> str:
    """Formats a Δm with its sign.

    Examples:
      >>> number(-0.02), number(3.14), number(None)
      ('0.0', '+3.1', '-')
    """
    if value is None:
        return "-"
    shown = round(value, 1)
    return f"{shown:+.1f}" if shown else "0.0"


def line(entry: Mapping[str, Any], name: str) -> list[str]:
    """Formats a row of the short table."""
    equal, ratio = entry.get("equal"), entry.get("step_ratio")
    return [
        name,
        f"{number(entry['delta_m'])} [{number(entry['low'])}, {number(entry['high'])}]",
        f"{equal['better']} / {equal['worse']}" if equal else "",
        f"{equal['adjusted']:.2g}" if equal else "",
        f"x{ratio:.2g}" if ratio else "",
    ]


def summary(
    found: Mapping[str, Any],
    page: str = PAGE,
    name: Callable[[Mapping[str, Any]], str] = lambda entry: entry["label"],
) -> list[str]:
    """Formats the answer, the short table and the first conclusions.

    Args:
      found: From :func:`read`.
      page: Link to the whole page.
      name: Name of a row in the first column.

    Returns:
      Lines of Markdown.
    """
    rows = [
        entry
        for entry in found["rows"]
        if entry["kind"] in ("method", "external") or entry["row"] in SHOWN
    ]
    rows = sorted(rows, key=lambda entry: entry["delta_m"])
    done, count = found["jobs"]["done"], found["jobs"]["all"]
    state = "" if done == count else f" Incomplete: {done} of {count} jobs."
    state += " The report is uncommitted." if found["dirty"] else ""
    return [
        found["answer"] + state,
        "",
        *(f"- {text}" for text in found["conclusions"]),
        "",
        *markdown(HEAD, [line(entry, name(entry)) for entry in rows]).split("\n"),
        "",
        "Δm is the change of the test error against single-task networks, mean over "
        f"{len(found['sets'])} sets ({', '.join(found['sets'])}); lower is better. "
        "p is that of Wilcoxon's test over sets, with Holm's correction. "
        f"[The whole page]({page}) has the controls, the figures and the limits.",
    ]
