"""Writes ``experiments/RESULTS.md`` from the rows and the claims.

Usage: ``python -m experiments.common.results [--check]``. A claim without rows of this
protocol is inconclusive and shows no number. With ``--check`` no file is written, and
the exit status is 1 if the page differs from the rows.
"""

import math
import pathlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common import board, claims
from experiments.common.claims import ROOT, Decision, Paper
from experiments.common.provenance import SCHEMA
from experiments.common.report import chance, markdown, read_rows

PAPERS = ("alternating", "trajectories", "igb", "fs_mtl", "forkmerge")
PAGE = ROOT / "RESULTS.md"
UNDECIDED = "Undecided: compare both on your own validation data."
CONTROLS = ("ours", "implied")
WRITTEN = "<!-- Written by python -m experiments.common.results; do not edit. -->"
READING = """\
An effect is the row minus the row that it is compared with, as `claims.toml` names
them; a ratio where logarithms are compared; or a share of items. Intervals are at
95 %, simultaneous for the claims of a family, and p is adjusted for the family. A claim
is reproduced if its interval excludes zero on the claimed side and the mean reaches the
smallest effect of interest. It is contradicted if the whole interval lies below half of
the paper's effect, or below the effect that `claims.toml` states instead. Otherwise it
is inconclusive. A row is not converged if it chose an end of its grid, or if most of
its seeds report one of their last two evaluations: it still improves. A claim about
such a row can be reproduced at this length of training, but not contradicted. A verdict
holds for its scope only."""
NOT_TESTED = (
    "NYUv2, Cityscapes and other dense prediction from pretrained networks",
    "CelebA and other sets of hundreds of thousands of images",
    "DomainNet and AliExpress",
    "GLUE and other language tasks",
    "QM9 in full",
)


class Rows(NamedTuple):
    """Rows of an experiment that were run with this protocol."""

    lines: list[Mapping[str, Any]]
    files: list[pathlib.Path]
    committed: bool  # whether no header has uncommitted changes


def protocol_rows(paper: Paper, root: pathlib.Path = ROOT) -> Rows:
    """Returns the lines of the files whose header names the present claims."""
    digest, lines, files, committed = claims.claims_digest(paper), [], [], True
    for path in sorted((root / paper.experiment / "results").rglob("results.jsonl")):
        head, rows = read_rows(path)
        if head.get("schema") == SCHEMA and head.get("claims") == digest:
            lines += rows
            files.append(path.relative_to(root))
            committed &= bool(head["commit"]) and not head["dirty"]
    return Rows(lines, files, committed)


# --- numbers ------------------------------------------------------------------------


def number(value: float) -> str:
    """Formats three significant digits, without an exponent if possible.

    Examples:
      >>> [number(x) for x in (1.3, -0.0047, 86.66, 123456.0)]
      ['1.3', '-0.0047', '86.7', '123000']
    """
    if not value:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    shown = f"{round(value, digits):.{max(digits, 0)}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def effect(decision: Decision) -> str:
    """Formats our effect with the deciding interval, as a ratio for logarithms."""
    claim, evidence = decision.claim, decision.evidence
    if evidence is None:
        return "-"
    ends = sorted(claim.direction * x for x in (evidence.low, evidence.high))
    values = [claim.direction * evidence.mean, *ends]
    values = [x + claim.reference for x in values]
    if claim.log:
        values = [math.exp(x) for x in values]
    mean, low, high = map(number, values)
    return f"{mean} [{low}, {high}]"


def papers_number(decision: Decision) -> str:
    """Formats the paper's effect and its place in the paper."""
    claim = decision.claim
    if claim.paper_effect is None:
        return claim.paper
    value = claim.paper_effect
    if claim.kind in ("count", "interior"):
        value += claim.reference
    shown = number(math.exp(value) if claim.log else value)
    return f"{shown} ({claim.paper})"


def sentence(decision: Decision) -> str:
    """Returns the recommendation of a decision."""
    found = {
        "reproduced": decision.claim.practice,
        "contradicted": decision.claim.instead,
    }
    return found.get(decision.verdict.word, UNDECIDED)


