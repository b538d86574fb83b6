"""The numbers in the report on alternating steps follow from its rows."""

import re

import numpy as np
import pytest
import quoted

from experiments.alternating.config import CPU, TASKS

NAME = "alternating"
pytestmark = pytest.mark.skipif(
    not (quoted.ROOT / NAME / "results").is_dir(), reason="the sdist has no rows"
)
SETS = ("faces", "camvid", "school", "tox21")  # in the order of the report
JOINT, STATES = "joint", "alternating, states per task"
SHARED = "alternating, shared state"


def rows(name):
    return quoted.rows_of(f"{NAME}/results/{name}/results.jsonl")


def values(name, row, metric):
    return quoted.over_seeds(rows(name), metric, row=row, column="chosen")


def against(name, row, other, metric="delta_m", *, log=False, sign=1.0):
    pair = [values(name, label, metric) for label in (row, other)]
    one, two = np.log(pair) if log else pair
    return quoted.interval(one - two, sign=sign)


def equal_passes(name, row):
    """Reads a mean from the table, because the rows have one evaluation a run."""
    page = (quoted.ROOT / NAME / f"results/{name}/table.md").read_text("utf-8")
    cells = [[c.strip() for c in x.split("|")] for x in page.splitlines() if "|" in x]
    column = cells[0].index("average, equal passes ↑")
    [found] = [line for line in cells if line[1] == row and len(line) == len(cells[0])]
    return float(found[column].strip("*").split()[0])


def slope_of_image(row):
    """Returns the change of R² for a factor of ten in the loss ``[seeds]``."""
    scales = CPU.faces.scales
    study = [line for line in rows("faces") if line.get("study") == "scales"]
    found = [
        quoted.over_seeds(study, "image_r2", row=row, scale=scale) for scale in scales
    ]
    return np.polyfit(np.log10(scales), found, 1)[0]


def by_task(name):
    """Returns the mean metrics of the multi-task rows ``[rows, tasks]``."""
    chosen = [x for x in rows(name) if "method" in x and x["column"] == "chosen"]
    labels = dict.fromkeys(x["row"] for x in chosen)
    mine = [[x["test_metrics"] for x in chosen if x["row"] == row] for row in labels]
    return np.mean(mine, axis=1)


def late(name):
    return {x["row"] for x in rows(name) if x.get("late", 0) > 0.5}


def test_numbers_of_the_answer_and_of_the_protocol_follow_from_the_rows():
    text = quoted.part(NAME, "**Answer.**")
    slopes = {row: slope_of_image(row) for row in (STATES, "AdaTask", JOINT, SHARED)}
    longest = max(CPU.faces.lrs)
    equal = [TASKS[s] * values(s, STATES, "lr")[0] for s in ("camvid", "tox21")]
    equal += [TASKS["school"] * values("school", STATES, "lr")[0]]
    assert min(equal) > longest > TASKS["faces"] * values("faces", STATES, "lr")[0]
    expression, sunglasses = by_task("faces")[:, 2], by_task("faces")[:, 3]
    iou = np.sort(by_task("camvid")[:, :11].max(0))
    expected = [
        *[against(name, STATES, JOINT) for name in SETS],
        [values("faces", JOINT, "lr")[0], 0.01],  # the second is of the former run
        quoted.claimed(NAME, "different-nature"),
        *[
            equal_passes(name, row)
            for name in ("faces", "tox21", "camvid")
            for row in (STATES, JOINT)
        ],
        *[against(s, STATES, SHARED) for s in ("school", "tox21", "faces", "camvid")],
        quoted.claimed(NAME, "state-per-task"),
        against("faces", "AdaTask", JOINT),
        quoted.claimed(NAME, "scale-invariance"),
        quoted.decisions(NAME)["scale-invariance"].claim.smallest,
        *[quoted.interval(slopes[row]) for row in ("AdaTask", JOINT, SHARED)],
        quoted.claimed(NAME, "better-than-methods"),
        quoted.claimed(NAME, "grouping-trades"),
        *[x for step in equal for x in (longest, step)],
        [1 / 4, expression.min(), expression.max()],  # four expressions
        [sunglasses.min(), sunglasses.max(), 1 / 2],  # worn or not
        iou[7],
    ]
    quoted.check(text, expected)
    claimed = quoted.claimed(NAME, "scale-invariance")
    assert np.allclose(quoted.interval(slopes[STATES]), claimed)
    assert iou[8] > 2 * iou[7]


def test_table_and_counts_follow_from_the_rows():
    text = quoted.text_of(NAME)
    found = re.findall(r"\| (\d+), [^|]*\| (\d+) \|[^|]*\| (\w+)", text)
    decided = quoted.decisions(NAME)
    word = lambda name: decided[f"better-than-average-{name}"].verdict.word
    seeds = lambda name: len(values(name, JOINT, "delta_m"))
    assert found == [(str(TASKS[s]), str(seeds(s)), word(s)) for s in SETS]
    assert late("camvid") == {SHARED, "G = 4, slot", "UW", "CAGrad"}
    assert late("faces") == {JOINT, SHARED}
    assert not late("school") | late("tox21")
    assert not [x for name in SETS for x in rows(name) if x.get("edge")]
    ends = {min(CPU.camvid.lrs), max(CPU.camvid.lrs)}
    alone = [x for x in rows("camvid") if x["row"] == "single task"]
    at_end = {x["task"] for x in alone if x["lr"] in ends}
    assert f"{len(at_end)} of the {TASKS['camvid']} tasks" in text
    assert f"{(by_task('camvid')[:, :11].max(0) <= 0.15).sum()} of 11 classes" in text
    assert CPU.school.steps // TASKS["school"] == 2 < CPU.school.eval_every


def test_pairs_that_are_open_follow_from_the_rows():
    includes_zero = lambda interval: interval[1] < 0 < interval[2]
    open_pairs = {
        (name, other)
        for name in ("faces", "school", "camvid")
        for other in ("UW", "PCGrad", "CAGrad")
        if includes_zero(against(name, STATES, other))
    }
    assert open_pairs == {("faces", "UW"), ("faces", "PCGrad"), ("camvid", "CAGrad")}
    for row in ("G = 2, slot", "G = 4, slot"):
        assert includes_zero(against("camvid", row, JOINT))
    gain = {name: against(name, STATES, JOINT)[0] for name in SETS}
    assert gain["camvid"] > gain["tox21"] > 0
    assert gain["faces"] > 0
    last = [x for x in rows("camvid") if x["row"] == STATES and x["column"] == "last"]
    assert sum(x["test_metrics"][-1] < 0 for x in last) == 1
    chosen = values("camvid", STATES, "test_metrics")
    assert (np.asarray(chosen)[..., -1] > 0).all()


def test_signs_of_exploration_and_of_learning_rates_follow_from_the_rows():
    for name in SETS:
        for metric in ("distance_same_rate", "distance_same_loss"):
            _, low, high = against(name, STATES, JOINT, metric, log=True)
            assert low < 0 < high if name == "faces" else low > 0
        metric = "distance_same_length"
        assert against(name, STATES, JOINT, metric, log=True)[2] < 0
        mean, *_ = against(name, STATES, JOINT, "val_score_area")
        assert (mean > 0) == (name in {"faces", "school"})
