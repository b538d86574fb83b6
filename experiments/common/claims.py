"""Claims of papers, which are written before the runs, and verdicts.

Each ``experiments/NAME/claims.toml`` names the paper. For each claim it states the two
rows that are compared, the metric, the smallest effect of interest and the effect that
the rows must exclude. :func:`verdict` derives the verdict from these numbers.

Claims read lines of ``results.jsonl`` with these keys:

==========  ====================================================================
``row``     label of the row, as in the tables
``seed``    seed of the run
``column``  ``"chosen"`` (default) or ``"last"``: the step of the numbers
metrics     numbers, or lists of numbers, which are averaged
``edge``    ``"low"`` or ``"high"`` if the row chose an end of its grid of rates
``late``    share of the runs that report one of their last two evaluations
``study``   lines apart from the table; only claims whose ``where`` has it read them
==========  ====================================================================

Several lines of one row and seed (tasks, data sets, targets) are averaged. All seeds
must have the same number of lines.
"""

import dataclasses
import hashlib
import json
import math
import operator
import pathlib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from experiments.common.statistics import (
    benjamini_hochberg,
    holm,
    minimum_detectable,
    paired,
    tost,
)

Kind = Literal["difference", "equivalence", "count", "interior"]
Line = Mapping[str, Any]

ROOT = pathlib.Path(__file__).parents[1]
PROSE = ("paper", "text", "scope", "practice", "instead")
"""Fields that do not affect verdicts and may be reworded after the run."""
HOLM_LIMIT = 10
"""Larger families are screens, which control the false discovery rate."""


class ClaimError(ValueError):
    """A claim is invalid, or the rows do not fit it."""


