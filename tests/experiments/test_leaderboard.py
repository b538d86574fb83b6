"""The leaderboard: statistics from made-up rows, the queue of jobs, and small runs."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from experiments.common import board as boards
from experiments.common import provenance, results
from experiments.common.config import ConfigError
from experiments.leaderboard import __main__ as command
from experiments.leaderboard import (
    figures,
    options,
    packed,
    page,
    problem,
    queue,
    recheck,
    reference,
    report,
    train,
)
from experiments.leaderboard.config import (
    AUXILIARY,
    CLASSICS,
    EQUAL,
    LINEAR,
    NULL,
    ORACLE,
    PRESETS,
    SETS,
    SINGLE,
    SMALL,
    STATIC,
    USELESS,
    WIDE,
    Config,
    check,
)
from mtljax import metrics, training
from mtljax.data import DataError, Task

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)

# --- made-up rows ---------------------------------------------------------------------

TASKS = ["a", "b"]


def job_line(name, row, counted=(True, True), error=None):
    return {
        "kind": "job",
        "set": name,
        "row": row,
        "tasks": TASKS,
        "counted": list(counted),
        "data": "0",
        "error": error,
    }


def run_lines(name, row, errors, lr=0.01, score=None, **more):
    """Lines of a row: ``errors`` ``[seeds, T]`` on test, at one rate."""
    found = []
    for last in (False, True):
        for seed, test in enumerate(errors):
            value = float(np.mean(np.log(test))) if score is None else score
            found.append(
                {
                    "set": name,
                    "row": row,
                    "seed": seed,
                    "lr": lr,
                    "step": 20 if last else 10,
                    "val_score": value if math.isfinite(value) else None,
                    "val": list(test),
                    "test": list(test),
                    "last": last,
                    "late": False,
                    "diverged": False,
                    **more,
                }
            )
    return found


def made_up(factors, sets=6, seeds=4, noise=0.0):
    """Lines of rows whose errors are those of the single-task networks times a factor.

    Args:
      factors: Factor by row, or a function of the number of the set.
      sets: Number of sets.
      seeds: Number of seeds.
      noise: Of the factor, by seed and task.
    """
    rng, lines = np.random.default_rng(1), []
    for i in range(sets):
        name, base = f"set:{i}", np.array([0.4, 0.2 + 0.01 * i])
        lines.append(job_line(name, SINGLE))
        for task in TASKS:
            lines += run_lines(name, SINGLE, [base] * seeds, task=task)
        for row, factor in factors.items():
            lines.append(job_line(name, row))
            if row == WIDE:
                for config, value in enumerate(factor):
                    lines += run_lines(
                        name,
                        row,
                        [base * value] * seeds,
                        score=float(config != 0),  # validation selects the first
                        config=config,
                    )
                continue
            value = factor(i) if callable(factor) else factor
            drawn = value * (1 + noise * rng.normal(size=(seeds, 2)))
            lines += run_lines(name, row, base * drawn)
    return lines


FACTORS = {
    EQUAL: 1.02,
    NULL: 1.021,
    STATIC: 1.01,
    WIDE: (1.0, 0.7, 1.3),
    USELESS: 3.0,
    LINEAR: 1.02,
    "dwa": lambda i: 0.9 - 0.01 * i,
    "pcgrad": lambda i: 1.05 + 0.01 * i,
    "gcs": lambda i: 0.95 - 0.001 * i,
}


HEADER = {
    "versions": dict.fromkeys(("python", "jax", "optax", "mtljax"), "1"),
    "commit": "0",
    "device": "cpu",
}


def result_of(board, values, references={}):  # noqa: B006 not changed
    table = report.entries(board, values, {})
    return report.Result(board, values, table, (1, 1), {}, references)


def text_of(board, values, done=(1, 1), costs={}, **more):  # noqa: B006 not changed
    table = report.entries(board, values, costs)
    result = report.Result(board, values, table, done, costs, {})
    return page.text(result, Config(), HEADER, **more)


def values_of(lines, rows=(SINGLE, *FACTORS)):
    board = report.make_board(lines)
    return board, report.values_of(board, rows)


def test_numbers_of_made_up_rows():
    board, values = values_of(made_up(FACTORS))
    assert values.sets == [f"set:{i}" for i in range(6)]
    table = {entry["row"]: entry for entry in report.entries(board, values, {})}
    np.testing.assert_allclose(table["dwa"]["delta_m"], -12.5)
    np.testing.assert_allclose(table["dwa"]["median"], -12.5)
    assert table["dwa"]["worst"] == "set:0"
    np.testing.assert_allclose(table[EQUAL]["delta_m"], 2.0)
    np.testing.assert_allclose(table[SINGLE]["delta_m"], 0, atol=1e-12)
    # Six sets, all in one direction: p = 1/32. Holm: two methods.
    for name in ("equal", "static"):
        found = table["dwa"][name]
        np.testing.assert_allclose((found["p"], found["adjusted"]), (0.03125, 0.0625))
        assert (found["better"], found["worse"]) == (6, 0)
        assert (table["pcgrad"][name]["better"], table["pcgrad"][name]["worse"]) == (
            0,
            6,
        )
    np.testing.assert_allclose(table["pcgrad"]["equal"]["mean"], 5.5)
    # dwa, static-25, static-5, equal weights, null row, pcgrad on every set.
    ranks = report.ranks_of(values)
    order = ["dwa", WIDE, STATIC, EQUAL, NULL, "pcgrad"]
    assert ranks == {row: 1.0 + order.index(row) for row in ranks}
    # The auxiliary row has no rank, and its test is not corrected for the others.
    assert table["gcs"]["rank"] is None
    np.testing.assert_allclose(table["gcs"]["static"]["adjusted"], 0.03125)
    # Student's interval over six means, by hand: mean ± 2.570582 sd / √6.
    sd = np.std([-10, -11, -12, -13, -14, -15], ddof=1)
    half = 2.5705818 * sd / math.sqrt(6)
    np.testing.assert_allclose(
        (table["dwa"]["low"], table["dwa"]["high"]),
        (-12.5 - half, -12.5 + half),
        rtol=1e-6,
    )


def test_planted_rows_are_first_and_last_and_have_no_rank():
    board, values = values_of(made_up(FACTORS))
    table = report.entries(board, values, {})
    ranked = {row: report.ranks_of(values).get(row) for row in (USELESS, ORACLE)}
    assert ranked == {USELESS: None, ORACLE: None}
    means = {entry["row"]: entry["delta_m"] for entry in table}
    assert min(means, key=means.__getitem__) == ORACLE
    assert max(means, key=means.__getitem__) == USELESS
    np.testing.assert_allclose(means[ORACLE], -30)
    assert means[WIDE] == pytest.approx(0)  # the configuration that validation selects
    checks = [x for x in page.checks(board, values, table) if "planted" in x]
    assert "`oracle` is at place 1" in checks[0]
    assert "`useless` at place 3 of 3" in checks[0]


def test_sentences_follow_from_the_tests():
    lines = made_up(FACTORS, sets=8)
    board, values = values_of(lines)
    table = report.entries(board, values, {"dwa": {"step_ratio": 1.5}})
    found = page.conclusions(values, table)
    assert found[0].startswith("On these 8 sets, 1 of 2 methods beat equal weights")
    assert "1 beat static weights" in found[0]
    assert page.answer(values, table) == (
        "Try DWA (step time x1.5): 1 of 2 methods on 8 sets beat equal weights and "
        "static weights that were tuned with about as many tries."
    )
    # Without noise, both methods differ from equal weights on each set.
    assert found[2] == "PCGrad is worse than equal weights (Wilcoxon, Holm)."
    assert "DWA is better than equal weights on at least one set." in found[3]
    assert "PCGrad is worse on at least one." in found[3]
    assert "DWA is better on the most sets (8), and worse on none." in found[3]
    found = page.checks(board, values, table)
    assert any("`linear` and equal weights are equal bit by bit" in x for x in found)
    assert not any("Holm's correction include both" in x for x in found)
    # Nothing is better than itself.
    same = {EQUAL: 1.0, STATIC: 1.0, "dwa": 1.0, "pcgrad": 1.0}
    board, values = values_of(made_up(same, sets=8, noise=0.01), tuple(same))
    table = report.entries(board, values, {})
    found = page.conclusions(values, table)
    assert ", 0 of 2 methods beat equal weights" in found[0]
    assert not any("worse than equal weights" in x for x in found)
    assert any("No method is better than equal weights" in x for x in found)
    assert page.answer(values, table) == (
        f"{page.TUNE}: none of 2 methods on 8 sets is shown to be better than both "
        "equal weights and static weights that were tuned with about as many tries."
    )
    board, values = values_of(made_up(same, sets=2), tuple(same))
    found = page.checks(board, values, report.entries(board, values, {}))
    assert any("DWA and PCGrad are equal bit by bit." in x for x in found)
    # A method that beats only random static weights is not recommended.
    worse = {EQUAL: 1.0, STATIC: 1.5, "dwa": 1.0, "pcgrad": 1.0}
    board, values = values_of(made_up(worse, sets=8, noise=0.01), tuple(worse))
    table = report.entries(board, values, {})
    assert page.answer(values, table).startswith(f"{page.TUNE}: none of 2 methods")
    found = page.conclusions(values, table)
    assert "2 beat static weights" in found[0]
    assert "differ from equal weights by +" in found[1]
    assert "(p = 0.0078)" in found[1]
    # The first places by mean and by median differ.
    mixed = {EQUAL: 1.0, STATIC: 1.0, "dwa": 0.99}
    mixed["mgda"] = lambda i: 0.2 if i == 0 else 1.1
    board, values = values_of(made_up(mixed), tuple(mixed))
    found = page.conclusions(values, report.entries(board, values, {}))
    assert any("The first places differ" in text for text in found)


def test_few_sets_cannot_decide():
    """Six sets and two methods: p = 2/64, and 0.0625 after Holm's correction."""
    board, values = values_of(made_up(FACTORS))
    table = report.entries(board, values, {})
    assert page.answer(values, table) == (
        f"{page.TUNE}. 6 sets cannot show that any of 2 methods is better than equal "
        "weights: the test needs at least 7 sets."
    )
    assert "would have p = 0.062." in page.conclusions(values, table)[0]
    # With seven sets the same differences are significant.
    board, values = values_of(made_up(FACTORS, sets=7))
    table = report.entries(board, values, {})
    assert page.answer(values, table).startswith("Try DWA: 1 of 2 methods on 7 sets")
    np.testing.assert_allclose(table[0]["static"]["adjusted"], 2 / 64)
    assert report.smallest_p(7, 2) == 2 / 64


