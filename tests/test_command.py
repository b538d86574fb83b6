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

import pytest

import mtljax
from mtljax.__main__ import main

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
    assert main(["methods", "--family", "loss balancing", "--format", "json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    families = mtljax.METHODS.values()
    assert names == {m.name for m in families if m.family == "loss balancing"}


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


def test_show_an_unknown_name(capsys):
    assert main(["show", "nash_mlt"]) == 2
    error = capsys.readouterr().err
    assert "'nash_mtl'" in error
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
        (["plot", "runs", "-o", "x.pdf"], "must end with .png or .svg"),
    ],
)
def test_errors_are_one_sentence(arguments, text, runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
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
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        self.headings += [tag] if tag == "h2" else []

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


def test_wrappers_are_shown(capsys):
    assert main(["show", "compose"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("compose(")
    assert "A ∘ B, wrapper" in output


def test_a_metric_that_a_figure_does_not_show_is_an_error(runs, tmp_path, capsys):
    out = str(tmp_path / "n.png")
    assert main(["plot", str(runs), "--metric", "loss", "-o", out]) == 2
    assert capsys.readouterr().err == "mtljax: --metric requires --kind tradeoff.\n"


def test_report_to_a_folder_is_one_sentence(runs, tmp_path, capsys):
    assert main(["report", str(runs), "-o", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.startswith("mtljax: ")
    assert output.err.endswith(" cannot be written: Is a directory.\n")


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


def test_report_of_rows_at_one_step(tmp_path):
    """The rows of an experiment: no curves, metrics first, the commit shortened."""
    rows = [{"experiment": "toy", "config": {"lr": 0.1}, "commit": "abcdef" * 6}]
    for seed in (0, 1):
        row = {"step": 12, "kind": "eval", "seed": seed, "cosines": [0.1] * 6}
        rows.append({**row, "losses": [1.0] * 4, "acc": 0.25, "step_ms": None})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results.jsonl").write_text(text)
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
