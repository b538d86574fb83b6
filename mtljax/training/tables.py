"""Tables of results with mean and spread over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mtljax.extras import require


class Cell(NamedTuple):
    """Mean and sample standard deviation over seeds."""

    mean: float
    sd: float  # NaN for a single seed
    number: int  # number of finite values


def summarise(values: Any) -> Cell:
    """Computes mean and sample standard deviation of the finite values.

    Examples:
      >>> from mtljax.training.tables import summarise
      >>> summarise([1.0, 3.0])
      Cell(mean=2.0, sd=1.4142135623730951, number=2)
    """
    array = np.asarray(values, np.float64).ravel()
    array = array[np.isfinite(array)]
    if not len(array):
        return Cell(math.nan, math.nan, 0)
    sd = float(array.std(ddof=1)) if len(array) > 1 else math.nan
    return Cell(float(array.mean()), sd, len(array))


def format_cell(cell: Cell, digits: int = 3) -> str:
    """Formats a cell as ``mean ± sd``.

    The spread is omitted for a single seed. A cell without values is a dash.

    Examples:
      >>> import math
      >>> from mtljax.training.tables import Cell, format_cell
      >>> format_cell(Cell(0.5, 0.012, 3)), format_cell(Cell(2.0, math.nan, 1), 1)
      ('0.500 ± 0.012', '2.0')
    """
    if not cell.number:
        return "-"
    text = f"{cell.mean:.{digits}f}"
    return text if math.isnan(cell.sd) else f"{text} ± {cell.sd:.{digits}f}"


def _cells(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Literal["min", "max", ""]],
    digits: int | Mapping[str, int],
    exclude: Sequence[str],
) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Returns the texts of the body, each with whether it is the best of its column."""
    summaries = {
        name: {c: summarise(row.get(c, math.nan)) for c in columns}
        for name, row in rows.items()
    }
    best = {}
    for column, better in columns.items():
        means = [
            s[column].mean
            for name, s in summaries.items()
            if s[column].number and name not in exclude
        ]
        if better and means:
            best[column] = min(means) if better == "min" else max(means)
    body = []
    for name, cells in summaries.items():
        line = []
        for column, cell in cells.items():
            places = digits if isinstance(digits, int) else digits.get(column, 3)
            # Values that are printed equally are marked equally.
            top = f"{best[column]:.{places}f}" if column in best else None
            same = cell.number > 0 and f"{cell.mean:.{places}f}" == top
            line.append((format_cell(cell, places), same and name not in exclude))
        body.append((name, line))
    return body


def _title(column: str, better: str) -> str:
    return column + {"min": " ↓", "max": " ↑", "": ""}[better]


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Formats a Markdown table.

    Args:
      head: Titles of the columns.
      rows: Cells of the other lines.
      left: Number of columns that are aligned to the left. Others are to the right.

    Returns:
      The table, with lines joined by newlines.

    Examples:
      >>> from mtljax.training.tables import markdown
      >>> print(markdown(["a", "b"], [["x", 1]]))
      | a | b |
      |:--|--:|
      | x | 1 |
    """
    rule = "|:--" * left + "|--:" * (len(head) - left) + "|"
    text = ["| " + " | ".join(map(str, line)) + " |" for line in [head, *rows]]
    return "\n".join([text[0], rule, *text[1:]])


def markdown_table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Literal["min", "max", ""]],
    *,
    digits: int | Mapping[str, int] = 3,
    head: str = "method",
    exclude: Sequence[str] = (),
) -> str:
    """Formats a Markdown table of ``mean ± sd`` with the best of each column in bold.

    Args:
      rows: For each method and column, values over seeds or one number.
      columns: For each column, ``"min"``, ``"max"``, or ``""`` for no direction.
      digits: Digits after the decimal point, for all columns or for each column.
      head: Title of the first column.
      exclude: Rows that are not compared, such as a single-task reference.

    Returns:
      The table, with lines joined by newlines.

    Examples:
      >>> from mtljax.training.tables import markdown_table
      >>> rows = {"sum": {"acc": [0.5, 0.7]}, "pcgrad": {"acc": [0.7, 0.9]}}
      >>> print(markdown_table(rows, {"acc": "max"}, digits=2))
      | method | acc ↑ |
      |:--|--:|
      | sum | 0.60 ± 0.14 |
      | pcgrad | **0.80 ± 0.14** |
    """
    titles = [head, *(_title(c, better) for c, better in columns.items())]
    body = [
        [name, *(f"**{text}**" if best else text for text, best in cells)]
        for name, cells in _cells(rows, columns, digits, exclude)
    ]
    return markdown(titles, body)


def rich_table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, Literal["min", "max", ""]],
    *,
    digits: int | Mapping[str, int] = 3,
    head: str = "method",
    exclude: Sequence[str] = (),
    title: str | None = None,
) -> Any:
    """Builds the table of :func:`markdown_table` for a terminal.

    Args:
      rows: For each method and column, values over seeds or one number.
      columns: For each column, ``"min"``, ``"max"``, or ``""`` for no direction.
      digits: Digits after the decimal point, for all columns or for each column.
      head: Title of the first column.
      exclude: Rows that are not compared.
      title: Title above the table.

    Returns:
      A :class:`rich.table.Table`, for ``rich.print``.
    """
    require("mtljax.training.tables", "train", "rich")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column(head, no_wrap=True)
    for column, better in columns.items():
        lines = _title(column, better).replace(" (", "\n(").replace(" / ", "\n/ ")
        table.add_column(lines, justify="right", no_wrap=True)
    for name, cells in _cells(rows, columns, digits, exclude):
        styled = [Text(text, "bold green" if best else "") for text, best in cells]
        table.add_row(Text(name), *styled)
    return table