def test_methods_and_seeds():
    """The parts of a table of methods and seeds, by hand."""
    # Rows are seeds: an effect of the seed, one of the method, and a rest.
    seed, method = np.array([-3.0, 0, 3]), np.array([-1.0, 0, 1])
    rest = 0.3 * np.outer([1, -1, 0], [1, -1, 0])
    scores = 10 + seed[:, None] + method + rest
    deltas = {
        name: scores[None, :, k] for k, name in enumerate(("dwa", "mgda", "pcgrad"))
    }
    deltas[EQUAL] = np.zeros((1, 3))
    found = report.seed_spread(report.Values(["a"], deltas, deltas, []))["a"]
    np.testing.assert_allclose(found.between, 1.0)
    np.testing.assert_allclose(found.noise, math.sqrt(4 * 0.3**2 / (2 * 2) / 3))
    # The sums of squares over seeds are 2.7² + 0.3² + 3², 3.3² + 0.3² + 3² and 18.
    squares = 2.7**2 + 0.3**2 + 3**2 + 3.3**2 + 0.3**2 + 3**2 + 18
    np.testing.assert_allclose(found.within, math.sqrt(squares / 2 / 3))
    # All seeds order the methods alike: χ² is largest, and F infinite.
    assert found.p == 0
    same = {name: np.ones((1, 3, 1))[..., 0] for name in ("dwa", "mgda")}
    found = report.seed_spread(report.Values(["a"], same, same, []))["a"]
    assert (found.within, found.between, found.noise, found.p) == (0, 0, 0, 1)
    alone = {"dwa": np.ones((1, 3))}
    assert report.seed_spread(report.Values(["a"], alone, alone, [])) == {}


def test_detectable_difference():
    factors = {EQUAL: 1.0, "dwa": lambda i: 1 + i / 100}
    _, values = values_of(made_up(factors), tuple(factors))
    # Quantiles of Student's distribution with 5 degrees of freedom.
    np.testing.assert_allclose(values.deltas["dwa"].mean(1), np.arange(6.0), atol=1e-9)
    wanted = np.std(np.arange(6.0), ddof=1) * (2.5705818 + 0.9195438) / math.sqrt(6)
    np.testing.assert_allclose(report.detectable(values), wanted, rtol=1e-6)


def test_incomplete_rows():
    lines = made_up(FACTORS)
    rows = (SINGLE, *FACTORS)
    without = [x for x in lines if (x["set"], x["row"]) != ("set:3", "dwa")]
    board, values = values_of(without)
    assert "set:3" not in values.sets
    assert len(values.sets) == 5
    text = text_of(board, values, (53, 54))
    assert "incomplete: 53 of 54 jobs" in text
    # No set is complete.
    board, values = values_of([x for x in lines if x["row"] != "dwa"])
    assert values.sets == []
    assert report.entries(board, values, {}) == []
    assert page.conclusions(values, []) == []
    text = text_of(board, values, (0, 54))
    assert text.startswith(
        "# Leaderboard\n\n**Which method should I use?** No set is complete yet"
    )
    assert "## Limits" in text
    # A row that does not run for a known reason does not hold up the others.
    refused = [
        job_line(x["set"], x["row"], error="needs 3 tasks")
        if (x["set"], x["row"], x.get("kind")) == ("set:3", "dwa", "job")
        else x
        for x in lines
        if (x["set"], x["row"]) != ("set:3", "dwa") or x.get("kind") == "job"
    ]
    complete = values_of(lines)[1]
    kept = [i for i, name in enumerate(complete.sets) if name != "set:3"]
    board, values = values_of(refused)
    assert len(values.sets) == 6
    (entry,) = report.partial(board, values)
    assert (entry["label"], entry["sets"]) == ("DWA", 5)
    for name, row in (("delta_m", "dwa"), ("equal", EQUAL)):
        assert entry[name] == pytest.approx(complete.deltas[row][kept].mean())
    *_, table = page.partial_table(board, values)
    assert f"| DWA | 5 | {page.number(entry['delta_m'])} |" in table
    assert page.partial_table(board, complete) == []
    assert values.missing == ["dwa"]
    text = "\n".join(page.notes(result_of(board, values), Config()))
    assert "DWA does not run on set:3 (needs 3 tasks)." in text
    assert set(values.deltas) == {*rows, ORACLE} - {"dwa"}


def test_a_row_that_diverges_everywhere_is_the_last():
    lines = made_up({EQUAL: 1.0, STATIC: 1.0, "pcgrad": 1.0})
    for i in range(6):
        lines.append(job_line(f"set:{i}", "dwa"))
        bad = run_lines(f"set:{i}", "dwa", [[0.1, 0.1]] * 4, score=math.nan)
        lines += [{**row, "diverged": True} for row in bad]
    rows = (EQUAL, STATIC, "pcgrad", "dwa")
    board, values = values_of(lines, rows)
    np.testing.assert_array_equal(values.deltas["dwa"], 100)
    entry = report.entries(board, values, {})[-1]
    table = {e["row"]: e for e in report.entries(board, values, {})}
    assert entry["kind"] == "control"
    assert table["dwa"]["diverged"] == table["dwa"]["runs"] == 24
    assert table["dwa"]["rank"] == 4
    assert "DWA diverged at all rates" in "\n".join(
        page.notes(result_of(board, values), Config())
    )


