"""``python -m experiments.igb [smoke|cpu|paper] --data-dir DIR [--field value]``."""

import time

from experiments.igb.config import PRESETS, SINGLE_TASK, Config, check
from mtljax.training.cli import run_cli


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints a table for each data set."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    from experiments.igb import train

    started = time.perf_counter()
    check(config)
    console = Console()
    for name in config.data:
        problem = train.make_problem(config, name)
        settings = problem.settings
        console.print(
            f"{name}: {len(problem.train['image'])} training examples, "
            f"{problem.dataset.num_tasks} tasks; {len(settings.methods)} methods x "
            f"{config.seeds} seeds, {settings.steps} steps each; writing to "
            f"{train.folder(config, name)}",
            highlight=False,
        )
        if not run_problem(config, problem, command, console):
            return
    console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)


def run_problem(config: Config, problem, command: str, console) -> bool:
    """One data set; False if it was interrupted."""
    from experiments.igb import report, timing, train
    from mtljax.training import tables

    settings = problem.settings
    rows, times, reference = {}, {}, None
    for method in (SINGLE_TASK, *dict.fromkeys(settings.methods)):
        program = train.make_program(config, problem, method)
        result = train.run_method(config, problem, method, program)
        if result.interrupted:
            return False
        rows[method] = result.rows
        if settings.time_steps and method != SINGLE_TASK:
            _, order = train.initial_state(config, problem, method, program)
            watch = timing.Stopwatch(problem, program, result.state, order)
            if method == "linear":
                watch.measure()
                reference = watch
            if reference is not None:
                times[method] = timing.relative_time(watch, reference)
    table = report.make_report(rows, problem.names, problem.name, times)
    written = [
        report.write_rows(rows, problem.names, times, config=config, data=problem.name),
        report.write_table(table, config, problem.name, command),
    ]
    if config.plots:
        written += report.write_plots(
            rows, table, problem.names, config=config, data=problem.name
        )
    shown = tables.rich_table(
        table.rows,
        table.columns,
        digits=table.digits,
        title=f"{problem.name}, test, mean ± sd over {config.seeds} seeds",
        exclude=["single task"],
    )
    # No number is cut off where the output is narrow, or a pipe.
    wide = console.options.update(max_width=400)
    console.width = max(console.width, console.measure(shown, options=wide).maximum)
    console.print(shown)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return True


def cli() -> None:
    """Reads the command line; errors are one sentence, unless MTLJAX_TRACEBACK=1."""
    run_cli(
        main,
        PRESETS,
        prog="python -m experiments.igb",
        description="Improvable gap balancing beside other methods, on molecules and "
        "on tables with several targets. Without a preset, `cpu` runs.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
