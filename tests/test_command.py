"""The command ``mtljax``: its output, its exit statuses and its report."""

import base64
import csv
import html.parser
import io
import json
import pathlib
import re
import struct
import sys

import numpy as np
import pytest

import mtljax
from mtljax.__main__ import main
from mtljax.training import compare

ROOT = pathlib.Path(__file__).parents[1]
HEADER = {
    "kind": "header",
    "task_names": ["left", "<right>"],
    "sessions": [{"versions": {"jax": "0"}, "device": "cpu", "commit": None}],
}


def write_run(folder, rate, losses):
    """A run of two seeds, in the format of fit."""
    folder.mkdir(parents=True)
    rows = [{**HEADER, "config": {"lr": rate, "width": 8}}]
    for kind in ("train", "eval"):
        for step, loss in zip((10, 20, 30), losses, strict=True):
            for seed in (0, 1):
                row = {"step": step, "kind": kind, "seed": seed, "seconds": step / 100}
                row["losses"] = [loss + seed, None if loss == 5 else 2 * loss]
                if kind == "train":
                    row["task_weights"] = [0.5, 0.5]
                    row["cosines"] = [-0.5]
                rows.append(row)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "runs" / "a", 0.1, (3.0, 1.0, 2.0))
    write_run(tmp_path / "runs" / "b", 0.2, (3.0, 5.0, 4.0))
    return tmp_path / "runs"


def test_methods_in_four_formats(capsys):
    for form in ("table", "markdown", "json", "csv"):
        assert main(["methods", "--reads", "gramian", "--format", form]) == 0
        out = capsys.readouterr().out
        assert "nash_mtl" in out
        assert "graddrop" not in out
        if form == "json":
            rows = json.loads(out)
        if form == "csv":
            assert list(csv.DictReader(io.StringIO(out))) == rows
    assert {row["reads"] for row in rows} == {"Gramian"}
    for family in ("loss balancing", "Loss"):
        assert main(["methods", "--family", family, "--format", "json"]) == 0
        names = {row["name"] for row in json.loads(capsys.readouterr().out)}
        families = mtljax.METHODS.values()
        assert names == {m.name for m in families if m.family == "loss balancing"}


@pytest.mark.parametrize("reads", ["gra", "x"])  # two choices, and none
def test_the_beginning_of_a_choice_must_be_unique(reads, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["methods", "--reads", reads])
    assert "'gradients'" in capsys.readouterr().err


def test_the_table_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110