def test_denominators_have_a_floor_and_excluded_tasks_do_not_count():
    def cell(*errors):
        values = np.array([errors])
        return report.Cell(values, values, np.array([False]), 1.0, None, 0.0, 1, 1, 0)

    base, other = cell(0.001, 0.5, math.nan), cell(0.011, 0.6, math.nan)
    found = report.delta_m(other, base, [True, True, True])
    np.testing.assert_allclose(found, (50 + 20) / 2)
    np.testing.assert_allclose(report.delta_m(other, base, [False, True, True]), 20)


def test_the_rate_is_selected_by_validation_and_ends_are_marked():
    rows = []
    for lr, score, error in ((0.1, 0.5, 0.1), (0.3, 0.4, 0.2), (0.9, 0.6, 0.3)):
        rows += run_lines("s", "dwa", [[error, error]] * 2, lr=lr, score=score)
    found = report.cell_of(rows)
    assert (found.lr, found.edge, found.tried, found.runs) == (0.3, None, 3, 6)
    np.testing.assert_array_equal(found.chosen, 0.2)
    assert report.cell_of(rows[:8]).edge == "high"
    # Configurations of static weights have no order, and no ends.
    static = [{**row, "config": int(row["lr"] != 0.3)} for row in rows]
    assert report.cell_of([x for x in static if x["lr"] < 0.9]).edge is None


def test_bars_of_the_diagram_join_rows_without_a_difference():
    d = {name: np.full((20, 2), v) for name, v in zip("abcd", range(4), strict=True)}
    noise = np.random.default_rng(0).normal(size=(4, 20, 1))
    # a and b are alike, c and d are worse by far.
    deltas = {
        name: 0.1 * noise[i] + (10 * d[name] if name in "cd" else 0)
        for i, name in enumerate("abcd")
    }
    values = report.Values([str(i) for i in range(20)], deltas, deltas, [])
    found = figures.cliques(values, {"a": 1.4, "b": 1.6, "c": 3.0, "d": 4.0})
    assert found == [(1.4, 1.6)]


RATES = (1e-3, 3e-3, 1e-2)


def large(methods, sets):
    """A board of many rows at three rates, with noise."""
    rng = np.random.default_rng(2)
    rows = (EQUAL, NULL, STATIC, *methods)
    factors = {row: 1 + 0.3 * rng.normal() ** 2 for row in rows}
    lines = made_up(factors, sets=sets, noise=0.05)
    more = []
    for line in lines:
        if "lr" in line and line["row"] != STATIC:
            for k, lr in enumerate(RATES[:2]):  # the made-up rate is 0.01
                score = line["val_score"] + 0.2 * (2 - k)
                more.append({**line, "lr": lr, "val_score": score})
    board, values = values_of([*lines, *more], (SINGLE, *rows))
    costs = {row: {"step_ratio": float(1 + rng.exponential())} for row in rows}
    return board, values, report.entries(board, values, costs)


def all_figures(board, values, table):
    return {
        "ranks": figures.ranks(values, table),
        "delta": figures.delta(values, table),
        "heat": figures.heat(board, values, table),
        "cost": figures.cost(table),
        "rates": figures.rates(board, values, table),
        "seeds": figures.seeds(values),
    }