@dataclasses.dataclass(frozen=True)
class Premise:
    """A condition on the rows that must hold for a claim to be testable.

    Attributes:
      metric: Key of the lines. Its mean is compared with the bounds.
      of: Whether the lines are those of the row or of the row it is compared with.
      at_least: Smallest mean that satisfies the condition.
      at_most: Largest mean that satisfies the condition.
    """

    metric: str
    of: Literal["row", "against"] = "against"
    at_least: float = -math.inf
    at_most: float = math.inf


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of a paper, or our own claim.

    Attributes:
      id: Stable name, ``experiment.claim``.
      paper: Place of the claim in the paper, or ``"ours"`` for our own claim.
      text: The claim in one sentence.
      row: Label of the row, or labels of rows whose effects are averaged. For a slope
        (``at``) or an interior maximum, the rows in order.
      against: Label of the row for comparison, or one label per row. Empty if the
        metric is compared with ``reference``.
      metric: Key of the lines.
      direction: Claimed sign of row minus against, of a slope, or of a share minus
        ``reference``.
      smallest: δ, the smallest effect of interest.
      exclude: κ, the effect that the interval must exclude to contradict the claim.
      family: Claims with a common correction for multiple comparisons.
      scope: Conditions under which the verdict holds.
      practice: Recommendation if the claim is reproduced.
      instead: Recommendation if the claim is contradicted.
      paper_effect: Effect in the paper, in units of the metric.
      kind: ``"difference"``, ``"equivalence"`` to zero, ``"count"`` or ``"interior"``.
        A count is the share of items with a significant difference, or of lines that
        are 1. An interior effect is the share of seeds whose best row is neither the
        first nor the last.
      column: Step of the numbers.
      where: Keys of the selected lines, with a value or a list of values.
      where_against: The keys that differ for the lines compared with.
      log: Whether logarithms are compared, so that effects are log ratios.
      at: Positions of the rows. The effect is the slope of the metric over them.
      along: Key of the lines. The effect is the slope of the metric of one row over the
        decimal logarithm of this key.
      over: Keys that identify the items of a count.
      match: The keys among them that the lines compared with have.
      item: Sign of the difference of a counted item. For an interior maximum, 1 if more
        of the metric is better, and -1 if less is better.
      reference: Number with which the effect is compared.
      premise: Condition that must hold for the claim to be testable.
    """

    id: str
    paper: str
    text: str
    row: tuple[str, ...]
    against: tuple[str, ...]
    metric: str
    direction: int
    smallest: float
    exclude: float
    family: str
    scope: str
    practice: str
    instead: str
    paper_effect: float | None = None
    kind: Kind = "difference"
    column: str = "chosen"
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where_against: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log: bool = False
    at: tuple[float, ...] = ()
    along: str = ""
    over: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    item: int = 1
    reference: float = 0.0
    premise: Premise | None = None


class Paper(NamedTuple):
    """Information about a paper for the page.

    Attributes:
      experiment: Name of the package.
      title: Title of the paper.
      authors: Authors of the paper.
      link: Address of the paper.
      claims: One sentence that summarises the claims.
      change: One sentence on what would change the verdicts.
      entries: The claims.
    """

    experiment: str
    title: str
    authors: str
    link: str
    claims: str
    change: str
    entries: tuple[Claim, ...]


class Verdict(NamedTuple):
    """A verdict and an addition to it."""

    word: Literal["reproduced", "contradicted", "inconclusive"]
    addition: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.addition})" if self.addition else self.word


class Evidence(NamedTuple):
    """The effect in the claimed direction, and its intervals.

    Attributes:
      mean: The effect.
      low: Lower end of the 95 % interval, simultaneous for the family.
      high: Upper end.
      low90: Lower end of the 90 % interval, simultaneous for the family.
      high90: Upper end.
      n: Number of seeds, or of items of a count.
      p: Raw p-value.
      detectable: The effect that n runs detect with a power of 80 %.
    """

    mean: float
    low: float
    high: float
    low90: float
    high90: float
    n: int
    p: float
    detectable: float


class Decision(NamedTuple):
    """A claim with its verdict. The evidence is None if its rows do not exist."""

    claim: Claim
    verdict: Verdict
    evidence: Evidence | None
    p_adjusted: float


NOT_RUN = "not run with this protocol"
NOT_CONVERGED = "row not converged"

# --- reading ------------------------------------------------------------------------


def claims_path(experiment: str) -> pathlib.Path:
    """Returns the path of ``claims.toml`` of an experiment."""
    return ROOT / experiment / "claims.toml"


def load_claims(path: pathlib.Path) -> Paper:
    """Reads and checks a ``claims.toml``.

    Raises:
      ClaimError: If a claim is invalid. The message names the claim and the field.
    """
    return parse_claims(path.read_text(encoding="utf-8"), path.parent.name)


def parse_claims(text: str, experiment: str) -> Paper:
    """Reads and checks the text of a ``claims.toml``, see :func:`load_claims`."""
    found = tomllib.loads(text)
    paper, entries = found.pop("paper", {}), found.pop("claim", [])
    defaults = found.pop("defaults", {})
    if found:
        raise ClaimError(f"{experiment}: unknown table {sorted(found)[0]!r}.")
    wanted = set(Paper._fields) - {"experiment", "entries"}
    if set(paper) != wanted:
        raise ClaimError(f"{experiment}: [paper] must have {sorted(wanted)}.")
    claims = tuple(_claim({**defaults, **entry}, experiment) for entry in entries)
    names = [claim.id for claim in claims]
    for name in names:
        if names.count(name) > 1:
            raise ClaimError(f"{name}: two claims have this id.")
    return Paper(experiment=experiment, entries=claims, **paper)


def _claim(entry: Mapping[str, Any], experiment: str) -> Claim:
    name = entry.get("id", "a claim without id")
    fields = {field.name: field for field in dataclasses.fields(Claim)}
    for key in entry:
        if key not in fields:
            raise ClaimError(f"{name}: unknown field {key!r}.")
    values = dict(entry)
    for key in ("row", "against", "at", "over", "match"):
        value = values.get(key, ())
        values[key] = (value,) if isinstance(value, str) else tuple(value)
    if not values["match"]:
        values["match"] = values["over"]
    if values.get("premise") is False:  # a claim without the default's premise
        del values["premise"]
    if "premise" in values:
        try:
            values["premise"] = Premise(**values["premise"])
        except TypeError as error:
            raise ClaimError(f"{name}: premise: {error}.") from None
    effect = values.get("paper_effect")
    if effect is not None:
        values.setdefault("smallest", abs(effect) / 4)
        values.setdefault("exclude", abs(effect) / 2)
    if "smallest" in values:
        values.setdefault("exclude", values["smallest"])
    for key, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and values.get(key) in (None, ""):
            raise ClaimError(f"{name}: {key} is missing.")
    claim = Claim(**values)
    _check(claim, experiment)
    return claim


def _check(claim: Claim, experiment: str) -> None:
    wrong = {
        f"id must start with {experiment}.": not claim.id.startswith(f"{experiment}."),
        "direction must be 1 or -1.": claim.direction not in (1, -1),
        "item must be 1 or -1.": claim.item not in (1, -1),
        "along needs one row and no row against.": bool(claim.along)
        and len(claim.row) + len(claim.against) != 1,
        "smallest must be positive.": not claim.smallest > 0,
        "exclude must be positive.": not claim.exclude > 0,
        f"kind must be one of {get_args(Kind)}.": claim.kind not in get_args(Kind),
        "row is empty.": not claim.row,
        "against must be empty, one label, or one for each row.": len(claim.against)
        not in (0, 1, len(claim.row)),
        "at must have a position for each row.": bool(claim.at)
        and len(claim.at) != len(claim.row),
        "an interior claim needs three rows or more.": claim.kind == "interior"
        and len(claim.row) < 3,
        "a count that compares rows needs over.": claim.kind == "count"
        and bool(claim.against)
        and not claim.over,
        "paper_effect and direction have different signs.": bool(claim.paper_effect)
        and claim.kind != "equivalence"
        and (claim.paper_effect or 0) * claim.direction < 0,
    }
    for sentence, found in wrong.items():
        if found:
            raise ClaimError(f"{claim.id}: {sentence}")


def claims_digest(paper: Paper) -> str:
    """Returns the sha256 of all fields that affect a verdict. Prose is excluded."""
    entries = [dataclasses.asdict(claim) for claim in paper.entries]
    for entry in entries:
        for name in PROSE:
            del entry[name]
    text = json.dumps(sorted(entries, key=operator.itemgetter("id")), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- the rule -----------------------------------------------------------------------


def verdict(
    evidence: Evidence,
    smallest: float,
    exclude: float,
    *,
    kind: Kind = "difference",
    premise: bool = True,
    converged: bool = True,
) -> Verdict:
    """Returns the verdict that the numbers imply.

    Args:
      evidence: The effect times the claimed direction, with its intervals.
      smallest: δ, the smallest effect of interest.
      exclude: κ, the effect that the interval must exclude.
      kind: Kind of the claim.
      premise: Whether the premise of the claim holds.
      converged: Whether all rows chose an inner rate and were no longer improving.

    Returns:
      The verdict of the first rule that applies.

    Examples:
      >>> str(verdict(Evidence(0.2, 0.05, 0.35, 0, 0, 5, 0.02, 0.2), 0.25, 0.5))
      'contradicted (an effect of the same sign, less than half as large)'
    """
    if not premise:
        return Verdict("inconclusive", "premise absent")
    low, high = evidence.low, evidence.high
    if kind == "equivalence":
        reproduced = -smallest < evidence.low90 and evidence.high90 < smallest
        contradicted, added = low > smallest or high < -smallest, ""
    else:
        reproduced = low > 0 and evidence.mean >= smallest
        contradicted = high < exclude
        added = "an effect of the same sign, less than half as large" if low > 0 else ""
    if reproduced:
        half = kind != "equivalence" and high < exclude
        notes = ("less than half as large" if half else "",)
        notes += ("" if converged else NOT_CONVERGED,)
        return Verdict("reproduced", ", ".join(filter(None, notes)))
    if contradicted and not converged:
        return Verdict("inconclusive", NOT_CONVERGED)
    if contradicted:
        return Verdict("contradicted", added)
    return Verdict("inconclusive")


# --- from rows to the effect --------------------------------------------------------


class Side(NamedTuple):
    """Lines of one label."""

    label: str
    where: Mapping[str, Any]

    def of(self, claim: Claim, lines: Iterable[Line]) -> list[Line]:
        """Returns the lines of the side at the step of the claim."""
        return [
            line
            for line in lines
            if line.get("row") == self.label
            and line.get("column", "chosen") == claim.column
            and ("study" in self.where or "study" not in line)
            and all(
                line.get(key) in (value if isinstance(value, list | tuple) else [value])
                for key, value in self.where.items()
            )
        ]


def sides(claim: Claim) -> tuple[list[Side], list[Side]]:
    """Returns the rows of a claim and the rows with which they are compared."""
    there = {**claim.where, **claim.where_against}
    return (
        [Side(label, claim.where) for label in claim.row],
        [Side(label, there) for label in claim.against],
    )


def _number(claim: Claim, line: Line, metric: str) -> float:
    value = line.get(metric)
    if value is None:
        raise ClaimError(f"{claim.id}: a line of {line['row']!r} has no {metric!r}.")
    number = float(np.mean(value))
    if claim.log and metric == claim.metric:
        if number <= 0:
            raise ClaimError(f"{claim.id}: {metric} of {line['row']!r} has no log.")
        return math.log(number)
    return number


def by_seed(
    claim: Claim, side: Side, lines: Iterable[Line], metric: str | None = None
) -> dict[Any, float]:
    """Returns the metric of a row by seed, averaged over the lines of a seed.

    Raises:
      ClaimError: If a value is missing, or the seeds have different numbers of lines.
    """
    found: dict[Any, list[float]] = {}
    for line in side.of(claim, lines):
        number = _number(claim, line, metric or claim.metric)
        found.setdefault(line["seed"], []).append(number)
    if len({len(values) for values in found.values()}) > 1:
        raise ClaimError(f"{claim.id}: seeds of {side.label!r} have different lines.")
    return {seed: math.fsum(v) / len(v) for seed, v in sorted(found.items())}


def _table(claim: Claim, of: Sequence[Side], lines: Sequence[Line]) -> np.ndarray:
    """Returns values ``[rows, seeds]``. All rows must have the same seeds."""
    found = [by_seed(claim, side, lines) for side in of]
    for side, values in zip(of, found, strict=True):
        if list(values) != list(found[0]):
            raise ClaimError(
                f"{claim.id}: {side.label!r} has the seeds {list(values)}, another row "
                f"{list(found[0])}."
            )
    return np.array([list(values.values()) for values in found])


def effects(claim: Claim, lines: Sequence[Line]) -> np.ndarray:
    """Returns the effect of each seed, or of each item of a count, without direction.

    Raises:
      ClaimError: If rows are incomplete or their seeds differ.
    """
    if claim.kind == "count":
        return _hits(claim, lines)
    mine, others = sides(claim)
    if claim.along:
        key, (side,) = claim.along, mine
        places = sorted({line[key] for line in side.of(claim, lines)})
        parts = [Side(side.label, {**side.where, key: place}) for place in places]
        rows = _table(claim, parts, lines)
        return _slope(np.log10(places), rows) - claim.reference
    values = _table(claim, [*mine, *others], lines)
    rows, compared = values[: len(mine)], values[len(mine) :]
    if claim.kind == "interior":
        best = np.argmax(claim.item * rows, axis=0)
        return ((best > 0) & (best < len(rows) - 1)).astype(float)
    if claim.at:
        return _slope(np.array(claim.at), rows) - claim.reference
    if not len(compared):
        return rows.mean(0) - claim.reference
    return (rows - compared).mean(0) - claim.reference


def _slope(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Computes the least-squares slope of each column of ``[len(x), seeds]``."""
    x = x - x.mean()
    return x @ rows / (x @ x)


