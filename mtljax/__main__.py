"""The command ``mtljax``, which is also ``python -m mtljax``.

``mtljax methods`` and ``mtljax show`` print the registry and need the core only.
``mtljax compare``, ``plot`` and ``report`` read the rows of training runs and need the
extra ``train``. An error is one sentence on the standard error stream.
"""

import argparse
import csv
import inspect
import json
import os
import platform
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import mtljax
from mtljax.catalogue import WRAPPERS, Wrapper, method_reads, wrappers_table
from mtljax.methods import METHODS, Method, find_row, methods_table

ERROR, MISSING, CLOSED = 2, 3, 141  # exit statuses
FAMILIES = ("loss balancing", "gradient balancing")
READS = ("nothing", "losses", "Gramian", "gradients")
_STATE = "without the last task weights and the solver status"
KINDS = ("losses", "weights", "cosines", "tradeoff")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: Command-line arguments. By default those of the process.

    Returns:
      The exit status. It is 0, or 2 for an error of usage or data, 3 if an extra is
      missing, 141 if the reading process closed the pipe.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reading process, for example `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except ModuleNotFoundError as error:
        print(f"mtljax: {error}", file=sys.stderr)
        return MISSING
    except (OSError, ValueError, RuntimeError) as error:
        print(f"mtljax: {error}", file=sys.stderr)
        return ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mtljax",
        description="Lists the methods of mtljax and compares training runs. Without "
        "a command it prints the tables of methods and wrappers as Markdown.",
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.set_defaults(run=_tables)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, run: Callable[[Any], None], text: str) -> Any:
        new = commands.add_parser(name, help=text, description=text)
        new.set_defaults(run=run)
        return new

    new = command("methods", _methods, "Lists the methods.")
    new.add_argument(
        "--family",
        type=_choice(FAMILIES),
        choices=FAMILIES,
        help="one family only; `loss` and `gradient` are accepted, too",
    )
    new.add_argument(
        "--reads",
        type=_choice(READS),
        choices=READS,
        help="only methods that read this, see the documentation of `Balancer.needs`",
    )
    new.add_argument(
        "--format",
        choices=("table", "markdown", "json", "csv"),
        default="table",
        help="the default, `table`, is wrapped to the width of the terminal",
    )
    new = command("show", _show, "Prints the documentation of a method or function.")
    new.add_argument(
        "name",
        help="name or acronym of a method, for example cagrad or Nash-MTL, or name of "
        "a function, for example reuse",
    )

    runs = "folders of runs (with metrics.jsonl or results.jsonl), or folders of these"
    new = command("compare", _compare, "Compares training runs in a table.")
    new.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    new.add_argument("--metric", action="append", help="may be given several times")
    new.add_argument("--mode", choices=("min", "max"), default="min")
    new = command("plot", _plot, "Draws a figure of training runs.")
    new.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    new.add_argument("--kind", choices=KINDS, default="losses")
    new.add_argument("--metric", action="append", help="two metrics, for tradeoff")
    new.add_argument("--mode", choices=("min", "max"), default="min")
    new.add_argument(
        "-o",
        "--output",
        default="plot.png",
        help="a PNG or SVG file; its folder is created",
    )
    new = command("report", _report, "Writes a report as one HTML file.")
    new.add_argument("runs", nargs="+", metavar="RUN", help=runs)
    new.add_argument(
        "-o",
        "--output",
        default="report.html",
        help="an HTML file; its folder is created",
    )
    return parser


def _version() -> str:
    return (
        f"mtljax {mtljax.__version__} (jax {jax.__version__}, optax "
        f"{optax.__version__}, Python {platform.python_version()})"
    )


def _choice(names: Sequence[str]) -> Callable[[str], str]:
    """Accepts one of some names in any case, or the beginning of exactly one."""

    def read(text: str) -> str:
        found = [name for name in names if name.lower().startswith(text.lower())]
        return found[0] if len(found) == 1 else text

    return read


def _tables(options: Any) -> None:
    del options
    print(methods_table())
    print()
    print(wrappers_table())
    print(f"\n{len(METHODS)} methods and {len(WRAPPERS)} wrappers for T tasks.")
    print(f'The column "state" counts numbers, {_STATE}.')


def _row(method: Method) -> dict[str, str]:
    return {
        "name": method.name,
        "label": method.label,
        "family": method.family,
        "source": method.source,
        "reads": method_reads(method),
        "cost": method.cost,
        "state": method.state,
        "summary": method.promise,
    }


def _methods(options: Any) -> None:
    rows = [
        _row(method)
        for method in METHODS.values()
        if options.family in (None, method.family)
    ]
    rows = [row for row in rows if options.reads in (None, row["reads"])]
    if options.format == "json":
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif options.format == "csv":
        writer = csv.DictWriter(
            sys.stdout, list(rows[0]) if rows else ["name"], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    elif options.format == "markdown":
        names = {row["name"] for row in rows}
        head, rule, *lines = methods_table().splitlines()
        lines = [line for line in lines if line.split("`")[1] in names]
        print("\n".join([head, rule, *lines]))
    else:
        shown = ("name", "label", "reads", "cost", "summary")
        print(_wrapped([{key: row[key] for key in shown} for row in rows]))