def boxes(figure):
    """Extents of all visible texts, and of the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = canvas.get_renderer()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    # Labels of ticks beyond the limits of an axis are not drawn.
    hidden = {
        id(label)
        for axis in figure.axes
        for line, limits in (
            (axis.xaxis, axis.get_xlim()),
            (axis.yaxis, axis.get_ylim()),
        )
        for tick in line.get_major_ticks()
        if not min(limits) <= tick.get_loc() <= max(limits)
        for label in (tick.label1, tick.label2)
    }
    return [
        (t.get_text(), t.get_window_extent(drawn)) for t in texts if id(t) not in hidden
    ], figure.bbox


def unreadable(figure):
    """Texts that leave the figure, and pairs of texts that cover each other."""
    texts, frame = boxes(figure)
    found = [
        text
        for text, box in texts
        if not (frame.x0 <= box.x0 and box.x1 <= frame.x1)
        or not (frame.y0 <= box.y0 and box.y1 <= frame.y1)
    ]
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        touch = 0.2 * min(a.height, b.height)  # of the space between lines
        if wide > touch and high > touch:
            found.append((one, other))
    return found


@pytest.mark.parametrize(
    ("methods", "sets"),
    [
        pytest.param(("dwa", "pcgrad"), 2, id="two"),
        pytest.param(CLASSICS[1:], 6, id="classics"),
        pytest.param(tuple(mtljax.METHODS)[1:], 12, id="all", marks=pytest.mark.deep),
    ],
)
def test_figures_can_be_read(methods, sets):
    """No text leaves a figure or covers another, and no legend is on the data."""
    for name, figure in all_figures(*large(methods, sets)).items():
        assert unreadable(figure) == [], name
        assert all(axis.get_legend() is None for axis in figure.axes)


def test_overlaps_are_found():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.51, 0.5, "two")
    figure.text(0.98, 0.1, "leaves the figure")
    assert unreadable(figure) == ["leaves the figure", ("one", "two")]


def test_curves_of_the_learning_rates():
    board, values, table = large(("dwa", "mgda", "pcgrad"), 3)
    found = figures.curves_of(board, values, table)
    assert {name: len(cells) for name, cells in found.items()} == {
        "equal weights": 3,
        "single task": 3,
        "loss balancing": 3,
        "gradient balancing": 6,
    }
    # The made-up scores are 0.4 and 0.2 larger below the best rate.
    left, right = figures.rates(board, values, table).axes
    for line in left.lines:
        if len(line.get_xdata()) == 3 and line.get_label()[0] != "_":
            np.testing.assert_allclose(line.get_ydata(), np.exp([0.4, 0.2, 0]))
    heights = [bar.get_height() for bar in right.patches]
    assert sorted(heights) == [0] * 6 + [100] * 3  # three families, three rates


def test_scores_of_rates():
    rows = [
        *run_lines("s", "dwa", [[0.1, 0.1]] * 2, lr=0.1, score=-1.0),
        *run_lines("s", "dwa", [[0.1, 0.1]] * 2, lr=0.3, score=-2.0)[:1],
        *run_lines("s", "dwa", [[0.1, 0.1]] * 2, lr=0.3, score=math.nan)[1:2],
    ]
    assert report.scores_of(rows) == {0.1: -1.0, 0.3: math.inf}
    assert figures.excess({0.1: -1.0, 0.3: math.inf}, 0.3) == math.inf
    assert math.isnan(figures.excess({0.1: math.inf}, 0.1))


def test_labels_are_moved_apart():
    given = [3.0, 0.0, 0.1, 0.2, 10.0, 3.1]
    placed = figures.spread_out(given, 1.0)
    assert (np.diff(np.sort(placed)) >= 1 - 1e-12).all()
    assert np.argsort(placed, kind="stable").tolist() == np.argsort(given).tolist()
    assert placed[4] == 10
    np.testing.assert_allclose(placed[[1, 2, 3]], [-0.9, 0.1, 1.1])


def test_equal_rows_are_equal_bytes(tmp_path):
    lines = made_up({EQUAL: 1.0})
    first = packed.pack(lines)
    assert first[4:8] == bytes(4)  # gzip stores the time there
    assert packed.pack(lines) == first
    path = tmp_path / "results.jsonl.gz"
    path.write_bytes(first)
    assert packed.unpack(path) == lines


# --- errors and losses ----------------------------------------------------------------


def test_errors_of_tasks():
    y = RNG.integers(0, 2, 40).astype(float)
    out = RNG.integers(0, 5, 40).astype(float)  # with ties
    pairs = [
        1.0 if a < b else 0.5 if a == b else 0.0
        for a, b in itertools.product(out[y == 1], out[y == 0])
    ]
    np.testing.assert_allclose(problem.one_minus_auc(out, y), np.mean(pairs))
    assert math.isnan(problem.one_minus_auc(out, np.ones(40)))
    target, out = RNG.normal(size=30), RNG.normal(size=30)
    r2 = float(metrics.r2(jnp.asarray(out), jnp.asarray(target)))
    np.testing.assert_allclose(problem.rrmse(out, target) ** 2, 1 - r2, rtol=1e-4)
    assert math.isnan(problem.rrmse(out, np.ones(30)))


def toy(tasks, y, **more):
    """A problem without a model."""
    part = problem.Part(jnp.zeros((1, len(y), 3)), jnp.asarray(y, jnp.float32)[None])
    missing = bool(np.isnan(y).any())
    given = {
        "name": "toy",
        "tasks": tasks,
        "counted": np.ones(len(tasks), bool),
        "parts": {"train": part, "val": part, "test": part},
        "batch_size": 2,
        "missing": missing,
        "digest": "",
        "model": None,
        **more,
    }
    return problem.Problem(**given)


MIXED = (
    Task("number", "regression", 1),
    Task("label", "classification", 2),
    Task("class", "classification", 3),
)


def test_losses_of_mixed_tasks_by_hand():
    y = np.array([[1.0, 1, 2], [0.5, 0, 0]])
    out = np.array([[0.0, 2.0, 1.0, 2.0, 3.0], [0.5, -1.0, 0.0, 0.0, 0.0]])
    found = problem.task_losses(toy(MIXED, y), jnp.asarray(out), jnp.asarray(y))
    softplus = lambda v: math.log1p(math.exp(v))
    wanted = [
        (1.0 + 0.0) / 2,
        (softplus(-2.0) + softplus(-1.0)) / 2,
        (math.log(math.exp(1) + math.exp(2) + math.exp(3)) - 3 + math.log(3)) / 2,
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    error = problem.errors(toy(MIXED, y), out, y)
    # The residuals are 1 and 0, the deviations from the mean 1/4.
    np.testing.assert_allclose(error, [math.sqrt(1 / 0.125), 0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_tasks_of_one_kind_and_missing_labels(kind):
    tasks = tuple(Task(n, kind, 1 if kind == "regression" else 2) for n in "ab")
    y = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 0.0]])
    out = RNG.normal(size=(3, 2))
    given = toy(tasks, y)
    losses = problem.task_losses(given, jnp.asarray(out), jnp.asarray(y))
    each = np.square(out - y)
    if kind == "classification":
        each = np.log1p(np.exp(out)) - out * y
    np.testing.assert_allclose(losses, np.nanmean(each, 0), rtol=1e-5)
    changed = np.where(np.isnan(y), 7.0, out)  # outputs without a label
    same = problem.task_losses(given, jnp.asarray(changed), jnp.asarray(y))
    np.testing.assert_array_equal(losses, same)
    grad = jax.grad(lambda o: problem.task_losses(given, o, jnp.asarray(y)).sum())
    assert not np.asarray(grad(jnp.asarray(out)))[np.isnan(y)].any()


def test_scores():
    given = toy(MIXED, np.zeros((2, 3)), counted=np.array([True, True, False]))
    errors = np.array([0.5, 0.001, 0.9])
    wanted = (math.log(0.5) + math.log(0.02)) / 2
    np.testing.assert_allclose(problem.score(given, errors), wanted)
    np.testing.assert_allclose(problem.score(given, errors, 2), math.log(0.9))
    assert problem.score(given, np.array([0.5, np.nan, 1.0])) == math.log(0.5)
    assert problem.score(given, np.array([np.inf, 0.1, 0.1])) == math.inf
    assert math.isnan(problem.score(given, np.array([np.nan, np.nan, 0.1])))
    infinite = problem.errors(given, np.full((2, 5), np.inf), np.ones((2, 3)))
    assert np.isinf(infinite).all()


def test_batches_are_epochs_without_replacement():
    found = problem.orders(10, 3, 7, range(2))
    assert found.shape == (2, 7, 3)
    for seed in range(2):
        assert len(set(found[seed, :3].ravel())) == 9
    assert (found[0] != found[1]).any()


def test_the_losses_of_the_constant_predictor():
    y = np.array([[1.0, 1, 2], [0.0, 0, 0], [2.0, 0, 1], [1.0, 0, 0]])
    entropy = lambda *p: -sum(x * math.log(x) for x in p)
    wanted = [0.5, entropy(0.25, 0.75), entropy(0.5, 0.25, 0.25)]
    np.testing.assert_allclose(train.constant_losses(toy(MIXED, y)), wanted)


# --- linear references ----------------------------------------------------------------


def test_ridge_solves_the_normal_equations():
    x, y = RNG.normal(size=(30, 5)), RNG.normal(size=30)
    ones = np.column_stack([x, np.ones(30)])
    for penalty, found in zip(
        (0.1, 3.0), reference.ridge(reference.Part(x, y), (0.1, 3.0)), strict=True
    ):
        weight = 30 * penalty * np.diag([1, 1, 1, 1, 1, 0])
        wanted = np.linalg.solve(ones.T @ ones + weight, ones.T @ y)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def linear_toy(noise=0.5, seeds=2, counts=(400, 200, 4000)):
    """A number, a label and a class that depend on the features, with known scores."""
    rng = np.random.default_rng(3)
    tasks = (*MIXED[:2], Task("class", "classification", 3))
    parts = {}
    for name, count in zip(("train", "val", "test"), counts, strict=True):
        x = rng.normal(size=(seeds, count, 4))
        number = x[..., 0] + noise * rng.normal(size=(seeds, count))
        label = rng.random((seeds, count)) < 0.5
        x[..., 1] = rng.normal(size=(seeds, count)) + np.where(label, 1.0, -1.0)
        kind = rng.choice(3, (seeds, count), p=[0.5, 0.25, 0.25])
        x[..., 2] = 10.0 * (kind == 1)
        x[..., 3] = 10.0 * (kind == 2)
        y = np.stack([number, label, kind], 2).astype(np.float32)
        parts[name] = problem.Part(jnp.asarray(x, jnp.float32), jnp.asarray(y))
    y = np.zeros((2, 3))
    return toy(tasks, y, parts=parts, counted=np.array([True, True, False]))


def test_references_reach_the_best_possible_scores():
    found = reference.reference(linear_toy())
    assert found["metrics"] == ["R²", "AUC", "accuracy"]
    # R² = 1/(1 + noise²). Two normal classes at distance 2: AUC = Φ(2/√2).
    auc = 0.5 * (1 + math.erf(1.0))
    np.testing.assert_allclose(found["linear"], [0.8, auc, 1.0], atol=0.02)
    np.testing.assert_allclose(found["constant"], [0.0, 0.5, 0.5], atol=0.03)
    wanted = ((0.8 - 0) / 0.1 + (auc - 0.5) / 0.05) / 2
    np.testing.assert_allclose(reference.gain(found), wanted, atol=0.5)
    # Missing labels are left out: the scores of the rest are close.
    given = linear_toy()
    train_part = given.parts["train"]
    gaps = train_part._replace(y=train_part.y.at[:, ::2].set(jnp.nan))
    missing = given._replace(parts={**given.parts, "train": gaps})
    again = reference.reference(missing)
    np.testing.assert_allclose(again["linear"], found["linear"], atol=0.02)


def test_verdicts_against_a_reference():
    found = {
        "metrics": ["R²", "AUC", "accuracy"],
        "counted": [True, True, False],
        "constant": [0.0, 0.5, 0.2],
        "linear": [0.75, 0.8, 0.9],
    }
    error = lambda d: np.array([[math.sqrt(0.25 - d), 0.2 - d, 0.7]])
    words = {d: reference.compare(found, error(d)).word for d in (-0.04, 0.02, 0.04)}
    assert words == {-0.04: "worse", 0.02: "tie", 0.04: "better"}
    one = reference.compare(found, error(0.02))
    np.testing.assert_allclose((one.linear, one.network), (0.775, 0.795))
    assert one.metrics == "R², AUC"
    # A set needs 0.1 of R² or 0.05 of AUC; the excluded task does not count.
    weak = {**found, "linear": [0.09, 0.54, 0.9]}
    assert reference.gain(weak) < 1 < reference.gain({**weak, "linear": [0.2, 0.55, 0]})


def test_the_page_names_sets_with_bad_networks():
    board, values = values_of(made_up(FACTORS, sets=3))
    # Errors of the single-task networks are 0.4 and 0.2: R² 0.84, AUC 0.8.
    linear = {"set:0": [0.84, 0.8], "set:1": [0.84, 0.9], "set:2": [0.5, 0.5]}
    references = {
        name: {
            "metrics": ["R²", "AUC"],
            "counted": [True, True],
            "constant": [0.0, 0.5],
            "linear": scores,
        }
        for name, scores in linear.items()
    }
    (text,) = page.reference_check(result_of(board, values, references))
    assert "on 2 of 3 sets" in text
    assert "worse on set:1. The training recipe is WRONG" in text
    result = result_of(board, values, {"set:0": references["set:0"], "set:1": "no."})
    (text,) = page.reference_check(result)
    assert text.endswith("AUC or accuracy).")
    assert "There is no linear reference for set:1: no." in page.notes(result, Config())
    table = page.reference_table(result)[1]
    assert "| set:0 | R², AUC | 0.250 | 0.820 | 0.820 | tie |" in table


# --- configuration and methods --------------------------------------------------------


def test_presets():
    for _, config in PRESETS.values():
        check(config)
    cpu = PRESETS["cpu"][1]
    assert len(cpu.sets) == 12
    assert set(cpu.chosen) == set(mtljax.METHODS)
    quick = PRESETS["quick"][1]
    assert (quick.sets, set(quick.chosen)) == (SMALL, set(CLASSICS))
    assert set(CLASSICS) | set(AUXILIARY) <= set(mtljax.METHODS)


# Numbers of examples and of tasks.
SIZES = {
    "enb": (768, 2),
    "jura": (359, 3),
    "adult": (17_000, 3),
    "digits": (7000, 3),
    "faces": (624, 4),
    "emotions": (593, 6),
    "multi_mnist": (7000, 2),
    "atp1d": (337, 6),
    "scene": (2407, 6),
    "tox21": (8006, 12),
    "yeast": (2417, 14),
    "oes97": (334, 16),
    "oes10": (403, 16),
    "birds": (645, 19),
    "slump": (103, 3),
}


def test_the_gpu_preset_is_short():
    """The largest sets; 1 ms per step of all seeds, and 4 s per program."""
    assert set(SIZES) == set(SETS)
    gpu = PRESETS["gpu"][1]
    largest = sorted(SIZES, key=lambda name: -SIZES[name][0])[:7]
    assert set(gpu.sets) == set(largest)
    methods = [row for row in gpu.rows if report.kind_of(row) == "method"]
    assert report.smallest_p(len(gpu.sets), len(methods)) < report.LEVEL
    rates = len(gpu.lrs)
    others = {WIDE: 5 * rates + 1}  # a run of equal weights gives a vector of weights
    runs = sum(
        SIZES[name][1] * rates if row == SINGLE else others.get(row, rates)
        for name in gpu.sets
        for row in gpu.rows
    )
    programs = len(gpu.sets) * (2 + len(methods))  # one is that of all static weights
    assert gpu.extensions == 0
    assert runs * gpu.steps * 1e-3 + programs * 4 <= 600


@pytest.mark.parametrize("name", mtljax.METHODS)
def test_every_method_is_built_for_every_length(name):
    for steps in (20, 2000):
        balancer = options.balancer(
            name, 4, steps=steps, key=jax.random.key(0), weights=jnp.ones(4)
        )
        assert balancer.num_tasks == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add": ("mgda",)}, "--add: 'mgda' is not module:function"),
        ({"add": ("a:b", "a:b")}, "--add must name each value once"),
        ({"sets": ("wq",)}, "--sets: unknown name 'wq'"),
        ({"sets": ("enb", "enb")}, "--sets must name each value once"),
        ({"methods": ("sum",)}, "--methods: unknown name 'sum'"),
        ({"methods": ()}, "--methods is empty"),
        ({"steps": 150}, "--steps 150 must be a multiple"),
        ({"report_only": True, "train_only": True}, "exclude each other"),
        ({"check_sets": True, "train_only": True}, "exclude each other"),
        ({"recheck": 1, "report_only": True}, "--report-only and --recheck exclude"),
    ],
)
def test_options_that_cannot_be_run(change, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(PRESETS["cpu"][1], **change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such:f", "--add no_such:f: No module named 'no_such'. Give module:f"),
        ("math:squirt", "has no attribute 'squirt'. Give module:function"),
        (":f", "--add :f: .*. Give module:function, with the module on PYTHONPATH"),
        ("math:pi", "--add math:pi: it is not a function"),
    ],
)
def test_methods_that_cannot_be_imported(name, message):
    with pytest.raises(ConfigError, match=message):
        options.external(name)


def test_a_set_that_cannot_be_imported_is_named_as_a_set():
    config = Config(sets=("math:squirt",), data_dir=pathlib.Path("nowhere"))
    with pytest.raises(DataError, match="Data set 'math:squirt' cannot be loaded"):
        problem.load(config, "math:squirt")


# --- the queue ------------------------------------------------------------------------


def test_jobs_are_in_the_order_of_their_cost(tmp_path):
    config = Config(sets=("mine:own", "yeast", "enb"), methods=("mgda", "linear"))
    found = queue.jobs(config)
    assert list(dict.fromkeys(job.set for job in found)) == ["enb", "yeast", "mine:own"]
    rows = [job.row for job in found if job.set == "enb"]
    assert rows == [EQUAL, SINGLE, NULL, STATIC, WIDE, USELESS, "linear", "mgda"]
    folders = [job.folder(tmp_path) for job in found]
    assert len(set(folders)) == len(found)


def test_all_rows_start_from_the_grid_of_equal_weights(tmp_path):
    config = Config(out=tmp_path, lrs=(0.1, 0.3))
    equal, other = queue.Job("enb", EQUAL), queue.Job("enb", "mgda")
    assert queue.grid(config, equal) == (0.1, 0.3)
    assert queue.grid(config, other) is None
    lines = [job_line("enb", EQUAL)]
    for lr in (0.1, 0.3, 0.9):
        lines += run_lines("enb", EQUAL, [[0.1, 0.1]], lr=lr)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    queue.write(equal.folder(tmp_path) / "rows.jsonl", text)
    assert queue.grid(config, other) == (0.1, 0.3, 0.9)


def test_a_folder_belongs_to_its_settings(tmp_path):
    config = Config(out=tmp_path)
    queue.open_folder(config)
    with pytest.raises(ConfigError, match="Add --resume or --overwrite"):
        queue.open_folder(config)
    again = dataclasses.replace(config, resume=True, sets=("enb",), jobs=2)
    queue.open_folder(again)
    with pytest.raises(ConfigError, match=r"other settings \(steps\)"):
        queue.open_folder(dataclasses.replace(again, steps=1000))
    empty = Config(out=tmp_path / "none", report_only=True)
    with pytest.raises(ConfigError, match="has no results"):
        queue.open_folder(empty)


# --- small runs -----------------------------------------------------------------------

MODULE = """
import numpy as np
import mtljax
from mtljax.data import Dataset, Task

