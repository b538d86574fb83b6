import io
import re

from mtljax import training
from mtljax.training.progress import describe


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(stream, **kwargs):
    with training.Progress(
        100, task_names=["a", "b"], title="m [x]", stream=stream, **kwargs
    ) as progress:
        progress.start(0)
        for step in range(10, 101, 10):
            progress.update(step, {"losses": [0.5, 0.1]}, "val_loss 0.3")
        progress.note("a [note]")


def test_plain_lines_are_few_and_without_control_characters():
    stream = io.StringIO()
    show(stream)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == [
        "m [x]: step 10/100 (10%)",
        "m [x]: step 100/100 (100%)",
    ]
    assert lines[1].endswith("0:00 left  loss a 0.500 b 0.100  val_loss 0.3")
    assert lines[2] == "a [note]"
    assert all(c.isprintable() or c == "\n" for c in stream.getvalue())


def test_plain_lines_come_at_a_cadence():
    stream = io.StringIO()
    show(stream, every_seconds=0.0)
    assert len(stream.getvalue().splitlines()) == 11


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    show(stream)
    assert "100/100" in stream.getvalue()
    assert "a [note]" in stream.getvalue()


def test_disabled_shows_only_notes():
    stream = io.StringIO()
    show(stream, enabled=False)
    assert stream.getvalue() == "a [note]\n"


def test_seeds_are_averaged():
    assert describe({"losses": [[1.0, 2.0], [3.0, 4.0]]}) == "loss 2.00 3.00"


def test_a_narrow_terminal_wraps_and_cuts_nothing(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    metrics = {"losses": [0.511, 0.122, 0.733], "task_weights": [0.21, 0.32, 0.47]}
    stream = Terminal()
    with training.Progress(
        5000, task_names=["segmentation", "depth", "normals"], stream=stream,
        title="nyuv2 upgrad",
    ) as progress:  # fmt: skip
        progress.update(4000, metrics, "val_score 0.6543")
    shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split())
    for text in ("0.511", "0.122", "0.733", "0.21", "0.32", "0.47", "0.6543"):
        assert text in shown
    assert "…" not in shown
    lines = stream.getvalue().splitlines()
    assert max(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", x)) for x in lines) <= 110


def test_a_dict_by_task_has_its_names():
    losses = {"seg": [1.0, 3.0], "depth": [2.0, 4.0]}
    assert describe({"losses": losses}) == "loss seg 2.00 depth 3.00"
