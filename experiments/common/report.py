"""Output of the experiments: rows, tables, versions and file names."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from experiments.common.provenance import header
from mtljax import training
from mtljax.training import tables
from mtljax.training.tables import markdown

Column = tuple[Literal["min", "max", ""], int]
"""The better direction of a column, and its digits."""


class Report(NamedTuple):
    """A table: columns, and values over seeds by label and column."""

    columns: Mapping[str, Column]
    rows: Mapping[str, Mapping[str, Any]]

    def shown(self, form: Callable[..., Any], **options: Any) -> Any:
        """Formats the table with a function of :mod:`mtljax.training.tables`."""
        better = {name: column[0] for name, column in self.columns.items()}
        digits = {name: column[1] for name, column in self.columns.items()}
        return form(self.rows, better, digits=digits, **options)

    def markdown(self, exclude: Sequence[str] = (), head: str = "method") -> str:
        """Returns the table for ``table.md``."""
        return self.shown(tables.markdown_table, exclude=exclude, head=head)


def write_rows(
    path: pathlib.Path, config: Any, rows: Iterable[Mapping[str, Any]], **about: Any
) -> pathlib.Path:
    """``results.jsonl``: the header of :mod:`provenance`, then a line per row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in [header(config, **about), *rows]:
            file.write(json.dumps(training.to_json(row)) + "\n")
    return path


def read_rows(path: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the first line of a ``results.jsonl``, and the other lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head, *rows = (json.loads(line) for line in lines)
    return head, rows


def versions() -> str:
    """Returns versions, commit and device as a table."""
    about = training.environment()
    about = {**about.pop("versions"), **about}
    return markdown(list(about), [list(about.values())], left=len(about))


def write_table(path: pathlib.Path, parts: Iterable[str]) -> pathlib.Path:
    """Writes ``table.md`` from the nonempty parts and the versions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([*filter(None, parts), versions()])
    path.write_text(text + "\n", encoding="utf-8")
    return path


def write(
    folder: pathlib.Path,
    config: Any,
    rows: Iterable[Mapping[str, Any]],
    parts: Iterable[str],
    **about: Any,
) -> list[pathlib.Path]:
    """Writes ``results.jsonl`` and ``table.md``."""
    return [
        write_rows(folder / "results.jsonl", config, rows, **about),
        write_table(folder / "table.md", parts),
    ]


def pm(values: Any, digits: int = 2) -> str:
    """Formats mean ± standard deviation over seeds."""
    return tables.format_cell(tables.summarise(values), digits)


def chance(p: float) -> str:
    """Formats a p-value with two digits.

    Examples:
      >>> [chance(p) for p in (0.0571, 3e-7, 1.0)]
      ['0.057', '< 0.0001', '1']
    """
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


class Screen:
    """Terminal output. Long lines and wide tables are not truncated in a pipe."""

    def __init__(self) -> None:
        from rich.console import Console

        self.started, self.console = time.perf_counter(), Console()

    def say(self, text: str) -> None:
        """Prints a line without buffering."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, report: Report, title: str, exclude: Sequence[str] = ()) -> None:
        """Prints a table."""
        shown = report.shown(tables.rich_table, title=title, exclude=exclude)
        console = self.console
        wide = console.options.update(max_width=400)
        console.width = max(console.width, console.measure(shown, options=wide).maximum)
        console.print(shown)

    def finish(self, written: Iterable[pathlib.Path]) -> None:
        """Prints the elapsed time and the names of the written files."""
        self.say(f"{time.perf_counter() - self.started:.0f} s. Written:")
        for path in written:
            self.say(f"  {path}")
        self.started = time.perf_counter()