def tables(*, seed=0):
    def split(n):
        rng = np.random.default_rng([seed, n])
        x = rng.normal(size=(n, 4, 1, 1)).astype(np.float32)
        noise = 0.3 * rng.normal(size=(n, 2)).astype(np.float32)
        return {"image": x, "one": x[:, 0, 0, 0] + noise[:, 0],
                "two": (x[:, 1, 0, 0] + noise[:, 1] > 0).astype(np.int32)}
    tasks = (Task("one", "regression", 1), Task("two", "classification", 2))
    return Dataset("tables", tasks, (4, 1, 1), *map(split, (64, 40, 50)), image_max=1)

def noise(*, seed=0):
    found = tables(seed=seed)
    for part in (found.train, found.val, found.test):
        rng = np.random.default_rng(len(part["image"]))
        for task in found.tasks:
            part[task.name] = rng.permutation(part[task.name])
    return found

def twice(num_tasks, *, key=None):
    return mtljax.linear(num_tasks, weights=[2.0] * num_tasks)

def broken(num_tasks, *, key=None):
    raise ValueError("broken needs other tasks.")
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A module with a data set and two methods, and a configuration that trains it."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_board.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    config = Config(
        sets=("mine_board:tables",),
        methods=("linear",),
        lrs=(1e-3, 1e-2),
        steps=20,
        eval_every=10,
        batch_size=16,
        small_batch=16,
        hidden=(4,),
        seeds=2,
        extensions=0,
        cost_rounds=0,
        plots=False,
        out=folder / "out",
    )
    yield config
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def finished(mine):
    """A finished run. The process keeps its cache of programs and its flags."""
    flags, cache = os.environ.get("XLA_FLAGS"), jax.config.jax_compilation_cache_dir
    command.main(mine, "test")
    yield mine
    jax.config.update("jax_compilation_cache_dir", cache)
    os.environ.pop("XLA_FLAGS", None)
    if flags is not None:
        os.environ["XLA_FLAGS"] = flags


