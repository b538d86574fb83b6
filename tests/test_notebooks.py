"""Every notebook runs as a script, and its executed view holds the same code."""

import json
import os
import pathlib
import re
import runpy
import struct
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
DEVICES = "jax_num_cpu_devices"  # must be set before the first use of a device
every = pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)


def cells(source):
    """Cells ``(kind, text)`` of a percent script."""
    text = source.read_text(encoding="utf-8")
    found = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if head.strip() else "code", body.strip()))
    return found


def view(source):
    file = source.with_suffix(".ipynb")
    if not list(file.parent.glob("*.ipynb")):
        pytest.skip("the executed notebooks are part of a clone only")
    return json.loads(file.read_text(encoding="utf-8"))["cells"]


@every
def test_figures_are_described(source):
    """The site takes the alternative text of a figure from a comment of its cell."""
    for cell in view(source):
        pictures = [
            o for o in cell.get("outputs", ()) if "image/png" in o.get("data", ())
        ]
        described = "\n# Figure: " in "\n" + "".join(cell["source"])
        assert bool(pictures) == described


def outputs(source):
    code = [cell for cell in view(source) if cell["cell_type"] == "code"]
    return [output for cell in code for output in cell["outputs"]]


@every
def test_runs(source, capsys, monkeypatch):
    monkeypatch.setenv("MTLJAX_NOTEBOOK_FAST", "1")  # a tenth of the steps
    if DEVICES in source.read_text(encoding="utf-8"):
        environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(source)]
        printed = subprocess.check_output(command, env=environment, text=True)
        assert "mtljax" in printed
        return
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with matplotlib.rc_context():  # restores the style
        runpy.run_path(str(source))
    assert "mtljax" in capsys.readouterr().out


# Starts of five from which a run reaches the Pareto set, at scale 1 and 0.1.
COUNTS = {
    "equal weights": [3, 4],
    "scale invariant": [3, 3],
    "uncertainty": [3, 4],
    "FAMO": [3, 3],
    "PCGrad": [3, 4],
    "CAGrad": [3, 4],
    "UPGrad": [3, 4],
    "Aligned-MTL": [5, 4],
    "MGDA": [5, 5],
    "IMTL-G": [5, 5],
    "Nash-MTL": [5, 5],
    "FairGrad": [5, 5],
}
VOLUMES = {"linear": 0.2516, "stch": 0.4948, "cosmos": 0.4572}


def full(name, monkeypatch):
    """The variables of a notebook after a run with all its steps."""
    monkeypatch.delenv("MTLJAX_NOTEBOOK_FAST", raising=False)
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with matplotlib.rc_context():
        return runpy.run_path(str(ROOT / "notebooks" / f"{name}.py"))


def test_the_view_shows_the_counts():
    printed = [o.get("text", "") for o in outputs(ROOT / "notebooks/toy_problem.py")]
    lines = re.findall(
        r"^(.+?) +scale 1: (\d) of 5 +scale 0.1: (\d) of 5$",
        "".join("".join(text) for text in printed),
        flags=re.MULTILINE,
    )
    assert {name: [int(x) for x in numbers] for name, *numbers in lines} == COUNTS


@pytest.mark.deep
def test_a_full_run_has_the_counts(monkeypatch):
    counts = full("toy_problem", monkeypatch)["counts"]
    assert {n: c[0] for n, c in counts.items()} == {n: c[0] for n, c in COUNTS.items()}


def test_a_full_run_has_the_hypervolumes(monkeypatch):
    volumes = full("pareto_front", monkeypatch)["volumes"]
    for name, value in VOLUMES.items():
        assert volumes[name] == pytest.approx(value, rel=0.01), name


@every
def test_the_view_is_the_source(source):
    shown = view(source)
    texts = ["".join(cell["source"]).strip() for cell in shown]
    kinds = [cell["cell_type"] for cell in shown]
    assert list(zip(kinds, texts, strict=True)) == cells(source)
    counts = [c["execution_count"] for c in shown if c["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))


@every
def test_form(source):
    code = [text for kind, text in cells(source) if kind == "code"]
    assert len(code) <= 15
    assert any(re.search(r"^ *assert ", text, re.MULTILINE) for text in code)
    assert code[-1].splitlines()[-1].startswith('print("jax"')
    pictures = [o for o in outputs(source) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2 or source.stem == "quickstart"
    assert all(o["output_type"] != "error" for o in outputs(source))
    assert all(o.get("name") != "stderr" for o in outputs(source))
    assert source.with_suffix(".ipynb").stat().st_size < 750e3


def test_the_figure_of_the_readme():
    data = (ROOT / "docs" / "_static" / "toy.png").read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1200, 260)
    assert len(data) < 100e3
    for page in ("README.md", "docs/index.md"):
        assert "_static/toy.png" in (ROOT / page).read_text(encoding="utf-8")