def _hits(claim: Claim, lines: Sequence[Line]) -> np.ndarray:
    """Returns 1 for each item of a count that agrees with the claim, otherwise 0."""
    mine, others = sides(claim)
    counted = [line for side in mine for line in side.of(claim, lines)]
    if not others:
        return np.array([_number(claim, line, claim.metric) for line in counted])
    found = []
    for item in dict.fromkeys(tuple(x[key] for key in claim.over) for x in counted):
        here = dict(zip(claim.over, item, strict=True))
        there = {key: here[key] for key in claim.match}
        a = by_seed(claim, Side(others[0].label, {**others[0].where, **there}), lines)
        b = by_seed(claim, Side(mine[0].label, {**mine[0].where, **here}), lines)
        if list(a) != list(b):
            raise ClaimError(f"{claim.id}: {item} has other seeds than its reference.")
        found.append(paired(list(a.values()), list(b.values())))
    p = np.nan_to_num([float(x.p) for x in found], nan=1.0)
    adjusted = benjamini_hochberg(p)
    sign = np.array([claim.item * float(x.mean) > 0 for x in found])
    return (sign & (adjusted < 0.05)).astype(float)


def measure(claim: Claim, lines: Sequence[Line], family: int = 1) -> Evidence | None:
    """Computes the effect and its intervals, or returns None if a row has no lines.

    Args:
      claim: The claim.
      lines: Lines of a ``results.jsonl`` without its header.
      family: Number of claims in the family, for Bonferroni intervals.

    Raises:
      ClaimError: If rows are incomplete or their seeds differ.
    """
    mine, others = sides(claim)
    if not all(side.of(claim, lines) for side in (*mine, *others)):
        return None
    found = effects(claim, lines)
    if claim.kind in ("count", "interior"):
        return _share(claim, found, family)
    if len(found) < 2:
        raise ClaimError(f"{claim.id}: one seed has no interval.")
    sign = claim.direction
    wide = paired(np.zeros_like(found), sign * found, level=1 - 0.05 / family)
    narrow = tost(
        np.zeros_like(found), sign * found, claim.smallest, alpha=0.05 / family
    )
    p = narrow.p if claim.kind == "equivalence" else float(wide.p)
    detectable = minimum_detectable(len(found), level=0.05 / family) * float(wide.sd)
    ends = (float(wide.low), float(wide.high), narrow.low, narrow.high)
    return Evidence(float(wide.mean), *ends, len(found), p, detectable)


