"""Claims, verdicts, the page of results, and planted errors that must show."""

import dataclasses
import inspect
import json
import math
import pathlib
import re

import numpy as np
import pytest

from experiments.common import claims, problem, provenance, replay, report, results
from experiments.common.claims import (
    ClaimError,
    Evidence,
    decide,
    load_claims,
    measure,
    parse_claims,
    verdict,
)
from experiments.common.config import Common, ConfigError
from experiments.common.selection import Choice, edge_notes, select
from mtljax.data import MISSING, DataError, Dataset, Task, checksum, load

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
PAPER = """
[paper]
title = "T"
authors = "A"
link = "L"
claims = "C."
change = "D."
"""
BASE = {
    "id": "toy.better",
    "paper": "Table 1",
    "text": "A is better than B.",
    "row": "A",
    "against": "B",
    "metric": "score",
    "direction": 1,
    "smallest": 0.25,
    "exclude": 0.5,
    "family": "one",
    "scope": "toys",
    "practice": "Use A.",
    "instead": "Use B.",
}


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def paper_of(*entries, head=PAPER):
    tables = [
        "\n".join(["[[claim]]", *(f"{k} = {toml(v)}" for k, v in entry.items())])
        for entry in entries
    ]
    return parse_claims("\n".join([head, *tables]), "toy")


def claim(**fields):
    entry = {k: v for k, v in {**BASE, **fields}.items() if v is not None}
    return paper_of(entry).entries[0]


def lines(row, values, **more):
    return [
        {"row": row, "seed": seed, "score": value, **more}
        for seed, value in enumerate(values)
    ]


# --- the rule -------------------------------------------------------------------------

HALF = "an effect of the same sign, less than half as large"


@pytest.mark.parametrize(
    ("low", "mean", "high", "wanted"),
    [
        (0.2, 0.9, 1.6, "reproduced"),
        (-0.3, 0.1, 0.4, "contradicted"),
        (-0.3, 0.4, 1.1, "inconclusive"),
        (0.05, 0.2, 0.35, f"contradicted ({HALF})"),
        (0.1, 0.2, 0.8, "inconclusive"),
        (0.1, 0.3, 0.45, "reproduced (less than half as large)"),
        (-0.9, -0.7, -0.5, "contradicted"),
        (0.0, 0.5, 1.0, "inconclusive"),
    ],
)
def test_the_verdict(low, mean, high, wanted):
    delta, kappa = 0.25, 0.5
    evidence = Evidence(mean, low, high, low, high, 5, 0.01, 1.0)
    assert str(verdict(evidence, delta, kappa)) == wanted
    absent = verdict(evidence, delta, kappa, premise=False)
    assert str(absent) == "inconclusive (premise absent)"
    late = str(verdict(evidence, delta, kappa, converged=False))
    moved = {
        "contradicted": "inconclusive (row not converged)",
        f"contradicted ({HALF})": "inconclusive (row not converged)",
        "reproduced": "reproduced (row not converged)",
        "reproduced (less than half as large)": (
            "reproduced (less than half as large, row not converged)"
        ),
    }
    assert late == moved.get(wanted, wanted)


@pytest.mark.parametrize(
    ("low", "low90", "high90", "high", "wanted"),
    [
        (-0.3, -0.2, 0.2, 0.3, "reproduced"),
        (-0.4, -0.3, 0.2, 0.3, "inconclusive"),
        (0.3, 0.35, 0.4, 0.5, "contradicted"),
        (-0.5, -0.45, -0.35, -0.3, "contradicted"),
        (0.2, 0.3, 0.5, 0.6, "inconclusive"),
    ],
)
def test_the_verdict_of_an_equivalence(low, low90, high90, high, wanted):
    evidence = Evidence((low + high) / 2, low, high, low90, high90, 5, 0.01, 1.0)
    assert str(verdict(evidence, 0.25, 0.25, kind="equivalence")) == wanted


# --- from lines to the effect ---------------------------------------------------------

A = [77.64, 78.10, 76.90, 78.30, 77.25]
B = [78.48, 79.05, 77.10, 79.40, 78.60]