def rows_in(config, row):
    job = queue.Job(config.sets[0], row)
    lines = queue.read_rows(config.out, [job])
    return lines[0], lines[1:]


def test_linear_equals_equal_weights_bit_by_bit(finished):
    without = lambda rows: [{k: v for k, v in r.items() if k != "row"} for r in rows]
    linear, equal = rows_in(finished, LINEAR)[1], rows_in(finished, EQUAL)[1]
    assert without(linear) == without(equal)
    null = rows_in(finished, NULL)[1]
    assert without(null) != without(equal)


def test_rows_of_a_small_run(finished):
    head, rows = rows_in(finished, SINGLE)
    assert head["examples"] == {"train": 64, "val": 40, "test": 50}
    assert {row["task"] for row in rows} == {"one", "two"}
    assert len(rows) == 2 * 2 * 2 * 2  # tasks, rates, seeds, chosen and last
    static = rows_in(finished, STATIC)[1]
    assert {row["config"] for row in static} == {0, 1}
    wide = rows_in(finished, WIDE)[1]
    assert {row["config"] for row in wide} == set(range(10))
    for row in wide:
        np.testing.assert_allclose(sum(row["weights"]), 2, atol=1e-5)
    # The configuration of equal weights is the row of equal weights.
    equal = rows_in(finished, EQUAL)[1]
    ones = [r for r in wide if r["weights"] == [1.0, 1.0]]
    assert [r["test"] for r in ones] == [r["test"] for r in equal]


def test_files_of_a_report(finished):
    found = json.loads((finished.out / "leaderboard.json").read_text())
    assert found["jobs"] == {"done": 7, "all": 7}
    assert {e["row"] for e in found["rows"]} == {*finished.rows, ORACLE}
    header = json.loads((finished.out / "header.json").read_text())
    assert header["kind"] == "header"
    assert header["data"]
    text = (finished.out / "LEADERBOARD.md").read_text()
    assert "too short for any conclusion" in text
    assert "`linear` and equal weights are equal bit by bit" in text


def test_a_resumed_run_writes_the_same_bytes(finished):
    path = finished.out / "results.jsonl.gz"
    before = path.read_bytes()
    job = queue.Job(finished.sets[0], EQUAL)
    stamps = {
        j: (j.folder(finished.out) / "rows.jsonl").stat().st_mtime_ns
        for j in queue.jobs(finished)
    }
    (job.folder(finished.out) / "rows.jsonl").unlink()
    command.main(dataclasses.replace(finished, resume=True), "test")
    assert path.read_bytes() == before
    for other, stamp in stamps.items():
        new = (other.folder(finished.out) / "rows.jsonl").stat().st_mtime_ns
        assert (new == stamp) == (other != job)


def test_a_report_is_made_of_its_own_files(finished, tmp_path):
    """What is committed is complete: its rows give the same text again."""
    to = tmp_path / "leaderboard" / "results"
    command.main(dataclasses.replace(finished, report_only=True, report_to=to), "test")
    names = {"results.jsonl.gz", "header.json", "leaderboard.json", "LEADERBOARD.md"}
    before = {path.name: path.read_bytes() for path in to.iterdir()}
    assert set(before) == names
    command.main(dataclasses.replace(finished, report_only=True, out=to), "again")
    assert {path.name: path.read_bytes() for path in to.iterdir()} == before
    # RESULTS.md cites it.
    found = boards.read(to)
    assert "## Leaderboard of methods\n\n" + found["answer"] in results.page(tmp_path)
    assert boards.read(tmp_path) is None
    assert "Leaderboard" not in results.page(tmp_path / "none")
    other = dataclasses.replace(finished, report_only=True, out=to, steps=40)
    with pytest.raises(ConfigError, match=r"other settings \(steps\)"):
        command.main(other, "test")


def test_sets_without_signal_are_refused(mine, capsys):
    for name, status in (("tables", 0), ("noise", 1)):
        sets = (f"mine_board:{name}",)
        with pytest.raises(SystemExit) as stop:
            command.main(dataclasses.replace(mine, sets=sets, check_sets=True), "")
        assert stop.value.code == status
        said = capsys.readouterr().out
        assert ("REFUSED" if status else "accepted") in said
        assert "(R², AUC)" in said


def test_finished_cells_are_trained_again(finished, tmp_path, capsys):
    """The first cell is equal bit by bit. The second one is changed by 1e-6."""
    lines = packed.unpack(finished.out / "results.jsonl.gz")
    jobs = list(dict.fromkeys(queue.Job(x["set"], x["row"]) for x in lines))
    chosen = recheck.sample(jobs, 2)
    at = next(
        i
        for i, x in enumerate(lines)
        if queue.Job(x["set"], x["row"]) == chosen[1] and "test" in x
    )
    lines[at]["test"][0] += 1e-6
    (tmp_path / "results.jsonl.gz").write_bytes(packed.pack(lines))
    text = (finished.out / "header.json").read_text()
    (tmp_path / "header.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        command.main(dataclasses.replace(finished, recheck=2, out=tmp_path), "test")
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"{chosen[0].row}: largest difference 0" in said
    assert "2 cells trained again, and 1 differ, by at most 1e-06." in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.jsonl.gz",
        "header.json",
    }
    empty = dataclasses.replace(finished, recheck=1, out=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"--recheck: .*none has no results"):
        command.main(empty, "test")
    text = "3 cells trained again, and all numbers are equal bit by bit."
    assert recheck.sentence([0.0] * 3, finished) == text
    other = json.loads((tmp_path / "header.json").read_text())
    other["versions"]["jax"] = "0"
    (tmp_path / "header.json").write_text(json.dumps(other))
    moved = dataclasses.replace(finished, out=tmp_path)
    assert recheck.sentence([0.5], moved) == (
        "1 cell trained again, and 1 differ, by at most 0.5; other jax than in the "
        "header."
    )


