"""The numbers in the report on multi-digit images follow from its rows."""

import numpy as np
import pytest
import quoted

from experiments.multidigits import report
from experiments.multidigits.config import CLASSICS, SINGLE_TASK
from mtljax import data

NAME = "multidigits"
pytestmark = pytest.mark.skipif(
    not (quoted.ROOT / NAME / "results").is_dir(), reason="the sdist has no rows"
)
COLUMNS = {"left_acc": 0, "right_acc": 1, "ink_r2": 2, "ink_mae": 2}
GRADIENT = ("mgda", "pcgrad", "imtl_g", "cagrad", "nash_mtl")
DELTA, TIME = "Δm % (metrics)", "step time / LS"


def table():
    """Returns the values of the table, by method and column."""
    lines = quoted.rows_of(f"{NAME}/results/results.jsonl")
    rows = {m: [x for x in lines if x["method"] == m] for m in (SINGLE_TASK, *CLASSICS)}
    times = {method: rows[method][0]["step_ms"] for method in CLASSICS}
    found = report.make_report(rows, COLUMNS, ("left", "right", "ink"), times)
    return {method: found.rows[report.label_of(method)] for method in rows}


def test_numbers_of_the_report_follow_from_the_rows():
    found = table()
    text = quoted.text_of(NAME).replace("CC BY 4.0", "")  # the name of a licence
    spread = lambda m: (np.mean(found[m][DELTA]), np.std(found[m][DELTA], ddof=1))
    slowest = max(found[method][TIME] for method in GRADIENT)
    square = np.mean(np.square(data.load("multidigits").train["ink"]))
    known = [spread(method) for method in ("uncertainty", "linear", "mgda")]
    quoted.check(text, [*known, slowest, float(square)])
    assert 4 < square / np.log(10) < 4.5  # at the start, all ten digits are as likely


def test_statements_of_the_report_follow_from_the_rows():
    found = table()
    delta = {method: np.mean(found[method][DELTA]) for method in CLASSICS}
    order = sorted(delta, key=lambda method: delta[method])
    assert delta[order[0]] > 0
    assert (order[0], order[-1]) == ("uncertainty", "mgda")
    assert {len(found[method][DELTA]) for method in CLASSICS} == {3}
    others = set(CLASSICS) - {*GRADIENT, "famo"}
    assert all(abs(found[method][TIME] - 1) < 0.1 for method in others)
    assert found["famo"][TIME] > 1.2
    score = lambda m: np.mean([found[m][c] for c in ("left acc", "right acc")])
    lost = score(SINGLE_TASK) - score("linear")
    for method in ("uncertainty", "scale_invariant"):
        assert 0.35 < (score(method) - score("linear")) / lost < 0.65
    ink = {method: np.mean(found[method]["ink r2"]) for method in CLASSICS}
    assert min(ink, key=lambda method: ink[method]) == "mgda"
