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

import numpy as np

from mtljax.extras import require
from mtljax.training import compare
from mtljax.training.compare import Run
from mtljax.training.errors import OutputError
from mtljax.training.tables import format_cell, summarise
from mtljax.training.writers import writing

# Where the rows of fit and of the experiments have the values of a figure.
_LOSSES = (("losses", "train"), ("losses", "eval"), ("test_losses", "eval"))
_WEIGHTS = (("task_weights", "train"), ("weights", "train"), ("task_weights", "eval"))
_COSINES = (("cosines", "train"), ("cosines", "eval"))
_PLACES = {"losses": _LOSSES, "weights": _WEIGHTS, "cosines": _COSINES}

# Limits of a report. What exceeds them is folded, or is not drawn.
_ROWS = 20  # rows of a table and items of a list that are not folded
_METRICS = 200  # columns of the table of all metrics
_TASKS = {"losses": 6, "weights": 8, "cosines": 8}  # panels, or lines of a panel
_RUNS = {"losses": 8, "weights": 12, "cosines": 12}  # runs of a figure
_FIGURES = 4  # figures of one kind

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
h1, p, li, summary { overflow-wrap: anywhere }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff;
  max-width: 40vw }
summary { cursor: pointer; margin: .7em 0 }
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
    curves = _curves(runs, _PLACES[kind])
    if not curves:
        fields = ", ".join(sorted({name for name, _ in _PLACES[kind]}))
        raise ValueError(
            f"The rows contain no {kind}. The step must return a metric with one of "
            f"these names: {fields}."
        )
    return _draw(kind, curves, _column_names(kind, runs, curves))


def _column_names(kind: str, runs: Sequence[Run], curves: dict[str, Any]) -> list[str]:
    """Names of the last axis of the curves, which are tasks or pairs of tasks."""
    count = next(iter(curves.values())).values.shape[-1]
    return (_pairs if kind == "cosines" else _names)(runs, count)


def _draw(
    kind: str,
    curves: dict[str, Any],
    names: Sequence[str],
    chosen: Sequence[int] | None = None,
) -> Any:
    """Draws the curves of all or of the chosen tasks or pairs of tasks."""
    from mtljax.training import plots

    chosen = range(len(names)) if chosen is None else chosen
    shown = [names[index] for index in chosen]
    if kind == "weights":
        return plots.weight_trajectories(curves, names, shown=shown)
    curves = {
        run: curve._replace(values=curve.values[..., list(chosen)])
        for run, curve in curves.items()
    }
    if kind == "cosines":
        return plots.cosine_over_time(curves, shown)
    positive = all(not (c.values <= 0).any() for c in curves.values())
    return plots.loss_curves(curves, shown, log=positive)


def _chosen(kind: str, curves: dict[str, Any]) -> list[int]:
    """Selects the tasks or pairs that a report draws, if there are too many.

    These are the tasks whose last losses differ most between the runs, the tasks whose
    share of the weights differs most from 1/T, or the pairs with the lowest cosines.
    """
    from mtljax.training import plots

    means = [curve.values.mean(0) for curve in curves.values()]  # [P, T] per run
    count = means[0].shape[-1]
    if count <= _TASKS[kind]:
        return list(range(count))
    if kind == "losses":
        last = np.stack([values[-1] for values in means])
        score = np.ptp(last, axis=0) / np.maximum(np.abs(last).mean(0), 1e-30)
    elif kind == "weights":
        shares = [plots.weight_shares(values).mean(0) for values in means]
        score = np.abs(np.stack(shares) - 1 / count).max(0)
    else:
        score = -np.stack([values.mean(0) for values in means]).min(0)
    score = np.where(np.isfinite(score), score, np.inf)  # a failure is of interest
    return sorted(np.argsort(-score, kind="stable")[: _TASKS[kind]].tolist())


_CHOICES = {
    "losses": "those whose last losses differ most between the runs",
    "weights": "those whose share differs most from equal weights",
    "cosines": "those with the lowest cosines",
}
_CONTENTS = {
    "losses": "Losses over the steps, one panel per task and one line per run",
    "weights": "Shares of the task weights over the steps, one panel per run and one "
    "line per task",
    "cosines": "Cosines of task gradients over the steps, one panel per run and one "
    "line per pair of tasks",
}


def write_figure(
    runs: Sequence[Run],
    kind: str,
    path: str | pathlib.Path,
    metrics: Sequence[str] | None = None,
    mode: Literal["min", "max"] = "min",
) -> pathlib.Path:
    """Draws a figure and writes it to a PNG or SVG file.

    Args:
      runs: See :func:`figure`.
      kind: See :func:`figure`.
      path: The file. Its folder is created if needed.
      metrics: See :func:`figure`.
      mode: See :func:`figure`.

    Returns:
      The path.

    Raises:
      ValueError: If the rows do not contain the values, or the suffix is another one.
      OutputError: If the file cannot be written.
    """
    path = _target(path, (".png", ".svg"))
    content = _rendered(figure(runs, kind, metrics, mode), path.suffix[1:], dpi=150)
    return _written(path, content)


def _target(path: str | pathlib.Path, suffixes: tuple[str, ...]) -> pathlib.Path:
    """Checks the path of a file before its content is computed."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, but the name of a file is required.")
    if path.suffix not in suffixes:
        raise ValueError(f"{path} must end with {' or '.join(suffixes)}.")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise OutputError(f"{path} cannot be written: {folder} is not a folder.")
    return path


def _written(path: pathlib.Path, content: bytes) -> pathlib.Path:
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
      path: The file, which ends with ``.html``. Its folder is created if needed.
      command: The command that the report states.

    Returns:
      The path.

    Raises:
      ValueError: If the suffix is another one.
      OutputError: If the file cannot be written.
    """
    require("mtljax report", "train", "matplotlib")
    path = _target(path, (".html", ".htm"))
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
    return _written(path, text.encode("utf-8"))


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def _folded(summary: str, content: str, *, shown: bool = False) -> str:
    kind = " open" if shown else ""
    return (
        f"<details{kind}><summary>{html.escape(summary)}</summary>\n{content}</details>"
    )


