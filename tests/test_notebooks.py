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
