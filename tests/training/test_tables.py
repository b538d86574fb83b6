import io
import math

from mtljax.training import tables

ROWS = {
    "single task": {"acc": [0.99], "loss": 0.1},
    "linear": {"acc": [0.70, 0.72], "loss": 0.3},
    "pcgrad": {"acc": [0.7104, 0.7096], "loss": [0.2, math.nan]},
    "broken": {"acc": [math.nan], "note": 1},
}
COLUMNS = {"acc": "max", "loss": "min"}


def test_best_in_bold_ties_as_printed_and_references_out():
    table = tables.markdown_table(ROWS, COLUMNS, digits=2, exclude=["single task"])
    assert table.splitlines() == [
        "| method | acc ↑ | loss ↓ |",
        "|:--|--:|--:|",
        "| single task | 0.99 | 0.10 |",
        "| linear | **0.71 ± 0.01** | 0.30 |",
        "| pcgrad | **0.71 ± 0.00** | **0.20** |",
        "| broken | - | - |",
    ]


def test_a_column_without_direction_has_no_best():
    table = tables.markdown_table(ROWS, {"note": "", "loss": "max"}, digits=2)
    assert table.splitlines()[2:] == [
        "| single task | - | 0.10 |",
        "| linear | - | **0.30** |",
        "| pcgrad | - | 0.20 |",
        "| broken | 1.00 | - |",
    ]


def test_rich_table():
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    console.print(tables.rich_table(ROWS, COLUMNS, digits={"acc": 1}))
    text = console.file.getvalue()
    assert "0.7 ± 0.0" in text
    assert "0.200" in text