def test_a_difference():
    rows = lines("A", B) + lines("B", A)
    found = measure(claim(), rows)
    assert found is not None
    wanted = (0.888, 0.354706, 1.421294, 0.478519, 1.297481)
    np.testing.assert_allclose(found[:5], wanted, rtol=1e-5)
    np.testing.assert_allclose(found.p, 0.009858, atol=1e-6)
    np.testing.assert_allclose(found.detectable, 1.6625 * 0.4295, rtol=1e-3)
    mirrored = measure(claim(direction=-1), rows)
    np.testing.assert_allclose(mirrored[:3], (-0.888, -1.421294, -0.354706), rtol=1e-5)
    # Of a family of four: the interval of level 1 - 0.05 / 4.
    wide = measure(claim(), rows, family=4)
    np.testing.assert_allclose(wide.high - wide.mean, 4.3147 * 0.4295 / 5**0.5, 1e-3)
    assert measure(claim(row="C"), rows) is None
    # Order of the lines is of no account, and other steps and groups do not count.
    more = [*rows[::-1], *lines("A", [0] * 5, column="last")]
    assert measure(claim(), more)[:5] == pytest.approx(found[:5])
    where = claim(where={"set": "x"})
    more = [dict(x, set="x") for x in rows] + lines("A", [0] * 5, set="y")
    assert measure(where, more)[:5] == pytest.approx(found[:5])


def test_means_over_rows_lists_and_several_lines():
    rows = lines("A", [1, 2, 4]) + lines("C", [3, 5, 5]) + lines("B", [0, 1, 1])
    found = measure(claim(row=["A", "C"], against=["B", "B"]), rows)
    assert found.mean == pytest.approx(np.mean([2, 2.5, 3.5]))
    rows = lines("A", [[1, 3], [2, 4]]) + lines("B", [1, 1])
    assert measure(claim(), rows).mean == pytest.approx(1.5)
    rows = [*lines("A", [1, 2], t=0), *lines("A", [3, 4], t=1), *lines("B", [0, 0])]
    assert measure(claim(), rows).mean == pytest.approx(2.5)
    with pytest.raises(ClaimError, match="seeds of 'A' have different lines"):
        measure(claim(), rows[1:])


def test_ratios_slopes_and_references():
    rows = lines("A", [2.0, 4.0]) + lines("B", [1.0, 1.0])
    found = measure(claim(log=True), rows)
    assert found.mean == pytest.approx(math.log(8**0.5))
    with pytest.raises(ClaimError, match="score of 'A' has no log"):
        measure(claim(log=True), lines("A", [0, 1]) + lines("B", [1, 1]))
    found = measure(claim(against=None, reference=2.5), lines("A", [3.0, 4.0]))
    assert found.mean == pytest.approx(1.0)
    rows = [*lines("A", [1, 2]), *lines("B", [2, 4]), *lines("C", [3, 6])]
    slope = claim(row=["A", "B", "C"], against=None, at=[0, 2, 4])
    assert measure(slope, rows).mean == pytest.approx((0.5 + 1) / 2)
    rows = [
        line
        for scale in (0.1, 1, 100)
        for line in lines("A", [np.log10(scale) * s for s in (1, 3)], scale=scale)
    ]
    assert measure(claim(against=None, along="scale"), rows).mean == pytest.approx(2)
    wheres = {"where": {"set": "x"}, "where_against": {"set": "y"}}
    rows = lines("A", [1, 2], set="x") + lines("A", [0, 0], set="y")
    assert measure(claim(against="A", **wheres), rows).mean == pytest.approx(1.5)


def test_shares():
    rng = np.random.default_rng(0)
    rows = lines("B", rng.normal(size=8), t="x")
    gains = {"a": -3.0, "b": 0.0, "c": -5.0, "d": 4.0}
    for aux, gain in gains.items():
        rows += lines("A", gain + rng.normal(size=8), t="x", aux=aux)
    pairs = {"kind": "count", "over": ["t", "aux"], "match": ["t"], "item": -1}
    found = measure(claim(**pairs), rows)
    # Clopper and Pearson for 2 of 4.
    np.testing.assert_allclose(found[:3], (0.5, 0.0676, 0.9324), atol=1e-4)
    below = measure(claim(**pairs, direction=-1, reference=0.75), rows)
    np.testing.assert_allclose(below[:3], (0.25, -0.1824, 0.6824), atol=1e-4)
    rows = [{"row": "A", "score": x} for x in (1, 1, 0, 1)]
    assert measure(claim(kind="count", against=None), rows).mean == 0.75
    rows = [*lines("A", [1, 5, 1]), *lines("B", [3, 1, 1]), *lines("C", [1, 1, 2])]
    inner = claim(kind="interior", row=["A", "B", "C"], against=None)
    assert measure(inner, rows).mean == pytest.approx(1 / 3)


