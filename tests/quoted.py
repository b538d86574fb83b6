"""Compares the numbers that a report prints with numbers computed from its rows.

A test of a report names all numbers with a decimal point, in the order of the text. A
number that the report does not explain, or that the rows do not give, therefore fails.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.common import claims
from experiments.common.statistics import paired

ROOT = pathlib.Path(__file__).parents[1] / "experiments"
PROSE = re.compile(r"```.*?```|\]\([^)]*\)|`[^`]*`", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\d+\.\d+(?!\w|\.\d)")

Line = Mapping[str, Any]


def text_of(name: str, *, until: str = "") -> str:
    """Returns a report without code, links and the part from ``until`` on."""
    page = (ROOT / name / "README.md").read_text("utf-8")
    if until:
        assert page.count(until) == 1, until
        page = page[: page.index(until)]
    return PROSE.sub(" ", page)


def part(name: str, begin: str, end: str = "") -> str:
    """Returns the text of a report between two marks, or to its end."""
    text = text_of(name)
    assert text.count(begin) == 1, begin
    text = text[text.index(begin) :]
    return text[: text.index(end)] if end else text


def check(text: str, values: Iterable[float | Sequence[float]]) -> None:
    """Asserts that the numbers of a text are these ones, rounded as they are printed.

    Examples:
      >>> check("From -0.5 to +1.25.", [(-0.52, 1.2549)])
    """
    wanted = [float(x) for value in values for x in np.ravel(value)]
    found = list(NUMBER.finditer(text))
    for i, match in enumerate(found):
        word = match.group().replace("\u2212", "-")
        place = " ".join(text[max(0, match.start() - 70) : match.end() + 20].split())
        assert i < len(wanted), f"{word} is one number too many: {place}"
        ulp = 10.0 ** -len(word.partition(".")[2])
        good = abs(float(word) - wanted[i]) <= 0.501 * ulp
        assert good, f"{word} is {wanted[i]:.6g} by the rows: {place}"
    assert len(found) == len(wanted), f"{len(wanted) - len(found)} are not printed"


@functools.cache
def rows_of(path: str) -> list[Line]:
    """Returns the lines of a committed file, relative to ``experiments``."""
    text = (ROOT / path).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()][1:]


def over_seeds(lines: Iterable[Line], metric: str, **where: Any) -> np.ndarray:
    """Returns a metric of the lines that agree with ``where``, by seed ``[n, ...]``.

    Several lines of a seed are averaged. A metric that is a list is averaged, too.
    """
    found: dict[Any, list[float]] = {}
    for line in lines:
        if all(line.get(key) == value for key, value in where.items()):
            found.setdefault(line["seed"], []).append(float(np.mean(line[metric])))
    assert found, f"no line has {where}"
    return np.array([np.mean(found[seed]) for seed in sorted(found)])


def interval(difference: Any, *, sign: float = 1.0) -> tuple[float, float, float]:
    """Returns the mean and the 95 % interval of one comparison, low end first."""
    values = sign * np.asarray(difference, float)
    found = paired(np.zeros(len(values)), values)
    return float(found.mean), float(found.low), float(found.high)


@functools.cache
def decisions(name: str) -> dict[str, claims.Decision]:
    """Returns the verdicts of a report's claims by the last part of their names."""
    paper = claims.load_claims(claims.claims_path(name))
    files = sorted((ROOT / name / "results").rglob("results.jsonl"))
    lines = [line for file in files for line in rows_of(str(file.relative_to(ROOT)))]
    found = claims.decide(paper, lines)
    return {one.claim.id.partition(".")[2]: one for one in found}


def claimed(name: str, claim: str, *, sign: float = 1.0) -> tuple[float, float, float]:
    """Returns a claim's effect and simultaneous interval, as a ratio of logarithms."""
    found = decisions(name)[claim]
    evidence, about = found.evidence, found.claim
    assert evidence is not None
    ends = sorted(about.direction * x for x in (evidence.low, evidence.high))
    values = [x + about.reference for x in (about.direction * evidence.mean, *ends)]
    if about.log:
        values = [math.exp(x) for x in values]
    mean, low, high = (sign * x for x in values)
    return mean, min(low, high), max(low, high)


def chance(name: str, claim: str) -> float:
    """Returns the p-value of a claim, adjusted for its family."""
    return decisions(name)[claim].p_adjusted


def in_paper(name: str, claim: str, *, sign: float = 1.0) -> float:
    """Returns the effect that the paper reports, as a ratio of logarithms."""
    about = decisions(name)[claim].claim
    assert about.paper_effect is not None
    return sign * (math.exp(about.paper_effect) if about.log else about.paper_effect)
