import sys

import numpy as np
import pytest

from mtljax.training import plots

METHODS = [f"method_{i}" for i in range(12)]
TASKS = ["a", "b", "c"]


def history(seeds=3, last=3):
    rng = np.random.default_rng(0)
    steps = np.arange(1, 2001, 100)
    shape = (seeds, len(steps), last)
    return {
        m: plots.Curve(steps, np.exp(0.1 * rng.normal(size=shape))) for m in METHODS
    }


def scatter():
    rng = np.random.default_rng(0)
    points = {m: rng.normal(0.5, 0.02, (2, 5)) for m in METHODS}
    return plots.tradeoff_scatter(
        {m: (x, y) for m, (x, y) in points.items()},
        xlabel="accuracy a",
        ylabel="accuracy b",
        reference=(0.5, 0.5),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: plots.loss_curves(history(), TASKS, window=3),
        lambda: plots.weight_trajectories(history(), TASKS),
        lambda: plots.cosine_over_time(history(seeds=1), TASKS),
        scatter,
    ],
)
def test_figures_are_written_without_pyplot(make, tmp_path):
    before = set(sys.modules)  # other tests may have imported it
    path = plots.save(make(), tmp_path / "deep" / "figure.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_a_curve_of_one_step_is_visible():
    """A line through one point has no length, so the point has a marker."""
    for steps, marker in (([7], "o"), ([7, 8], "None")):
        values = np.ones((2, len(steps), 1))
        figure = plots.loss_curves({"a": plots.Curve(steps, values)}, ["task"])
        (line,) = figure.axes[0].get_lines()
        assert line.get_marker() == marker


def test_a_scatter_names_each_method_once():
    figure = scatter()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == METHODS
    points = figure.axes[0].containers
    looks = {(p[0].get_marker(), p[0].get_color()) for p in points}
    assert len(looks) == len(METHODS)


def test_a_method_keeps_its_colour():
    looks = [tuple(plots.style(m, METHODS).values()) for m in METHODS]
    assert len(set(looks)) == 12
    few = plots.loss_curves({METHODS[7]: history()[METHODS[7]]}, TASKS, methods=METHODS)
    line = few.axes[0].lines[0]
    assert line.get_color() == plots.style(METHODS[7], METHODS)["color"]


def test_curve_needs_the_metric():
    with pytest.raises(ValueError, match="No eval row has 'acc'"):
        plots.curve([{"kind": "train", "acc": 1, "step": 1}], "acc", "eval")


def test_curves_by_task_have_their_names():
    plain = {method: history()[method] for method in METHODS[:2]}

    def lines(figure):
        return [
            (axis.get_title(), line.get_label(), np.asarray(line.get_ydata()).tolist())
            for axis in figure.axes
            for line in axis.get_lines()
        ]

    named = {
        method: plots.Curve(
            steps, {task: values[..., TASKS.index(task)] for task in reversed(TASKS)}
        )
        for method, (steps, values) in plain.items()
    }
    for draw in (plots.loss_curves, plots.weight_trajectories, plots.cosine_over_time):
        assert lines(draw(named, TASKS)) == lines(draw(plain, TASKS))
    titles = [axis.get_title() for axis in plots.loss_curves(named).axes]
    assert titles == TASKS[::-1]
    with pytest.raises(ValueError, match="Pass the names"):
        plots.loss_curves(plain)
    with pytest.raises(ValueError, match="the tasks are"):
        plots.loss_curves(named, ["a", "b", "other"])
