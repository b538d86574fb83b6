"""``python -m experiments.alternating [smoke|cpu|paper] [--field value ...]``."""

import os
import sys
import time

import jax
import tyro

from experiments.alternating.config import PRESETS, SINGLE_TASK, Config, check


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints the comparison."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    from experiments.alternating import problem as problems
    from experiments.alternating import report, timing, train
    from mtljax.training import tables

    started = time.perf_counter()
    check(config)
    problem = problems.make_problem(config)
    console = Console()
    console.print(
        f"{config.tasks}: {problem.num_tasks} tasks, {len(config.rows)} rows x "
        f"{config.seeds} seeds, {config.steps} batches each; writing to {config.out}",
        highlight=False,
    )
    names = (SINGLE_TASK, *dict.fromkeys(config.rows))
    programs = {name: train.make_program(problem, name) for name in names}
    rows = {}
    for name in names:
        result = train.run_row(config, problem, name, programs[name])
        if result.interrupted:
            return
        rows[name] = result.rows
    costs = {name: program.cost for name, program in programs.items()}
    programs.pop(SINGLE_TASK)
    times = timing.step_times(config, problem, programs) if config.time_steps else {}
    table = report.make_report(rows, costs, times, config.steps)
    written = [
        report.write_rows(rows, times, config),
        report.write_table(table, config, command),
    ]
    if config.plots:
        written += report.write_plots(rows, table, config)
    shown = tables.rich_table(
        table.rows,
        table.columns,
        digits=table.digits,
        title=f"{config.tasks}, test, mean ± sd over {config.seeds} seeds",
        exclude=["single task"],
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
        prog="python -m experiments.alternating",
        description="Joint, alternating and grouped optimiser steps on overlaid real "
        "digits, learning rates matched. Without a preset, `cpu` runs.",
    )
    if config.quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    command = " ".join(["python -m experiments.alternating", *arguments])
    try:
        main(config, command)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("MTLJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli()