def _share(claim: Claim, hits: np.ndarray, family: int) -> Evidence:
    """Computes a share minus the reference, with the exact binomial interval."""
    from scipy import stats

    if not np.isin(hits, (0, 1)).all():
        raise ClaimError(f"{claim.id}: a count needs lines of 0 or 1.")
    test = stats.binomtest(
        int(hits.sum()), len(hits), min(max(claim.reference, 1e-12), 1 - 1e-12)
    )

    def ends(alpha: float) -> list[float]:
        interval = test.proportion_ci(1 - alpha / family)
        return sorted(claim.direction * (float(x) - claim.reference) for x in interval)

    (low, high), (low90, high90) = ends(0.05), ends(0.1)
    mean = claim.direction * (float(hits.mean()) - claim.reference)
    p = float(test.pvalue)
    return Evidence(mean, low, high, low90, high90, len(hits), p, math.nan)


def premise_holds(claim: Claim, lines: Sequence[Line]) -> bool:
    """Returns whether the mean of the premise's metric is in range for each row."""
    premise = claim.premise
    if premise is None:
        return True
    mine, others = sides(claim)
    for side in mine if premise.of == "row" else others:
        values = by_seed(claim, side, lines, premise.metric)
        if not premise.at_least <= np.mean(list(values.values())) <= premise.at_most:
            return False
    return True


