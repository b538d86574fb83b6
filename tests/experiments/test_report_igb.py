"""Compares the numbers of the report on IGB with its rows."""

import functools
from typing import Any

import numpy as np
import pytest
import quoted

from experiments.common.claims import claims_path, load_claims
from experiments.igb.config import PRESETS, SETS, TABLE

pytestmark = pytest.mark.skipif(
    not (quoted.ROOT / "igb" / "results").is_dir(), reason="the sdist has no rows"
)

# Time of IGBv2 relative to equal weights in Tables 1 and 2 of the paper.
PAPER = {"time on NYUv2": 1.09, "time on QM9": 1.16}
OTHERS = SETS[1:]  # all tables but enb
SETTINGS = PRESETS["cpu"][1].table
claimed = functools.partial(quoted.claimed, "igb")
in_paper = functools.partial(quoted.in_paper, "igb")


def lines_of(*names: str) -> list[quoted.Line]:
    paths = [f"igb/results/mulan_mtr-{name}/results.jsonl" for name in names]
    return [line for path in paths for line in quoted.rows_of(path)]


def minus(row: str, other: str, names=SETS) -> np.ndarray:
    """Returns the difference of Δm by seed, averaged over tables."""
    a, b = (
        quoted.over_seeds(lines_of(*names), "delta_m", column="chosen", row=label)
        for label in (row, other)
    )
    return a - b


def each(row: str, other: str) -> dict[str, float]:
    """Returns the mean difference on each table."""
    return {name: float(minus(row, other, [name]).mean()) for name in SETS}


def parts() -> list[str]:
    """Returns the text before the answer, the answer, and the text after it."""
    page = quoted.text_of("igb", until="The paper reports these values")
    question, _, rest = page.partition("**Answer**")
    answer, _, rest = rest.partition("**Convergence.**")
    assert rest
    return [question, answer, rest]


def test_the_answer():
    found: Any = quoted.decisions("igb")
    nash = ("igb1-plus-nash", "igb2-plus-nash")
    log = each("SI", "EW")
    assert sorted(log, key=log.__getitem__)[:: len(log) - 1] == ["slump", "oes10"]
    values = [
        *(claimed("si-over-ew", sign=-1), -log["oes10"], -log["slump"]),
        claimed("si-over-static", sign=-1),
        claimed("igb1-over-si"),
        *(claimed("igb2-over-si"), each("IGBv2", "SI")["enb"]),
        *(quoted.interval(minus("IGBv2", "SI", OTHERS)), in_paper("igb2-over-si")),
        *(claimed("agent-over-noise"), in_paper("agent-over-noise")),
        claimed("agent-over-frozen-agent"),
        in_paper("agent-over-noise", sign=-1) / 2,
        *(claimed("min-over-mean"), in_paper("min-over-mean")),
        *(minus("SI", label).mean() for label in ("RLW", "DWA")),
        *(claimed("igb2-over-uw"), each("IGBv2", "UW")["enb"]),
        minus("IGBv2", "UW", OTHERS).mean(),
        *(found[claim].evidence.detectable for claim in nash),
        *(in_paper(claim, sign=-1) for claim in nash),
        *(claimed("igb2-cost"), *PAPER.values()),
    ]
    quoted.check(parts()[1], values)


def test_the_other_sections():
    question, _, rest = parts()
    paper = load_claims(claims_path("igb"))
    quoted.check(question, [float(paper.link.rpartition("/")[2])])
    about: Any = quoted.decisions("igb")["si-over-ew"].claim
    ew = {n: quoted.over_seeds(lines_of(n), "signal_r2", row="EW").mean() for n in SETS}
    assert sorted(ew, key=ew.__getitem__)[:: len(ew) - 1] == ["slump", "enb"]
    quoted.check(rest, [ew["slump"], ew["enb"], about.premise.at_least])


def test_what_the_answer_says_in_words():
    ends = {n: quoted.interval(minus("SI", "static 1/σ²", [n]))[1:] for n in SETS}
    assert [n for n in SETS if ends[n][0] < 0 < ends[n][1]] == ["jura", "slump"]
    assert len(set(np.sign(list(each("IGBv1", "SI").values())))) == 2
    assert claimed("igb2-over-si")[1] > in_paper("igb2-over-si")
    for claim in ("agent-over-noise", "agent-over-frozen-agent"):
        assert claimed(claim)[1] > in_paper("agent-over-noise") / 2


def test_convergence():
    text = " ".join(parts()[2].split())
    lines = [x for x in lines_of("enb") if x["column"] == "chosen"]
    late = {x["row"] for x in lines if x.get("late", 0) > 0.5}
    high = {x["row"] for x in lines if x.get("edge") == "high"}
    assert f"{len(late)} of {len(TABLE)} rows and both" in text
    assert f"and {len(high)} rows select the largest rate" in text
    assert {x["lr"] for x in lines if x["row"] in high} == {max(SETTINGS.lrs)}
    for task in ("y1", "y2"):  # single-task networks at the last two evaluations
        steps = [x["step"] for x in lines if x["task"] == task]
        assert np.mean(np.array(steps) >= SETTINGS.steps - SETTINGS.eval_every) > 0.5
    nash = {"Nash-MTL", "IGBv1 + Nash-MTL", "IGBv2 + Nash-MTL"}
    for name in SETS:
        low = {x["row"] for x in lines_of(name) if x.get("edge") == "low"}
        assert low == ({"UW"} | nash if name in ("jura", "oes97", "oes10") else set())
    found = quoted.decisions("igb").values()
    good = [x for x in found if x.verdict.word == "reproduced"]
    assert len(good) == 5  # "All five"
    for one in good:
        assert one.verdict.addition == "row not converged"
        rows = (one.claim.row[0], one.claim.against[0])
        assert quoted.interval(minus(*rows, OTHERS))[2] < 0
