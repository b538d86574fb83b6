"""``python -m experiments.forkmerge [smoke|cpu|paper] --data-dir DIR``."""

import os
import sys
import time

import jax
import tyro

from experiments.forkmerge.config import LABELS, PRESETS, Config, check


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints the comparison."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    from experiments.forkmerge import problem, report, train
    from mtljax.training import tables

    check(config)
    console = Console()
    found = problem.make_problem(config)
    evaluate = problem.make_evaluate(found)
    console.print(
        f"{len(config.domains)} targets x {config.seeds} seeds, {config.steps} steps "
        f"each; writing to {config.out}",
        highlight=False,
    )
    started, rows = time.perf_counter(), []
    for method in dict.fromkeys(("stl", *config.methods)):
        begun = time.perf_counter()
        rows += train.Run(config, found, method, evaluate).finish()
        seconds = time.perf_counter() - begun
        console.print(f"{LABELS[method]}: {seconds:.0f} s", highlight=False)
    table = report.make_table(rows, config)
    written = [
        report.write_rows(rows, config),
        report.write_table(table, config, command),
    ]
    if config.plots:
        written += report.write_plots(rows, config)
    shown = tables.rich_table(
        table,
        report.columns_of(config),
        digits=report.digits_of(config),
        title=f"test accuracy on the target, %, over {config.seeds} seeds",
        exclude=[LABELS["stl"]],
    )
    # No number is cut off where the output is narrow, or a pipe.
    wide = console.options.update(max_width=400)
    console.width = max(console.width, console.measure(shown, options=wide).maximum)
    console.print(shown)
    console.print(f"{time.perf_counter() - started:.0f} s. Written:", highlight=False)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def cli() -> None:
    """Reads the command line; errors are one sentence, unless MTLJAX_TRACEBACK=1."""
    arguments = sys.argv[1:]
    help_wanted = bool({"-h", "--help"} & set(arguments[:1]))
    if not help_wanted and (not arguments or arguments[0].startswith("-")):
        arguments = ["cpu", *arguments]
    config = tyro.extras.overridable_config_cli(
        PRESETS,
        args=arguments,
        prog="python -m experiments.forkmerge",
        description="ForkMerge and other ways to learn from auxiliary tasks, on digits "
        "of five domains. Without a preset, `cpu` runs.",
    )
    if config.quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    command = " ".join(["python -m experiments.forkmerge", *hidden_paths(arguments)])
    try:
        main(config, command)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("MTLJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def hidden_paths(arguments: list[str]) -> list[str]:
    """The command without the folder that holds the data on this machine."""
    shown = list(arguments)
    for i, argument in enumerate(shown):
        if argument == "--data-dir" and i + 1 < len(shown):
            shown[i + 1] = "DIR"
        elif argument.startswith("--data-dir="):
            shown[i] = "--data-dir=DIR"
    return shown


if __name__ == "__main__":
    cli()
