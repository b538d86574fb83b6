"""The numbers of the report of FS-MTL are those of its rows."""

import numpy as np
import pytest
import quoted

from experiments.common.statistics import minimum_detectable
from experiments.fs_mtl import paper
from experiments.fs_mtl.config import CONFLICT, CPU

pytestmark = pytest.mark.skipif(
    not (quoted.ROOT / "fs_mtl" / "results").is_dir(), reason="the sdist has no rows"
)

NAME = "fs_mtl"
PILOTS = {0.003: 77.9, 0.01: 78.8, 0.03: 74.1}
"""Rate -> validation accuracy of LS in runs that are not committed."""
PAIRS = (("F-LS", "LS"), ("F-CAGrad", "CAGrad"))
LONGER = (("F-LS", "LS, 4x epochs"), ("F-CAGrad", "CAGrad, 2x epochs"))
SETS = ("multi_fashion", "multi_mnist", "multi_fashion_mnist")


def values(row, metric="test_accuracy", *, file="results", column="chosen", **where):
    lines = quoted.rows_of(f"fs_mtl/results/{file}.jsonl")
    if not where and file == "results":
        where = {"study": None}
    return quoted.over_seeds(lines, metric, row=row, column=column, **where)


def gain(pairs, metric="test_accuracy", **options):
    """The mean difference of pairs of rows, by seed."""
    each = [
        values(a, metric, **options) - values(b, metric, **options) for a, b in pairs
    ]
    return np.mean(each, axis=0)


def of_paper(label, name="multi_mnist"):
    cell = paper.published(name, label) or pytest.fail(f"no {label} of {name}")
    return cell.average


def test_the_answer():
    at = lambda row, radius, metric="test_accuracy": values(
        row, metric, study="radii", rho=radius
    )
    claim = lambda key, **options: quoted.claimed(NAME, key, **options)
    told = lambda key: quoted.in_paper(NAME, key)
    split = {"file": "conflict/results"}
    direct = gain([("F-CAGrad", "direct CAGrad")], **split)
    first = direct[:5]
    plain = [("F-CAGrad", "CAGrad")]
    radii = [
        {x["rho"] for x in quoted.rows_of("fs_mtl/results/results.jsonl")
         if x["row"] == row and "study" not in x}
        for row in ("F-CAGrad", "F-LS")
    ]  # fmt: skip
    assert all(len(found) == 1 for found in radii)
    (small,), (large,) = radii
    logs = of_paper("F-CAGrad") - of_paper("RLW+SAM")
    quoted.check(
        quoted.part(NAME, "**Answer**", "## Run it"),
        [
            claim("sam-helps"), told("sam-helps"),
            *(quoted.interval(gain([pair])) for pair in PAIRS),
            claim("sam-helps-equal-passes"),
            quoted.interval(gain(LONGER, column="last")),
            claim("calibration", sign=-1.0),
            -gain(PAIRS[:1], "test_ece").mean(),
            -gain(PAIRS[1:], "test_ece").mean(),
            quoted.interval(gain(LONGER, "test_ece")),
            values("LS", "test_ece").mean(),
            values("LS, 4x epochs", "test_ece").mean(),
            small, large, claim("balancer-over-F-LS"), told("balancer-over-F-LS"),
            large, quoted.interval(at("F-CAGrad", large) - at("F-LS", large)),
            claim("random-weights-suffice"), logs,
            claim("conflict-falls"),
            claim("split-over-direct"), quoted.chance(NAME, "split-over-direct"),
            told("split-over-direct"), quoted.interval(first),
            minimum_detectable(5) * first.std(ddof=1),
            quoted.interval(gain(plain, **split)),
            of_paper("F-CAGrad") - of_paper("CAGrad"),
            quoted.interval(gain(plain, "test_ece", **split)),
        ],
    )  # fmt: skip
    assert (np.sum(direct > 0), len(direct)) == (9, 10)


def test_what_the_answer_says_of_rows():
    lines = quoted.rows_of("fs_mtl/results/results.jsonl")
    late = {x["row"] for x in lines if x["late"] > 0.5 and "study" not in x}
    assert late == {"F-LS", "F-CAGrad", "RLW+SAM", "CAGrad"}
    conflict = quoted.rows_of("fs_mtl/results/conflict/results.jsonl")
    assert all(x["late"] > 0.5 for x in conflict)
    share = {round(100 * x["plain_intra_conflict"]) for x in conflict}
    assert share == {69}
    (tuned,) = {x["plain_intra_conflict"] for x in lines if x["row"] == "CAGrad"}
    assert round(100 * tuned) == 8
    stuck = [values(row, study="radii", rho=2.0) < 12 for row in ("F-LS", "F-CAGrad")]
    assert [x.sum() for x in stuck] == [2, 2]


def test_the_protocol_and_the_lenet():
    at = lambda radius, split: (
        100 * values("F-CAGrad", f"{split}_score", study="radii", rho=radius).mean()
    )
    better = [at(0.125, split) - at(0.5, split) for split in ("val", "test")]
    lenet = {"file": "lenet/lenet"}
    split = [of_paper("F-CAGrad", x) - of_paper("direct CAGrad", x) for x in SETS]
    logs = [of_paper("F-CAGrad", x) - of_paper("RLW+SAM", x) for x in SETS]
    bound = 0.1
    assert max(map(abs, logs)) <= bound
    quoted.check(
        quoted.part(NAME, "## Run it"),
        [
            CPU.lr, *PILOTS, *PILOTS.values(),
            CPU.rhos[:2], CPU.rhos[0], better[0], CPU.rhos[1], -better[1],
            CONFLICT.lr,
            quoted.interval(gain(PAIRS, **lenet)),
            quoted.interval(gain(LONGER, **lenet)),
            quoted.interval(gain(PAIRS, "test_ece", **lenet)),
            min(split), max(split), bound,
        ],
    )  # fmt: skip