def converged(claim: Claim, lines: Sequence[Line]) -> bool:
    """Returns whether all lines chose an inner rate and were no longer improving.

    A metric ``gain_over_X`` also depends on the lines of the row X.
    """
    mine, others = sides(claim)
    used = [*mine, *others]
    if claim.metric.startswith("gain_over_"):
        reference = claim.metric.removeprefix("gain_over_")
        used += [side._replace(label=reference) for side in used]
    return not any(
        line.get("edge") or line.get("late", 0) > 0.5
        for side in used
        for line in side.of(claim, lines)
    )


def decide(paper: Paper, lines: Sequence[Line]) -> list[Decision]:
    """Returns a verdict for each claim of a paper.

    A claim is inconclusive if its rows are incomplete or their seeds differ.
    The correction of a family includes the claims that were not run. It is Holm's for
    up to ten claims, and that of Benjamini and Hochberg for more.

    Args:
      paper: The paper, from :func:`load_claims`.
      lines: All lines that were run with this protocol.
    """
    families: dict[str, list[Claim]] = {}
    for claim in paper.entries:
        families.setdefault(claim.family, []).append(claim)
    found = {
        claim.id: _judge(claim, lines, len(families[claim.family]))
        for claim in paper.entries
    }
    adjusted: dict[str, float] = {}
    for claims in families.values():
        evidence = [found[claim.id][0] for claim in claims]
        p = [1.0 if e is None or math.isnan(e.p) else e.p for e in evidence]
        correct = holm if len(claims) <= HOLM_LIMIT else benjamini_hochberg
        adjusted |= zip((c.id for c in claims), correct(p).tolist(), strict=True)
    decisions = []
    for claim in paper.entries:
        evidence, said = found[claim.id]
        p = math.nan if evidence is None else adjusted[claim.id]
        decisions.append(Decision(claim, said, evidence, p))
    return decisions


def _judge(
    claim: Claim, lines: Sequence[Line], family: int
) -> tuple[Evidence | None, Verdict]:
    """The effect and the verdict; rows that do not fit the claim decide nothing."""
    try:
        evidence = measure(claim, lines, family)
        if evidence is None:
            return None, Verdict("inconclusive", NOT_RUN)
        premise = premise_holds(claim, lines)
    except ClaimError as error:
        return None, Verdict("inconclusive", str(error).rstrip("."))
    return evidence, verdict(
        evidence,
        claim.smallest,
        claim.exclude,
        kind=claim.kind,
        premise=premise,
        converged=converged(claim, lines),
    )