def said(decision: Decision) -> str:
    """Formats the verdict, and for an open one the effect that these runs detect."""
    verdict, evidence = decision.verdict, decision.evidence
    detectable = math.nan if evidence is None else evidence.detectable
    if verdict.word == "inconclusive" and not math.isnan(detectable):
        return f"{verdict}; detectable: {number(detectable)}"
    return str(verdict)


# --- the page -----------------------------------------------------------------------


def tally(decisions: Sequence[Decision]) -> str:
    """Counts the claims of each verdict.

    Examples:
      >>> tally([])
      '0 reproduced, 0 contradicted, 0 inconclusive (0 of them not run)'
    """
    words = Counter(decision.verdict.word for decision in decisions)
    absent = sum(decision.verdict.addition == claims.NOT_RUN for decision in decisions)
    return (
        f"{words['reproduced']} reproduced, {words['contradicted']} contradicted, "
        f"{words['inconclusive']} inconclusive ({absent} of them not run)"
    )


def section(paper: Paper, rows: Rows, decisions: Sequence[Decision]) -> list[str]:
    """Formats title, three sentences and the table of a paper."""
    body = [
        [
            f"`{found.claim.id.partition('.')[2]}`: {found.claim.text}",
            papers_number(found),
            effect(found),
            found.evidence.n if found.evidence else "",
            chance(found.p_adjusted) if found.evidence else "",
            said(found),
            found.claim.scope,
            sentence(found),
        ]
        for found in decisions
    ]
    links = ", ".join(f"[{file}]({file})" for file in rows.files) or "none"
    note = "" if rows.committed else " Some of them are uncommitted."
    head = ("claim", "paper", "ours", "n", "adjusted p", "verdict", "scope", "advice")
    return [
        f"## {paper.title}",
        f"{paper.authors}, [{paper.link}]({paper.link}); "
        f"[claims]({paper.experiment}/claims.toml), "
        f"[experiment]({paper.experiment}/README.md).",
        f"- The paper: {paper.claims}\n"
        f"- Here: {tally(decisions)}.\n"
        f"- What would change the verdicts: {paper.change}",
        markdown(head, body, left=len(head)),
        f"Rows: {links}.{note}",
    ]


def summary(decisions: Sequence[Decision]) -> str:
    """Formats the numbers of verdicts and the recommendation."""
    advice = "The last column of the tables says what a user does after each verdict."
    if all(decision.verdict.word == "inconclusive" for decision in decisions):
        advice = (
            "No claim is decided yet: tune the learning rate and one set of static "
            "weights first, and compare on your own validation data."
        )
    return f"Of {len(decisions)} claims: {tally(decisions)}. {advice}"


def page(root: pathlib.Path = ROOT) -> str:
    """Returns the whole page."""
    parts, everything = [], []
    for name in PAPERS:
        paper = claims.load_claims(claims.claims_path(name))
        rows = protocol_rows(paper, root)
        decisions = claims.decide(paper, rows.lines)
        everything += decisions
        parts += section(paper, rows, decisions)
    controls = "\n".join(
        f"- `{d.claim.id}`: {d.claim.text} {str(d.verdict).capitalize()}."
        for d in everything
        if d.claim.paper in CONTROLS
    )
    missing = "\n".join(f"- {text}" for text in NOT_TESTED)
    parts = ["# Results", WRITTEN, summary(everything), READING, *parts]
    found = board.read(root / "leaderboard" / "results")
    if found:
        parts += ["## Leaderboard of methods", "\n".join(board.summary(found))]
    parts += ["## Controls that the papers lack", controls]
    return "\n\n".join([*parts, "## Not tested", missing]) + "\n"


def main(check: bool = False) -> None:
    """Writes the page.

    Args:
      check: Whether to compare with the existing page instead of writing it.
    """
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE)
    elif not PAGE.is_file() or PAGE.read_text("utf-8") != text:
        print("RESULTS.md is not what the rows say; write it again.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
