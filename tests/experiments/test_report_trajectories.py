"""Every number that the report on trajectories prints follows from its rows."""

import functools

import numpy as np
import pytest
import quoted

from experiments.common import claims
from experiments.common.statistics import holm, paired
from experiments.trajectories import analysis
from experiments.trajectories.config import PRESETS
from experiments.trajectories.data import COPY, NOISY, OTHER, TARGET

pytestmark = pytest.mark.skipif(
    not (quoted.ROOT / "trajectories" / "results").is_dir(),
    reason="the sdist has no rows",
)

CONFIG = PRESETS["cpu"][1]
SETS = {other: f"{TARGET} + {other} - {TARGET}" for other in (NOISY, OTHER, COPY)}
LEVELS = analysis.LEVELS
BEST, LAST = "test accuracy, points", "test accuracy at the last step, points"
AT_FIRST = f"test accuracy at first passage of {LEVELS[0]:g}, points"
claimed = functools.partial(quoted.claimed, "trajectories")
in_paper = functools.partial(quoted.in_paper, "trajectories")


@functools.cache
def rows():
    return quoted.rows_of("trajectories/results/results.jsonl")


@functools.cache
def by_rate():
    """The runs of FashionMTL and then of the faces, each by its only rate."""
    runs = [line for line in rows() if isinstance(line.get("tasks"), list)]
    return analysis.blocks(runs)


rates, groups = lambda: [*by_rate()], lambda: [*by_rate().values()]


@functools.cache
def differences():
    return analysis.target_differences(CONFIG, groups()[0])


def change(quantity, other):
    alone, mine = differences()[quantity][SETS[other]]
    return mine - alone


def lowered(effect):
    """Turns the sign of the mean, but not of the interval, as in "lowers it by"."""
    return (-effect[0], *effect[1:])


def part(start="", end=""):
    text = " ".join(quoted.text_of("trajectories").split())
    assert all(text.count(mark) == 1 for mark in (start, end) if mark)
    return text[text.index(start) : text.index(end) if end else None]


def test_transfer():
    paper = claims.load_claims(claims.claims_path("trajectories"))
    values = [float(paper.link.rpartition("/")[2]), rates()[0]]
    values += [claimed("half-better"), lowered(claimed("noisy-worse"))]
    values += [lowered(quoted.interval(change(LAST, NOISY)))]
    values += [quoted.interval(change(LAST, OTHER))]
    values += [quoted.interval(change(BEST, COPY))]
    for level in LEVELS[1:3]:
        values += [claimed(f"gap-at-loss-{level}"), level]
    values += [LEVELS[0], quoted.interval(change(AT_FIRST, NOISY))]
    quoted.check(part(end="*Sharpness.*"), values)
    ratio = claimed("noisy-worse")[0] / in_paper("noisy-worse")
    assert 0 < ratio < 0.5, "less than half as large, with the sign of the paper"


def test_factors():
    values = [claimed("noisy-flatter"), in_paper("noisy-flatter")]
    for row in ("+ noisy labels", "alone"):
        values += [quoted.over_seeds(rows(), "train_loss_last", row=row).mean()]
    values += [LEVELS[2], claimed("noisy-flatter-at-loss-0.1")]
    values += [np.exp(quoted.interval(change("log sharpness", OTHER)))]
    values += [claimed("noisy-fisher-peak"), claimed("no-sign")[2]]
    text = part("*Sharpness.*", "*Conflict* (faces")
    quoted.check(text, values)

    noisy = groups()[0]["fashion_mtl", (TARGET, NOISY), "linear"]
    largest = noisy.of("fisher", TARGET).argsort(1)[:, -CONFIG.largest :]
    steps = np.take_along_axis(noisy.values["step"], largest, 1)
    late = (steps > CONFIG.fashion_mtl.steps / 2).sum()
    assert f"{late} of these {steps.size} values" in text

    found = analysis.transfer_rows(CONFIG, groups()[0])
    agree = [int(one.agree) for one in analysis.agreements(found).values()]
    assert (sum(agree), len(found) * len(agree), claimed("no-sign")[0]) == (0, 9, 0)
    assert [bool(row.deltas["score"].significant) for row in found] == [False] * 3


def test_signs_by_paired_differences():
    def sign(quantity, i):
        tests = [paired(*differences()[quantity][name]) for name in SETS.values()]
        sure = holm([one.p for one in tests])[i] < 0.05
        return int(np.sign(tests[i].mean)) if sure else 0

    factors = [f"log {analysis.FACTOR_NAMES[name]}" for name in analysis.FACTORS]
    assert [sign(name, 0) for name in (BEST, *factors)] == [-1, 1, 1, 1]
    assert [sign(name, 1) for name in (BEST, factors[0])] == [1, 1]


def test_conflict_and_optimizers():
    faces = groups()[1]
    lines = analysis.conflict_lines(CONFIG, faces)
    by_seed = lambda name: [line[f"{name}_spearman_sharpness"] for line in lines]
    values = [rates()[1], claimed("conflict-raises-factors")]
    values += [quoted.interval(by_seed(name)) for name in ("null", "excess")]
    values += [claimed("conflict-not-predictive"), claimed("optimizers-unexplained")]
    text = part("*Conflict* (faces")
    quoted.check(text, values)

    assert len(analysis.compared(faces)) == 9
    changes = analysis.optimiser_rows(CONFIG, faces)
    explained = analysis.explained(changes)
    assert f"in {sum(explained.values())} of {len(explained)} pairs" in text
    assert [row.significant for row in changes] == [False] * 9
    alone = faces["cmu_faces", ("expression",), "linear"]
    score = analysis.aggregates(CONFIG, alone, "expression")["score"].mean()
    assert f"recognises {100 * score:.0f} % of the expressions" in text