def test_lines_are_compared():
    one = {"row": "dwa", "lr": 0.1, "test": [0.5, None], "diverged": False}
    assert recheck.compare([one], [one]) == 0
    assert recheck.compare([one], [{**one, "test": [0.5, math.nan]}]) == 0
    assert recheck.compare([one], [{**one, "test": [0.75, None]}]) == 0.25
    assert recheck.compare([one], [{**one, "diverged": True}]) == 1
    assert recheck.compare([one], [{**one, "test": [0.5, 0.5]}]) == math.inf
    assert recheck.compare([one], [{**one, "row": "mgda"}]) == math.inf
    assert recheck.compare([one], [one, one]) == math.inf


COMMITTED = boards.FOLDER


def committed_result():
    """The statistics of the committed rows, and their configuration and header."""
    head = json.loads((COMMITTED / "header.json").read_text())
    old = json.loads((COMMITTED / "leaderboard.json").read_text())
    given = {
        k: tuple(v) if isinstance(v, list) else v for k, v in head["config"].items()
    }
    config = Config(**given)
    lines = packed.unpack(COMMITTED / "results.jsonl.gz")
    return (
        report.result_of(config, lines, old["costs"], old["references"]),
        config,
        head,
    )


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="no rows are committed")
def test_the_committed_report():
    """Its text follows from its rows, and it says where they come from."""
    drawn = [name for name in page.CAPTIONS if (COMMITTED / f"{name}.png").is_file()]
    plots = {f"{name}.png" for name in drawn}
    names = {"results.jsonl.gz", "header.json", "leaderboard.json", "LEADERBOARD.md"}
    assert {path.name for path in COMMITTED.iterdir()} == names | plots
    result, config, head = committed_result()
    assert provenance.check_form(head) + provenance.check_header(head) == []
    presets = [queue.about(preset) for _, preset in PRESETS.values()]
    assert queue.about(config) in presets  # but for the sets and the methods
    text = page.text(result, config, head, drawn)
    assert (COMMITTED / "LEADERBOARD.md").read_text() == text
    answer = page.answer(result.values, result.table)
    assert boards.read(COMMITTED)["answer"] == answer
    readme = (COMMITTED.parent / "README.md").read_text()
    assert answer in " ".join(readme.split())
    assert "No rows are committed" not in readme
    index = (ROOT / "experiments" / "README.md").read_text()
    assert "leaderboard/results/LEADERBOARD.md" in index


def test_the_short_table():
    """What RESULTS.md and the pages of the site show."""
    board, values = values_of(made_up(FACTORS, sets=8))
    costs = {"dwa": {"step_ratio": 1.5}}
    result = report.Result(
        board, values, report.entries(board, values, costs), (8, 9), costs, {}
    )
    found = {**training.to_json(report.as_json(result)), "dirty": False}
    lines = boards.summary(found, "page.md", lambda entry: f"<{entry['row']}>")
    assert lines[0] == found["answer"] + " Incomplete: 8 of 9 jobs."
    assert "- " + found["conclusions"][0] in lines
    rows = [line for line in lines if line.startswith("| <")]
    # The mean factors are 0.865, 1, 1.01, 1.02, 1.021 and 1.085; Holm over two methods.
    assert rows[0].startswith("| <dwa> | -13.5 [")
    assert rows[0].endswith("] | 8 / 0 | 0.016 | x1.5 |")
    order = ["dwa", WIDE, STATIC, EQUAL, NULL, "pcgrad"]
    assert [row.split("<")[1].split(">")[0] for row in rows] == order
    assert rows[-1].startswith("| <pcgrad> | +8.5 [")
    assert rows[-1].endswith("| 0 / 8 | 0.016 |  |")
    assert "(page.md)" in lines[-1]
    assert "uncommitted" in boards.summary({**found, "dirty": True})[0]


def test_the_pages_of_the_site_include_the_leaderboard():
    pages = (ROOT / "docs" / "_ext" / "pages.py").read_text()
    included = {"choose.md": "leaderboard_answer.md", "results.md": "leaderboard.md"}
    for name, part in included.items():
        assert f'found["_generated/{part}"]' in pages
        text = (ROOT / "docs" / name).read_text()
        assert f"```{{include}} _generated/{part}\n```" in text


def test_an_added_method_trains_its_own_jobs_only(finished):
    names = ("mine_board:twice", "mine_board:broken")
    more = dataclasses.replace(finished, add=names, resume=True)
    trained = [job.row for job, _ in queue.work(more)]
    assert trained == list(names)
    head, rows = rows_in(more, names[1])
    assert (head["error"], rows) == ("broken needs other tasks.", [])
    # The heads follow their own losses, and Adam is invariant to the scale (up to ε).
    equal, twice = rows_in(more, EQUAL)[1], rows_in(more, names[0])[1]
    np.testing.assert_allclose(
        [r["test"] for r in twice], [r["test"] for r in equal], rtol=1e-3
    )
    board = report.make_board(queue.read_rows(more.out, queue.jobs(more)))
    values = report.values_of(board, more.rows)
    assert report.kind_of(names[0]) == "external"
    assert values.missing == [names[1]]


def test_a_run_continues_from_a_report(finished, tmp_path):
    """Only the new method is trained, and the old rows remain as they are."""
    report_to = tmp_path / "report"
    command.main(
        dataclasses.replace(finished, report_only=True, report_to=report_to), ""
    )
    more = dataclasses.replace(
        finished, out=tmp_path / "more", add=("mine_board:twice",), start_from=report_to
    )
    command.main(more, "test")
    old, new = (packed.unpack(f / packed.ROWS) for f in (report_to, more.out))
    assert [line for line in new if line["row"] != "mine_board:twice"] == old
    trained = [job.row for job in queue.jobs(more) if own_seconds(job, more.out)]
    assert trained == ["mine_board:twice"]
    before, board = (
        packed.read(f / "leaderboard.json")["costs"] for f in (report_to, more.out)
    )
    assert board.keys() == {*before, "mine_board:twice"}
    for row, cost in before.items():
        assert board[row] == pytest.approx(cost)
    head = packed.read(more.out / "header.json")
    assert head["earlier"] == [packed.read(report_to / "header.json")]
    # A second call takes nothing and trains nothing.
    same = (more.out / packed.ROWS).read_bytes()
    command.main(dataclasses.replace(more, resume=True), "test")
    assert (more.out / packed.ROWS).read_bytes() == same
    assert packed.read(more.out / "header.json")["earlier"] == head["earlier"]


def own_seconds(job, out):
    return "seconds" in packed.read(job.folder(out) / "time.json")


def test_reports_from_which_no_run_can_continue(finished, tmp_path):
    start = dataclasses.replace(
        finished, out=tmp_path / "out", start_from=finished.out, resume=True
    )
    with pytest.raises(ConfigError, match=r"other settings \(steps\)"):
        command.main(dataclasses.replace(start, steps=40), "")
    copy = tmp_path / "report"
    copy.mkdir()
    start = dataclasses.replace(start, start_from=copy)
    with pytest.raises(ConfigError, match=r"has no results\.jsonl\.gz"):
        command.main(start, "")
    for name in (packed.ROWS, "header.json", "leaderboard.json"):
        (copy / name).write_bytes((finished.out / name).read_bytes())
    rows = (finished.out / packed.ROWS).read_bytes()
    (copy / packed.ROWS).write_bytes(rows[:-9])
    with pytest.raises(ConfigError, match="is damaged"):
        command.main(start, "")
    lines = packed.unpack(finished.out / packed.ROWS)
    for line in lines:
        if line.get("kind") == "job":
            line["data"] = "other"
    (copy / packed.ROWS).write_bytes(packed.pack(lines))
    with pytest.raises(ConfigError, match="data of mine_board:tables are not those"):
        command.main(dataclasses.replace(start, add=("mine_board:twice",)), "")


