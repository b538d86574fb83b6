"""Draws figures of runs and writes reports as one HTML file."""

import base64
import html
import io
import itertools
import math
import pathlib
import string
from collections.abc import Sequence
from typing import Any, Literal

from mtljax.extras import require
from mtljax.training import compare
from mtljax.training.compare import Run
from mtljax.training.tables import format_cell, summarise
from mtljax.training.writers import writing

# Where the rows of fit and of the experiments have the values of a figure.
_LOSSES = (("losses", "train"), ("losses", "eval"), ("test_losses", "eval"))
_WEIGHTS = (("task_weights", "train"), ("weights", "train"), ("task_weights", "eval"))
_COSINES = (("cosines", "train"), ("cosines", "eval"))
_PLACES = {"losses": _LOSSES, "weights": _WEIGHTS, "cosines": _COSINES}

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport"
  content="width=device-width, initial-scale=1"><title>$title</title><style>
body { font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top }
th { border-bottom: 2px solid #888; white-space: nowrap }
.sortable th { cursor: pointer }
.number { text-align: right; white-space: nowrap }
td:not(.number) { overflow-wrap: anywhere; min-width: 8em }
.figure { overflow-x: auto } code { background: #f2f2f2; padding: 0 .2em }
h1, p, li { overflow-wrap: anywhere }
</style></head><body>
<h1>$title</h1>
<p><code>$command</code></p>
$body
<script>
for (const head of document.querySelectorAll("table.sortable th")) {
  head.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0];
    const column = head.cellIndex, up = head.dataset.up !== "1";
    for (const other of table.querySelectorAll("th")) delete other.dataset.up;
    head.dataset.up = up ? "1" : "0";
    const value = (row) => row.cells[column].textContent;
    const order = (a, b) => {
      const x = parseFloat(value(a)), y = parseFloat(value(b));
      const numbers = x - y;
      return Number.isNaN(numbers) ? value(a).localeCompare(value(b)) : numbers;
    };
    const rows = [...body.rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
    body.append(...rows);
  });
}
</script>
</body></html>
""")


def _curves(runs: Sequence[Run], places: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The curve of each run that has the values in one of the places."""
    from mtljax.training import plots

    found = {}
    for run in runs:
        for name, kind in places:
            if any(r.get("kind") == kind and name in r for r in run.rows):
                curve = plots.curve(run.rows, name, kind)
                if curve.values.ndim == 3 and len(curve.steps):
                    found[run.name] = curve
                    break
    widths = [curve.values.shape[-1] for curve in found.values()]
    return {k: c for k, c in found.items() if c.values.shape[-1] == widths[0]}


def _names(runs: Sequence[Run], count: int) -> list[str]:
    for run in runs:
        if len(run.task_names) == count:
            return run.task_names
    return [f"task {index}" for index in range(count)]


def _pairs(runs: Sequence[Run], count: int) -> list[str]:
    """Names of pairs of tasks, if there are ``count`` of them."""
    tasks = next(t for t in itertools.count(2) if t * (t - 1) // 2 >= count)
    pairs = itertools.combinations(_names(runs, tasks), 2)
    names = [" · ".join(pair) for pair in pairs]
    return names if len(names) == count else [f"pair {i}" for i in range(count)]


def figure(
    runs: Sequence[Run],
    kind: str,
    metrics: Sequence[str] | None = None,
    mode: Literal["min", "max"] = "min",
) -> Any:
    """Draws one figure of some runs.

    Args:
      runs: The runs, see :func:`mtljax.training.compare.find_runs`.
      kind: ``"losses"``, ``"weights"``, ``"cosines"`` or ``"tradeoff"``.
      metrics: For ``"tradeoff"``, the two metrics. By default the first two.
      mode: Whether smaller or larger metrics are better.

    Returns:
      A matplotlib figure.

    Raises:
      ValueError: If the rows do not contain the values.
    """
    require("mtljax plot", "train", "matplotlib")
    from mtljax.training import plots

    if metrics and kind != "tradeoff":
        raise ValueError("--metric requires --kind tradeoff.")
    if kind == "tradeoff":
        names = list(metrics or compare.metric_names(runs)[:2])
        if len(names) != 2:
            raise ValueError(f"A tradeoff needs two metrics, not {len(names)}.")
        cells, _ = compare.table(runs, names)
        points = {run: (row[names[0]], row[names[1]]) for run, row in cells.items()}
        return plots.tradeoff_scatter(
            points, xlabel=names[0], ylabel=names[1], better=(mode, mode)
        )
    places = _PLACES[kind]
    curves = _curves(runs, places)
    if not curves:
        fields = ", ".join(sorted({name for name, _ in places}))
        raise ValueError(f"The rows contain no {kind}: no field {fields}.")
    count = next(iter(curves.values())).values.shape[-1]
    if kind == "losses":
        positive = all(not (c.values <= 0).any() for c in curves.values())
        return plots.loss_curves(curves, _names(runs, count), log=positive)
    if kind == "weights":
        return plots.weight_trajectories(curves, _names(runs, count))
    return plots.cosine_over_time(curves, _pairs(runs, count))


def write_figure(
    runs: Sequence[Run],
    kind: str,
    path: str | pathlib.Path,
    metrics: Sequence[str] | None = None,
    mode: Literal["min", "max"] = "min",
) -> pathlib.Path:
    """Draws a figure, see :func:`figure`, and writes it to a PNG or SVG file."""
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path} must end with .png or .svg.")
    content = _rendered(figure(runs, kind, metrics, mode), path.suffix[1:], dpi=150)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def _rendered(drawn: Any, kind: str, dpi: int) -> bytes:
    content = io.BytesIO()
    drawn.savefig(content, format=kind, dpi=dpi, facecolor="white")
    return content.getvalue()


