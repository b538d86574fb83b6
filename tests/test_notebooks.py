"""Every notebook runs as a script, and its executed view holds the same code."""

import json
import pathlib
import runpy

import matplotlib
import matplotlib.pyplot as plt
import pytest

ROOT = pathlib.Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_runs(source, capsys, monkeypatch):
    monkeypatch.setenv("MTLJAX_NOTEBOOK_FAST", "1")  # a tenth of the steps
    matplotlib.use("agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    runpy.run_path(str(source))
    assert "mtljax" in capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_the_view_is_the_source(source):
    view = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    script = source.read_text(encoding="utf-8")
    cells = [c for c in view["cells"] if c["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert "".join(cell["source"]).strip() in script
        assert cell["execution_count"]