def test_a_family_shares_its_correction_with_claims_that_were_not_run():
    other = {**BASE, "id": "toy.other", "row": "absent"}
    paper = paper_of(BASE, other)
    first, second = decide(paper, lines("A", B) + lines("B", A))
    assert first.p_adjusted == pytest.approx(2 * 0.009858, abs=2e-6)
    assert str(first.verdict) == "reproduced"
    assert second.evidence is None
    assert str(second.verdict) == "inconclusive (not run with this protocol)"
    assert math.isnan(second.p_adjusted)


def test_lines_of_a_study_count_only_where_it_is_named():
    apart = [{**line, "study": "s", "m": 50.0} for line in lines("A", B)]
    for line in apart:
        del line["score"]
    rows = lines("A", B) + lines("B", A) + apart
    (found,) = decide(paper_of(BASE), rows)
    (alone,) = decide(paper_of(BASE), lines("A", B) + lines("B", A))
    assert found == alone
    entry = {**BASE, "metric": "m", "against": [], "reference": 49.0}
    (found,) = decide(paper_of({**entry, "where": {"study": "s"}}), rows)
    assert found.evidence is not None
    np.testing.assert_allclose(found.evidence.mean, 1.0)


def test_a_claim_can_do_without_the_premise_of_the_defaults():
    assert claim(premise=False).premise is None


def test_a_premise_is_read_from_the_rows():
    entry = {**BASE, "premise": {"metric": "loss", "at_most": 0.01}}
    for loss, wanted in ((0.005, "reproduced"), (0.5, "inconclusive (premise absent)")):
        rows = lines("A", B) + lines("B", A, loss=loss)
        assert str(decide(paper_of(entry), rows)[0].verdict) == wanted
    (found,) = decide(paper_of(entry), lines("A", B) + lines("B", A))
    assert found.evidence is None
    assert "a line of 'B' has no 'loss'" in str(found.verdict)


# --- reading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ids": 1}, "toy.better: unknown field 'ids'"),
        ({"id": "other.x"}, "id must start with toy."),
        ({"text": ""}, "text is missing"),
        ({"direction": 2}, "direction must be 1 or -1"),
        ({"smallest": 0.0}, "smallest must be positive"),
        ({"smallest": None, "exclude": None}, "smallest is missing"),
        ({"kind": "guess"}, "kind must be one of"),
        ({"against": ["B", "B"]}, "one label, or one for each row"),
        ({"paper_effect": -1.0}, "have different signs"),
        ({"premise": {"code": "x"}}, "premise: .*'code'"),
        ({"at": [1, 2]}, "at must have a position for each row"),
        ({"kind": "count"}, "a count that compares rows needs over"),
        ({"along": "scale"}, "along needs one row and no row against"),
    ],
)
def test_faults_of_a_claim(fields, message):
    with pytest.raises(ClaimError, match=message):
        claim(**fields)


def test_defaults_of_a_claim():
    found = claim(smallest=None, exclude=None, paper_effect=2.0)
    assert (found.smallest, found.exclude) == (0.5, 1.0)
    assert claim(exclude=None).exclude == 0.25
    with pytest.raises(ClaimError, match="two claims have this id"):
        paper_of(BASE, BASE)
    with pytest.raises(ClaimError, match=r"\[paper\] must have"):
        paper_of(BASE, head="[paper]\ntitle = 'T'")
    short = {k: v for k, v in BASE.items() if k != "scope"}
    found = paper_of(short, head=PAPER + '[defaults]\nscope = "all"')
    assert found.entries[0].scope == "all"


def test_the_digest_covers_decisions_and_no_prose():
    first = claims.claims_digest(paper_of(BASE))
    assert claims.claims_digest(paper_of({**BASE, "practice": "Other."})) == first
    for change in ({"smallest": 0.26}, {"row": "C"}, {"family": "two"}):
        assert claims.claims_digest(paper_of({**BASE, **change})) != first


@pytest.mark.parametrize("name", results.PAPERS)
def test_committed_claims(name):
    paper = load_claims(claims.claims_path(name))
    assert len(paper.entries) >= 5
    for entry in paper.entries:
        for sentence in (entry.text, entry.practice, entry.instead):
            assert re.fullmatch(r"[A-Z0-9].*\.", sentence)