def write_report(
    runs: Sequence[Run], path: str | pathlib.Path, command: str = ""
) -> pathlib.Path:
    """Writes a report of some runs as one HTML file without external references.

    Args:
      runs: The runs, see :func:`mtljax.training.compare.find_runs`.
      path: The file.
      command: The command that the report states.

    Returns:
      The path.
    """
    require("mtljax report", "train", "matplotlib")
    title = f"Report of {len(runs)} run{'s' if len(runs) != 1 else ''}"
    body = "\n".join(
        [
            _section("Environment", _environment(runs)),
            _section("Runs", _runs(runs)),
            *_figures(runs),
            _section("Configuration", _configuration(runs)),
            _section("Warnings", _warnings(runs)),
        ]
    )
    text = _PAGE.substitute(title=title, command=html.escape(command), body=body)
    path = pathlib.Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def _html_table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], first_number: int | None = None
) -> str:
    def line(cells, tag):
        texts = []
        for i, cell in enumerate(cells):
            number = first_number is not None and i >= first_number
            kind = ' class="number"' if number else ""
            texts.append(f"<{tag}{kind}>{html.escape(str(cell))}</{tag}>")
        return f"<tr>{''.join(texts)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    kind = ' class="sortable"' if len(rows) > 1 else ""
    return (
        f"<table{kind}><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table>"
    )


def _environment(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        session = (run.header.get("sessions") or [run.header])[-1]
        versions = session.get("versions") or {}
        text = ", ".join(f"{name} {value}" for name, value in versions.items())
        commit = (session.get("commit") or "")[:12]
        rows.append((text, session.get("device", ""), commit))
    unique = list(dict.fromkeys(rows))
    return _html_table(("versions", "device", "commit"), unique)


def _runs(runs: Sequence[Run]) -> str:
    cells, columns = compare.table(runs)
    # A column without a value, such as the time of rows that were written at the end.
    columns = [c for c in columns if any(row[c] for row in cells.values())]
    rows = [
        [name, *(format_cell(summarise(row[column])) for column in columns)]
        for name, row in cells.items()
    ]
    return _html_table(("run", *columns), rows, first_number=1)


def _figures(runs: Sequence[Run]) -> list[str]:
    found = []
    for kind in ("losses", "weights", "cosines"):
        curves = _curves(runs, _PLACES[kind])
        if not any(len(curve.steps) > 1 for curve in curves.values()):
            continue
        drawn = figure(runs, kind)
        picture = base64.b64encode(_rendered(drawn, "png", dpi=140)).decode()
        width = round(90 * drawn.get_figwidth())  # sharp on dense screens
        image = (
            f'<div class="figure"><img alt="{kind}" width="{width}" '
            f'src="data:image/png;base64,{picture}"></div>'
        )
        found.append(_section(kind.capitalize(), image))
    if not found:
        text = "No losses, weights or cosines at more than one step."
        found.append(_section("Figures", f"<p>None. {text}</p>"))
    return found


def _configuration(runs: Sequence[Run]) -> str:
    differ = compare.config_differences(runs)
    if not differ:
        rows = list(runs[0].config.items())
        return _html_table(("field", "all runs"), rows) if rows else ""
    rows = [[name, *values] for name, values in differ.items()]
    return _html_table(("field", *(run.name for run in runs)), rows)


def _warnings(runs: Sequence[Run]) -> str:
    lines = []
    for run in runs:
        bad, unsolved, cosines = 0, 0, []
        for row in run.rows:
            numbers = compare.scalars(row, run.task_names)
            losses = [v for k, v in numbers.items() if k.startswith("losses/")]
            bad += any(math.isnan(value) for value in losses)
            converged = row.get("converged", row.get("solver_converged"))
            unsolved += converged is not None and float(converged) != 1.0
            cosines += [v for k, v in numbers.items() if k.startswith("cosines/")]
        if bad:
            lines.append(f"{run.name}: {bad} rows with a loss that is not finite.")
        if unsolved:
            lines.append(f"{run.name}: in {unsolved} rows a solver did not converge.")
        if cosines:
            share = sum(value < 0 for value in cosines) / len(cosines)
            lines.append(
                f"{run.name}: {share:.0%} of the recorded cosines are negative."
            )
    if not lines:
        return "<p>None.</p>"
    items = "\n".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>"