def _list(lines: Sequence[str]) -> str:
    """An HTML list, folded if it is long."""
    items = "\n".join(f"<li>{html.escape(line)}</li>" for line in lines)
    content = f"<ul>{items}</ul>"
    return _folded(f"{len(lines)} lines", content) if len(lines) > _ROWS else content


def _html_table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    first_number: int | None = None,
    *,
    summary: str = "",
    shown: bool = False,
) -> str:
    """A table. It is folded below its summary if it has a summary or is long."""

    def line(cells, tag):
        texts = []
        for i, cell in enumerate(cells):
            number = first_number is not None and i >= first_number
            kind = ' class="number"' if number else ""
            texts.append(f"<{tag}{kind}>{html.escape(str(cell))}</{tag}>")
        return f"<tr>{''.join(texts)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    kind = ' class="sortable"' if len(rows) > 1 else ""
    text = (
        f"<table{kind}><thead>{line(head, 'th')}</thead>\n<tbody>{body}</tbody></table>"
    )
    if summary or len(rows) > _ROWS:
        return _folded(summary or f"{len(rows)} rows", text, shown=shown)
    return text


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
    parts = [_values_table(cells, list(columns), shown=True)]
    others = [
        name
        for name in compare.metric_names(runs)
        if name not in columns and name.partition("/")[0] not in compare.DIAGNOSTICS
    ]
    if others:
        all_cells, _ = compare.table(runs, others[:_METRICS])
        text = f"{min(len(others), _METRICS)} of {len(others)} further metrics"
        parts.append(_values_table(all_cells, others[:_METRICS], summary=text))
    if "ms per step" in columns:
        parts.append(
            "<p>The time per step contains evaluations. It does not contain the first "
            "rows after a start or a resume, whose time contains compilation.</p>"
        )
    resumed = [f"{r.name}: {text}." for r in runs if (text := compare.resumptions(r))]
    if resumed:
        parts.append(f"<p>Resumed runs:</p>\n{_list(resumed)}")
    return "\n".join(parts)


def _values_table(
    cells: dict[str, dict[str, list[float]]], columns: Sequence[str], **fold: Any
) -> str:
    rows = [
        [name, *(format_cell(summarise(row[column])) for column in columns)]
        for name, row in cells.items()
    ]
    return _html_table(("run", *columns), rows, first_number=1, **fold)


def _figures(runs: Sequence[Run]) -> list[str]:
    found = []
    for kind in ("losses", "weights", "cosines"):
        curves = _curves(runs, _PLACES[kind])
        if any(len(curve.steps) > 1 for curve in curves.values()):
            found.append(_section(kind.capitalize(), _images(kind, runs, curves)))
    if not found:
        text = "No losses, weights or cosines at more than one step."
        found.append(_section("Figures", f"<p>None. {text}</p>"))
    return found


def _images(kind: str, runs: Sequence[Run], curves: dict[str, Any]) -> str:
    """The figures of one kind. All but the first are folded."""
    names, chosen = _column_names(kind, runs, curves), _chosen(kind, curves)
    every = list(curves)
    groups = [every[i : i + _RUNS[kind]] for i in range(0, len(every), _RUNS[kind])]
    drawn = sum(map(len, groups[:_FIGURES]))
    notes = []
    if drawn < len(runs):
        notes.append(f"The figures show {drawn} of {len(runs)} runs.")
    if len(chosen) < len(names):
        things = "pairs of tasks" if kind == "cosines" else "tasks"
        count = f"{len(chosen)} of {len(names)} {things}"
        notes.append(f"The figures show {count}, {_CHOICES[kind]}.")
    parts = [f"<p>{' '.join(notes)}</p>"] if notes else []
    for number, group in enumerate(groups[:_FIGURES]):
        picture = _draw(kind, {run: curves[run] for run in group}, names, chosen)
        columns = ", ".join(names[index] for index in chosen)
        text = (
            f"{_CONTENTS[kind]}. Runs: {', '.join(group)}. Lines or panels: {columns}."
        )
        image = _image(picture, text, dpi=100 if number else 140)
        start = number * _RUNS[kind]
        title = f"{kind.capitalize()} of runs {start + 1} to {start + len(group)}: "
        parts.append(_folded(title + ", ".join(group), image) if number else image)
    return "\n".join(parts)


def _image(picture: Any, text: str, dpi: int) -> str:
    """A figure as an HTML image, with more pixels than its width on the page."""
    from PIL import Image

    full = Image.open(io.BytesIO(_rendered(picture, "png", dpi))).convert("RGB")
    small = io.BytesIO()  # 64 colours need a quarter of the bytes
    full.quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    content = base64.b64encode(small.getvalue()).decode()
    width = round(90 * picture.get_figwidth())
    return (
        f'<div class="figure"><img alt="{html.escape(text)}" width="{width}" '
        f'src="data:image/png;base64,{content}"></div>'
    )


def _configuration(runs: Sequence[Run]) -> str:
    differ = compare.config_differences(runs)
    if not differ:
        rows = list(runs[0].config.items())
        return _html_table(("field", "all runs"), rows) if rows else ""
    if len(runs) > len(differ):  # fewer columns than rows
        rows = [
            [run.name, *(values[i] for values in differ.values())]
            for i, run in enumerate(runs)
        ]
        return _html_table(("run", *differ), rows)
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
    return _list(lines)