@pytest.mark.parametrize("name", ["cagrad", "CAGrad", "ca-grad"])
def test_show(name, capsys):
    assert main(["show", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith("cagrad(num_tasks, *, c=0.4")
    assert "https://arxiv.org/abs/2110.14048" in out
    assert "Args:" in out
    assert "``" not in out
    assert ":func:" not in out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nash_mlt", "'nash_mtl'"),
        ("composee", "'compose'"),
        ("zzz", "`mtljax` without a command lists all methods and wrappers."),
        ("training", "'training'"),  # a module, which is not imported
    ],
)
def test_show_an_unknown_name(name, text, capsys):
    assert main(["show", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"mtljax: no method, wrapper or function is called {name!r};"
    )
    assert text in error
    assert len(error.splitlines()) == 1


def test_compare(runs, capsys):
    assert main(["compare", str(runs), "--metric", "losses/left"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Two seeds that differ by 1: last 2 and 3, best 1 and 2.
    assert lines[2].startswith("| a | **2.500 ± 0.707** | **1.500 ± 0.707** | 10.000")
    assert lines[3].startswith("| b | 4.500 ± 0.707 | 3.500 ± 0.707 | 10.000")
    assert lines[-1] == "| lr | 0.1 | 0.2 |"
    assert not any("width" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compare", "missing"], "missing does not exist"),
        (["compare", "."], "contains no run"),
        (["compare", "runs", "--metric", "acc"], "No run has the metric 'acc'"),
        (["plot", "runs", "-o", "x.pdf"], "x.pdf must end with .png or .svg."),
        (["report", "runs", "-o", "x.txt"], "x.txt must end with .html or .htm."),
        (["plot", "runs", "-o", "runs"], "runs is a folder, but the name of a file"),
        (["report", "runs", "-o", "runs"], "runs is a folder, but the name of a file"),
        (["plot", "runs", "-o", "f.txt/x.png"], "written: f.txt is not a folder."),
        (["report", "runs", "-o", "f.txt/a/x.html"], "written: f.txt is not a folder."),
    ],
)
def test_errors_are_one_sentence(arguments, text, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    pathlib.Path("f.txt").touch()
    before = sorted(runs.parent.rglob("*"))
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert not output.out
    error = output.err
    assert error.startswith("mtljax: ")
    assert text in error
    assert sorted(runs.parent.rglob("*")) == before
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("experiment", ["multidigits", "fs_mtl"])
def test_compare_reads_experiments(experiment, capsys):
    folder = ROOT / "experiments" / experiment / "results"
    if not folder.exists():
        pytest.skip("the results are part of a clone only")
    assert main(["compare", str(folder)]) == 0
    assert "| multidigits/" in (out := capsys.readouterr().out) or "| fs_mtl/" in out


class Page(html.parser.HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.headings, self.text = [], [], ""
        self.images, self.folds, self.inside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        self.headings += [tag] if tag == "h2" else []
        if tag == "details":
            self.folds.append(dict(attrs))
            self.inside.append(len(self.folds) - 1)
        if tag == "img":
            self.images.append({**dict(attrs), "folded": bool(self.inside)})

    def handle_endtag(self, tag):
        if tag == "details":
            self.inside.pop()

    def handle_data(self, data):
        self.text += data


def test_report_is_self_contained(runs, tmp_path, capsys):
    file = tmp_path / "report.html"
    assert main(["report", str(runs), "-o", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    source = file.read_text()
    page = Page(source)
    assert len(page.headings) == 7
    assert len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in re.sub(r"base64,[^\"]+", "", source)
    assert "<right>" not in source
    assert "losses/<right>" in page.text
    assert "b: 4 rows with a loss that is not finite." in page.text
    assert "a: 100% of the recorded cosines are negative." in page.text
    assert file.stat().st_size < 2e6


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("compose", "A ∘ B, wrapper"),
        ("cr-mogm", "CR-MOGM, wrapper"),
        ("reuse", "reuse(balancer, *, every)"),
    ],
)
def test_wrappers_and_functions_are_shown(name, line, capsys):
    assert main(["show", name]) == 0
    assert line in capsys.readouterr().out.splitlines()


def test_a_metric_that_a_figure_does_not_show_is_an_error(runs, tmp_path, capsys):
    out = str(tmp_path / "n.png")
    assert main(["plot", str(runs), "--metric", "loss", "-o", out]) == 2
    assert capsys.readouterr().err == "mtljax: --metric requires --kind tradeoff.\n"


@pytest.mark.parametrize("command", ["plot", "report"])
def test_the_folder_of_the_output_is_created(command, runs, tmp_path, capsys):
    name = {"plot": "a.png", "report": "a.html"}[command]
    file = tmp_path / "new" / "folder" / name
    for _ in range(2):  # the second call replaces the file
        assert main([command, str(runs), "-o", str(file)]) == 0
        assert capsys.readouterr().out.strip() == str(file)
    assert [path.name for path in file.parent.iterdir()] == [name]


def write_timed(folder, sessions, rows):
    """A run of one seed from pairs ``(step, kind, seconds)``."""
    folder.mkdir(parents=True, exist_ok=True)
    header = {**HEADER, "sessions": [{"from_step": step} for step in sessions]}
    lines = [header]
    for step, kind, seconds, *final in rows:
        row = {"step": step, "kind": kind, "losses": [1.0, 1.0], "seconds": seconds}
        lines.append(row | ({"final": True} if final else {}))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("sessions", "rows"),
    [
        # A step takes 10 ms, a compilation of the step 7 s and of an evaluation 3 s.
        ([0], [(10, "train", 7.1), (20, "train", 7.2), (40, "train", 7.4)]),
        # The first evaluation compiles, the second one takes no time.
        (
            [0],
            [
                *((10, "train", 7.1), (20, "train", 7.2), (20, "eval", 10.2)),
                *((30, "train", 10.3), (40, "train", 10.4), (40, "eval", 10.4)),
            ],
        ),
        # An evaluation before the first step.
        ([0], [(0, "eval", 3.0), (10, "train", 10.1), (20, "train", 10.2)]),
        # Both compile again after a resume, twice.
        (
            [0, 20, 40],
            [
                *((10, "train", 7.1), (20, "train", 7.2), (20, "eval", 10.2)),
                *((30, "train", 17.3), (40, "train", 17.4), (40, "eval", 20.4)),
                *((50, "train", 27.5), (60, "train", 27.6), (60, "eval", 30.6)),
            ],
        ),
        # The checkpoint of a resume is between two rows.
        (
            [0, 25],
            [
                *((10, "train", 7.1), (20, "train", 7.2)),
                *((30, "train", 14.3), (40, "train", 14.4)),
            ],
        ),
        # The resumed run has no step left and evaluates again.
        (
            [0, 20],
            [
                *((10, "train", 7.1), (20, "train", 7.2)),
                (20, "eval", 12.0, "final"),
            ],
        ),
    ],
)
def test_time_per_step_contains_no_compilation(sessions, rows, tmp_path):
    write_timed(tmp_path / "run", sessions, rows)
    (run,) = compare.find_runs([tmp_path / "run"])
    assert compare.step_milliseconds(run) == pytest.approx([10.0])


def test_a_run_without_two_rows_of_a_kind_has_no_time(tmp_path):
    write_timed(tmp_path / "run", [0], [(10, "train", 7.1), (10, "eval", 9.0)])
    (run,) = compare.find_runs([tmp_path / "run"])
    assert compare.step_milliseconds(run) == []


def test_resumed_runs_are_named(runs, tmp_path, capsys):
    rows = [(step, "train", step / 100) for step in (10, 20, 30)]
    write_timed(runs / "c", [0, 15, 25], rows)
    assert main(["compare", str(runs)]) == 0
    text = "c: resumed after step 15, after step 25."
    assert text in capsys.readouterr().out.splitlines()
    file = tmp_path / "report.html"
    assert main(["report", str(runs), "-o", str(file)]) == 0
    page = Page(file.read_text())
    assert text in page.text
    assert "a: resumed" not in page.text


def test_images_have_alternative_texts(runs, tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", str(runs), "-o", str(file)]) == 0
    page = Page(file.read_text())
    assert len(page.images) == 3
    words = ("Losses", "Shares of the task weights", "Cosines of task gradients")
    for image, word in zip(page.images, words, strict=True):
        assert image["alt"].startswith(f"{word} over the steps")
        assert "Runs: a, b." in image["alt"]
        assert "left" in image["alt"]
        assert "<right>" in image["alt"]


@pytest.mark.deep
def test_report_of_many_tasks_and_runs(tmp_path):
    """Long tables are folded, and no figure has more than 12 panels or 8 lines."""
    rng = np.random.default_rng(0)
    names = [f"task_{t}" for t in range(40)]
    offset = rng.uniform(1, 2, 40)
    worst = [3, 5, 8, 13, 21, 34]  # whose losses differ between the runs
    for m in range(30):
        rows = [{**HEADER, "task_names": names, "config": {"lr": m, "width": 8}}]
        for step in (10, 20):
            losses = offset.copy()
            losses[worst] += m
            weights = np.ones(40)
            weights[7] = 40.0
            cosines = np.full(780, 0.5)
            cosines[38] = -0.9  # of tasks 0 and 39
            row = {"step": step, "kind": "train", "losses": losses.tolist()}
            row |= {"task_weights": weights.tolist(), "cosines": cosines.tolist()}
            rows.append(row)
        (tmp_path / f"run_{m:02d}").mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"run_{m:02d}" / "metrics.jsonl").write_text(text)
    file = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "-o", str(file)]) == 0
    assert file.stat().st_size < 2e6
    page = Page(file.read_text())
    assert [image["folded"] for image in page.images] == [
        *(False, True, True, True),  # losses of 8 runs each
        *(False, True, True),  # weights and cosines of 12 runs each
        *(False, True, True),
    ]
    shown = [set(re.findall(r"run_\d+", image["alt"])) for image in page.images]
    assert [len(names) for names in shown] == [8, 8, 8, 6, 12, 12, 6, 12, 12, 6]
    assert set.union(*shown[:4]) == {f"run_{m:02d}" for m in range(30)}
    drawn = [re.findall(r"task_\d+", image["alt"]) for image in page.images]
    assert drawn[0] == [f"task_{t}" for t in worst]
    assert "task_7" in drawn[4]
    assert len(drawn[4]) == 8
    assert "task_0 · task_39" in page.images[7]["alt"]
    assert "The figures show 6 of 40 tasks, those whose last losses" in page.text
    assert "The figures show 8 of 780 pairs of tasks" in page.text
    assert sum("open" in fold for fold in page.folds) == 1  # the table of runs
    assert page.folds[0] == {"open": None}
    assert "34 of 34 further metrics" in page.text


def png_width(link):
    """Pixels of a PNG file, from its first chunk."""
    content = base64.b64decode(link.partition("base64,")[2])
    return struct.unpack(">I", content[16:20])[0]


def test_report_on_narrow_and_dense_screens(runs, tmp_path):
    file = tmp_path / "report.html"
    assert main(["report", str(runs), "-o", str(file)]) == 0
    source = file.read_text()
    assert '<meta name="viewport"' in source
    found = re.findall(r'width="(\d+)" src="(data:image/png[^"]*)"', source)
    assert len(found) == 3
    for width, link in found:  # more pixels than the width on the page
        assert png_width(link) > 1.5 * int(width) > 300


def test_report_of_rows_at_one_step(tmp_path, capsys):
    """The rows of an experiment: no curves, metrics first, the commit shortened."""
    rows = [{"experiment": "toy", "config": {"lr": 0.1}, "commit": "abcdef" * 6}]
    for seed in (0, 1):
        row = {"step": 12, "kind": "eval", "seed": seed, "cosines": [0.1] * 6}
        rows.append({**row, "losses": [1.0] * 4, "acc": 0.25, "step_ms": None})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(text)
    assert main(["compare", str(tmp_path)]) == 0
    assert "ms per step" not in (out := capsys.readouterr().out)
    assert "**" not in out
    file = tmp_path / "report.html"
    assert main(["report", str(tmp_path), "-o", str(file)]) == 0
    page = Page(file.read_text())
    assert not page.links
    assert "No losses, weights or cosines at more than one step." in page.text
    assert "0.250 ± 0.000" in page.text  # behind six cosines in the rows
    assert "ms per step" not in page.text
    assert "abcdefabcdef" in page.text
    assert "abcdefabcdefa" not in page.text


@pytest.mark.parametrize("kind", ["losses", "tradeoff"])
def test_plot(kind, runs, tmp_path):
    file = tmp_path / "plot.svg"
    assert main(["plot", str(runs), "--kind", kind, "-o", str(file)]) == 0
    assert "<svg" in file.read_text()


def test_a_missing_extra_has_its_own_status(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(runs)]) == 3
    error = capsys.readouterr().err
    assert "pip install 'mtljax[train]'" in error
    assert len(error.splitlines()) == 1