def _wrapped(rows: Sequence[dict[str, str]]) -> str:
    """A table for a terminal, whose last column is wrapped."""
    if not rows:
        return "No method matches."
    *columns, last = rows[0]
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    indent = sum(widths.values()) + 2 * len(columns)
    space = max(20, shutil.get_terminal_size().columns - indent)
    lines = []
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        start = "".join(f"{row[c]:{widths[c]}}  " for c in columns)
        first, *more = textwrap.wrap(row[last], space) or [""]
        lines += [start + first, *(" " * indent + text for text in more)]
    return "\n".join(line.rstrip() for line in lines)


def _show(options: Any) -> None:
    name = options.name
    found, hint = find_row(name, {**METHODS, **WRAPPERS})
    public = getattr(mtljax, name) if name in mtljax.__all__ else None
    function = found.factory if found else public
    if not inspect.isfunction(function):
        hint = hint or "`mtljax` without a command lists all methods and wrappers."
        raise ValueError(f"no method, wrapper or function is called {name!r}; {hint}")
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    text = signature.replace(parameters=plain, return_annotation=signature.empty)
    print(f"{function.__name__}{text}\n")
    if found:
        _show_row(found)
    print(_plain(inspect.getdoc(function) or ""))


def _show_row(found: Method | Wrapper) -> None:
    if isinstance(found, Method):
        print(f"{found.label}, {found.family}")
        print(f"reads   {method_reads(found)}")
        print(f"cost    {found.cost}")
        print(f"state   {found.state}, {_STATE}")
    else:
        print(f"{found.label}, wrapper")
        print(f"wraps   {found.needs}")
    arxiv = found.source[:4].isdigit()
    source = f"https://arxiv.org/abs/{found.source}" if arxiv else found.source
    print(f"source  {source}\n")


def _plain(text: str) -> str:
    """A docstring without the marks of reStructuredText."""
    text = re.sub(r"`([^`<]+)\s+<([^`>]+)>`_+", r"\1 (\2)", text)
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"\1", text)
    return text.replace("``", "")


# The following commands need the extra "train", which is imported when it is used.


def _compare(options: Any) -> None:
    from mtljax.training import compare

    runs = compare.find_runs(options.runs)
    print(compare.comparison(runs, options.metric, options.mode))


def _plot(options: Any) -> None:
    from mtljax.training import compare, report

    runs = compare.find_runs(options.runs)
    kind, metrics, mode = options.kind, options.metric, options.mode
    print(report.write_figure(runs, kind, options.output, metrics, mode))


def _report(options: Any) -> None:
    from mtljax.training import compare, report

    runs = compare.find_runs(options.runs)
    command = shlex.join(["mtljax", "report", *options.runs, "-o", options.output])
    print(report.write_report(runs, options.output, command))


if __name__ == "__main__":
    sys.exit(main())