# --- the page -------------------------------------------------------------------------


@pytest.mark.skipif(
    not (results.PAGE.parent / "igb" / "results").is_dir(),
    reason="the sdist has no rows",
)
def test_the_page_is_what_the_rows_say():
    """Written by ``python -m experiments.common.results``."""
    assert results.PAGE.read_text("utf-8") == results.page()


def test_the_page_has_no_number_without_rows_and_no_forbidden_word():
    text = results.PAGE.read_text("utf-8")
    for word in ("not found", "nowhere", "refuted", "never "):
        assert word not in text.lower()
    for line in text.splitlines():
        if "not run with this protocol" in line and line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[2:5] == ["-", "", ""]
            assert cells[-1] == results.UNDECIDED


def test_a_page_of_rows(tmp_path):
    paper = paper_of({**BASE, "paper_effect": 3.0}, {**BASE, "id": "toy.x", "row": "C"})
    folder = tmp_path / "toy" / "results"
    folder.mkdir(parents=True)
    head = {"schema": 1, "claims": claims.claims_digest(paper), "commit": "a" * 40}
    rows = lines("A", B) + lines("B", A)

    def write(name, **more):
        (folder / name).mkdir()
        found = [head | {"dirty": False} | more, *rows]
        text = "".join(json.dumps(x) + "\n" for x in found)
        (folder / name / "results.jsonl").write_text(text)

    write("old", claims="another digest")
    assert results.protocol_rows(paper, tmp_path).lines == []
    write("new")
    found = results.protocol_rows(paper, tmp_path)
    assert (len(found.lines), found.committed) == (10, True)
    decisions = decide(paper, found.lines)
    text = "\n".join(results.section(paper, found, decisions))
    assert "| 3 (Table 1) | 0.888 [0.217, 1.56] | 5 | 0.02 | reproduced |" in text
    assert "| Use A. |" in text
    assert "toy/results/new/results.jsonl" in text
    assert "1 reproduced, 0 contradicted, 1 inconclusive (1 of them not run)" in text
    write("dirty", dirty=True)
    found = results.protocol_rows(paper, tmp_path)
    assert "uncommitted" in "\n".join(results.section(paper, found, decisions))


# --- provenance -----------------------------------------------------------------------

AGAIN = "rows without a header; they are trained again with this protocol"
OLDER = (
    ("forkmerge/results/results.jsonl", AGAIN),
    ("multidigits/results/results.jsonl", "the demo, which no claim cites"),
)
"""Files that are older than headers, and why they are kept."""

COMMITTED = sorted(EXPERIMENTS.rglob("results.jsonl"))


@pytest.mark.parametrize(
    "path", COMMITTED, ids=lambda path: str(path.relative_to(EXPERIMENTS))
)
def test_provenance_of_committed_rows(path):
    """A file that is listed above may lack the header, or its digest of the data."""
    faults = provenance.check_provenance(path)
    if str(path.relative_to(EXPERIMENTS)) in dict(OLDER):
        known = ("Row 0", "digest of the data", "valid 'shared'")
        faults = [x for x in faults if not any(part in x for part in known)]
    assert faults == []