def test_heads_follow_their_own_losses(mine):
    """The gradient of the heads is that of the sum, whatever the balancer does."""
    on = train.cached_problem(mine, mine.sets[0])
    params = jax.tree.map(lambda p: p[0], problem.initial_params(on, range(1)))
    x, y = (a[0, :16] for a in on.parts["train"])
    loss = lambda p: problem.task_losses(on, problem.predict(on, p, x), y)
    weights = jnp.array([3.0, 0.0])
    balancer = mtljax.linear(2, weights=weights)
    labels = {"trunk": "shared", "heads": "own"}
    state = balancer.init(mtljax.shared_params(params, labels))
    balanced = mtljax.value_and_balanced_grad(loss, balancer, labels=labels)
    _, grad, _ = jax.jit(balanced)(params, state)
    heads = jax.jit(jax.grad(lambda p: loss(p).sum()))(params)["heads"]
    trunk = jax.jit(jax.grad(lambda p: loss(p) @ weights))(params)["trunk"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        grad,
        {"heads": heads, "trunk": trunk},
    )


def test_the_gpu_preset_runs_two_steps(mine):
    """All programs are traced; the most expensive one is compiled and run."""
    given = PRESETS["gpu"][1]
    gpu = dataclasses.replace(
        given, sets=mine.sets, seeds=2, steps=2, eval_every=1, batch_size=32
    )
    check(gpu)
    for row in (EQUAL, USELESS, *gpu.chosen):
        trainer = train.Trainer(gpu, train.cached_problem(gpu, gpu.sets[0]), row)
        seen = jax.eval_shape(lambda t=trainer: t.outputs(gpu.lrs[0], [1.0, 1.0]))
        assert seen.val.shape == (2, 2, 40, 2)
        assert seen.test.shape == (2, 2, 50, 2)
        if row == "cagrad":
            out = trainer.outputs(gpu.lrs[0], [1.0, 1.0])
            assert jnp.isfinite(out.test).all()
            assert (out.failed == 0).all()
            assert (out.test[:, 0] != out.test[:, 1]).any()


def test_a_diverged_run_stands_still(mine):
    on = train.cached_problem(mine, mine.sets[0])
    init, step = map(jax.jit, train.make_step(mine, on, EQUAL))
    params = jax.tree.map(lambda p: p[0], problem.initial_params(on, range(1)))
    x, y = (a[0, :16] for a in on.parts["train"])
    ones = jnp.ones(2)
    state = init(params, jax.random.key(0), ones)
    after = step(state, x.at[0, 0].set(jnp.inf), y, 0.01, ones)
    assert int(after.failed) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    after = step(after, x, y, 0.01, ones)
    assert int(after.failed) == 0
    out = train.Outputs(
        val=np.zeros((2, 2, 40, 2), np.float32),
        test=np.zeros((2, 2, 50, 2), np.float32),
        failed=np.array([[0, 0], [0, 3]]),
    )
    trainer = train.Trainer(mine, on, EQUAL)
    trainer.outputs = lambda *_: out
    rows = trainer.rows(train.Try(0.01, (1.0, 1.0)))
    last = [row for row in rows if row["last"]]
    assert [row["diverged"] for row in last] == [False, True]
    assert [row["val_score"] is None for row in last] == [False, True]
    chosen = [row["step"] for row in rows if not row["last"]]
    assert chosen == [10, 10]


def test_a_validation_split_without_a_class_leaves_the_choice_to_other_seeds(mine):
    """A constant target has no score, like a label that a split lacks."""
    on = train.cached_problem(mine, mine.sets[0])
    val = on.parts["val"]
    constant = val._replace(y=jnp.asarray(val.y).at[1, :, 0].set(0.5))
    trainer = train.Trainer(
        mine, on._replace(parts=on.parts | {"val": constant}), SINGLE
    )
    out = train.Outputs(
        val=np.zeros((2, 3, 40, 2), np.float32),
        test=np.zeros((2, 3, 50, 2), np.float32),
        failed=np.zeros((2, 3), int),
    )
    out.val[:, :, :, 0] = np.asarray(val.y)[:, None, :, 0]
    out.val[0, (0, 2), :, 0] += 1.0  # the second evaluation of the first seed is best
    trainer.outputs = lambda *_: out
    rows = trainer.rows(train.Try(0.01, (1.0, 0.0), task=0))
    chosen, last = rows[:2], rows[2:]
    assert [row["step"] for row in chosen] == [20, 20]
    assert [row["step"] for row in last] == [30, 30]
    assert chosen[0]["val_score"] == chosen[1]["val_score"] == math.log(problem.FLOOR)
    assert not any(row["diverged"] for row in rows)
    out.failed[1] = 1
    rows = trainer.rows(train.Try(0.01, (1.0, 0.0), task=0))
    assert [row["val_score"] is None for row in rows] == [False, True, False, True]


def start(config, *arguments):
    """The command in a process of its own."""
    folder = str(config.out.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
    line = [
        *(sys.executable, "-m", "experiments.leaderboard", "smoke"),
        *("--sets", *config.sets, "--methods", "linear", "--lrs", "0.001", "0.01"),
        *("--steps", "20", "--eval-every", "10", "--batch-size", "16"),
        *("--small-batch", "16", "--hidden", "4", "--cost-rounds", "0"),
        *("--no-plots", "--cost-sets", *Config().cost_sets, *arguments),
    ]
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL)


@pytest.mark.deep
def test_killed_and_shared_runs_write_the_same_bytes(mine, tmp_path):
    # Not the run of this process, whose flags XLA has read before.
    whole = tmp_path / "whole"
    assert start(mine, "--out", str(whole)).wait() == 0
    wanted = (whole / "results.jsonl.gz").read_bytes()
    killed = tmp_path / "killed"
    run = start(mine, "--out", str(killed))
    for _ in range(600):
        if list(killed.glob("*/*/rows.jsonl")):
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert list(killed.glob("*/*/rows.jsonl"))
    assert start(mine, "--out", str(killed), "--resume").wait() == 0
    assert (killed / "results.jsonl.gz").read_bytes() == wanted
    shared = tmp_path / "shared"
    assert start(mine, "--out", str(shared), "--jobs", "2").wait() == 0
    assert (shared / "results.jsonl.gz").read_bytes() == wanted


@pytest.mark.data
def test_the_sets_of_the_files():
    """Sizes of the splits, and labels in all of them."""
    folder = pathlib.Path(os.environ.get("MTLJAX_DATA_DIR", "nowhere"))
    if not folder.is_dir():
        pytest.skip("no real data sets: set MTLJAX_DATA_DIR")
    config = Config(data_dir=folder, seeds=2)
    tasks = {"enb": 2, "emotions": 6, "tox21": 12, "faces": 4, "digits": 3}
    for name, count in tasks.items():
        found = problem.load(config, name)
        assert found.num_tasks == count
        assert found.missing == (name == "tox21")
        for part in found.parts.values():
            assert not np.isnan(part.y).all(1).any()
        left_out = {"expression"} if name == "faces" else set()
        names = [task.name for task in found.tasks]
        assert {n for n, c in zip(names, found.counted, strict=True) if not c} == (
            left_out
        )


def test_json_has_no_numbers_outside_of_json():
    assert training.to_json({"a": math.inf, "b": np.float64(1)}) == {"a": None, "b": 1}
    assert set(SETS) >= set(SMALL)