def toy(part_of=None, **labels):
    """Forty examples of two tasks, ten of them for validation and ten for test."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3, 1, 1)).astype(np.float32)
    left = (x[:, 0, 0, 0] > 0).astype(int)
    columns = {"image": x, "left": left, "size": x[:, 1, 0, 0], **labels}
    at = part_of or {"train": slice(0, 20), "val": slice(20, 30), "test": slice(30, 40)}
    parts = [
        {k: v[at[p]] for k, v in columns.items()} for p in ("train", "val", "test")
    ]
    tasks = (Task("left", "classification", 2), Task("size", "regression", 1))
    return Dataset("toy", tasks, (3, 1, 1), *parts)


def test_a_header_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(problem, "LOADED", {})
    monkeypatch.setattr(provenance, "LOADED", problem.LOADED)
    problem.load(Common(), "multidigits", train_size=8, val_size=8, test_size=8)
    path = report.write_rows(tmp_path / "results.jsonl", Common(), [])
    head, _ = report.read_rows(path)
    (name,) = head["data"]
    assert name == "multidigits test_size=8 train_size=8 val_size=8"
    options = {"train_size": 8, "val_size": 8, "test_size": 8}
    assert head["data"][name] == checksum(load("multidigits", **options))
    assert head["shared"][name]["train, test"] == 0
    problem.note_arrays("made", {"train": {"image": np.zeros(3)}})
    made = provenance.header(Common())["data"]["made"]
    problem.note_arrays("made", {"train": {"image": np.ones(3)}})
    assert provenance.header(Common())["data"]["made"] != made
    clean = head | {"commit": "a" * 40, "dirty": False}
    assert provenance.check_form(clean) == provenance.check_header(clean) == []
    assert provenance.check_form(clean | {"kind": "about"}) == [
        "Row 0 is not a header of schema 1."
    ]
    for key in provenance.KEYS:
        assert provenance.check_form({k: v for k, v in clean.items() if k != key})
    assert provenance.check_form(clean | {"commit": None})
    assert provenance.check_form(clean | {"wall_s": "long"})
    for change in ({"dirty": True}, {"data": {}}, {"versions": {"jax": "1"}}):
        assert provenance.check_header(clean | change)


def test_a_header_names_no_folder_of_this_machine(monkeypatch):
    words = ["x", "cpu", "--data-dir", "/secret", "--out=/secret/out", "--seeds", "3"]
    monkeypatch.setattr("sys.argv", words)
    head = provenance.header(Common())
    assert head["command"].endswith("cpu --data-dir DIR --seeds 3")
    assert "secret" not in json.dumps(head)


# --- planted errors -------------------------------------------------------------------


def test_a_void_label_column_is_refused():
    problem.check_labels(toy())
    constant = np.zeros(40, int)
    with pytest.raises(ConfigError, match="'left' has one label only in its training"):
        problem.check_labels(toy(left=constant))
    with pytest.raises(DataError, match="train split of 'toy' has no label of 'left'"):
        toy(left=constant + MISSING)
    empty = np.where(np.arange(40) < 30, np.arange(40.0), np.nan)
    with pytest.raises(ConfigError, match="'size' has no labels in its test split"):
        problem.check_labels(toy(size=empty))
    with pytest.raises(ConfigError, match="'size' has one label only"):
        problem.check_labels(toy(size=np.where(np.arange(40) < 20, 1.5, np.arange(40))))
    # A known label beside missing ones is one label only.
    some = np.where(np.arange(40) % 2, MISSING, 1)
    with pytest.raises(ConfigError, match="'left' has one label only"):
        problem.check_labels(toy(left=some))


def claim_lines(choice, label):
    """The chosen and the last evaluations, as the experiments write them."""
    about = {"row": label, "edge": choice.edge, "late": choice.late}
    return [
        {**about, "column": column, **row}
        for column, rows in (("chosen", choice.rows), ("last", choice.last))
        for row in rows
    ]


def test_a_row_at_the_end_of_its_grid_is_marked_and_contradicts_nothing():
    rows = [
        {"lr": lr, "seed": seed, "step": step, "val_score": lr + step, "score": 1.0}
        for lr in (0.1, 0.2, 0.3)
        for seed in range(4)
        for step in range(5)
    ]
    choice = select(rows)
    assert choice.edge == "high"
    (note, _) = edge_notes({"A": choice})
    assert note == "Chose the largest learning rate offered: A."
    planted = claim_lines(choice, "A") + lines("B", [2.0, 2.1, 1.9, 2.05])
    (found,) = decide(paper_of(BASE), planted)
    assert str(found.verdict) == "inconclusive (row not converged)"
    inside = claim_lines(choice._replace(edge=None, late=0.5), "A")
    (found,) = decide(paper_of(BASE), inside + lines("B", [2.0, 2.1, 1.9, 2.05]))
    assert str(found.verdict) == "contradicted"
    late = claim_lines(choice._replace(edge=None, late=0.75), "A")
    (found,) = decide(paper_of(BASE), late + lines("B", [2.0, 2.1, 1.9, 2.05]))
    assert str(found.verdict) == "inconclusive (row not converged)"


def test_a_gain_depends_on_the_convergence_of_its_reference():
    claim = {**BASE, "metric": "gain_over_joint"}
    for late, mark in ((0.2, ""), (0.8, "row not converged")):
        rows = [
            {
                "row": row,
                "seed": seed,
                "gain_over_joint": value + seed / 10,
                "late": part,
            }
            for row, value, part in (("A", 3, 0.0), ("B", 1, 0.0), ("joint", 0, late))
            for seed in range(4)
        ]
        (found,) = decide(paper_of(claim), rows)
        assert found.verdict.addition == mark


def test_a_swapped_or_missing_seed_is_seen():
    """Pairs are made by the seeds of the lines, whatever their order."""
    rows = lines("A", B) + lines("B", A)
    swapped = [*rows]
    swapped[1], swapped[3] = swapped[3], swapped[1]
    assert measure(claim(), swapped) == measure(claim(), rows)
    relabelled = [dict(x) for x in rows]
    relabelled[4]["seed"] = 7
    with pytest.raises(ClaimError, match=r"'B' has the seeds \[0, 1, 2, 3, 4\]"):
        measure(claim(), relabelled)
    with pytest.raises(ClaimError, match="another row"):
        measure(claim(), rows[:-1])
    (found,) = decide(paper_of(BASE), relabelled)
    assert found.verdict.word == "inconclusive"
    assert "has the seeds [0, 1, 2, 3, 4]" in found.verdict.addition
    twice = [*rows, dict(rows[0])]
    with pytest.raises(ClaimError, match="different lines"):
        measure(claim(), twice)


def test_a_leaked_test_row_is_marked(tmp_path, monkeypatch):
    assert set(problem.shared_examples(toy()).values()) == {0}
    at = {"train": [*range(20), 33], "val": range(20, 30), "test": range(30, 40)}
    leaked = toy(part_of={k: list(v) for k, v in at.items()})
    found = problem.shared_examples(leaked)
    assert found == {"train, val": 0, "train, test": 1, "val, test": 0}
    # Another label makes it another example: natural duplicates keep theirs.
    leaked.test["left"][3] = 1 - leaked.test["left"][3]
    assert problem.shared_examples(leaked)["train, test"] == 0
    leaked.test["left"][3] = 1 - leaked.test["left"][3]

    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "README.md").write_text("Toys.")
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    noted = {"toy": {"digest": "x", "shared": found}}
    monkeypatch.setattr(provenance, "LOADED", noted)
    head = provenance.header(Common()) | {"experiment": "toy"}
    wanted = ["1 examples of toy are in two splits (train, test)."]
    assert provenance._check_splits(head) == wanted
    (tmp_path / "toy" / "README.md").write_text("The set has repeated examples.")
    assert provenance._check_splits(head) == []


def test_selection_reads_no_key_of_the_test_split():
    class Blind(dict):
        def get(self, key, default=None):
            assert not str(key).startswith("test")
            return super().get(key, default)

        def __getitem__(self, key):
            assert not str(key).startswith("test")
            return super().__getitem__(key)

    def rows(values):
        return [
            Blind(kind="eval", lr=lr, seed=s, step=k, val_score=lr * k, test_acc=t)
            for (lr, s, k), t in zip(
                [(lr, s, k) for lr in (0.1, 0.3) for s in (0, 1) for k in (1, 2)],
                values,
                strict=True,
            )
        ]

    found = select(rows([math.nan] * 8))
    other = select(rows(np.random.default_rng(0).normal(size=8)))
    steps = [[(r["seed"], r["step"]) for r in choice.rows] for choice in (found, other)]
    assert steps[0] == steps[1]
    assert found.lr == other.lr
    assert isinstance(found, Choice)


# --- errata ---------------------------------------------------------------------------


def test_every_erratum_has_a_source():
    text = (EXPERIMENTS / "ERRATA.md").read_text("utf-8")
    found = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(found) > 50
    for line in found:
        assert re.search(r"\[[^\]]{4,}\]\.?$", line), line
    others = [x for x in text.splitlines() if x and not x.startswith(("- ", "#"))]
    assert len(others) <= 6  # an introduction, and no list item over two lines


def test_the_make_target_replays_every_experiment():
    makefile = (EXPERIMENTS.parent / "Makefile").read_text("utf-8")
    assert "experiments.common.replay" in makefile
    assert set(results.PAPERS) <= set(replay.NAMES)


def test_fields_of_claims_are_documented():
    for kind in (claims.Claim, claims.Premise):
        for field in dataclasses.fields(kind):
            # Python 3.13 and later remove the indentation of docstrings.
            text = inspect.getdoc(kind) or ""
            assert re.search(rf"^  {field.name}: ", text, re.M), field.name
