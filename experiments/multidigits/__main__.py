"""``python -m experiments.multidigits [smoke|demo|full] [--field value ...]``."""

import time

from experiments.multidigits.config import PRESETS, SINGLE_TASK, Config, check
from mtljax.training.cli import run_cli


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints the comparison."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    from experiments.multidigits import report, timing, train
    from mtljax.training import tables

    started = time.perf_counter()
    check(config)
    problem = train.make_problem(config)
    names = [task.name for task in problem.dataset.tasks]
    console = Console()
    console.print(
        f"{config.data}: {len(problem.train['image'])} training examples, tasks "
        f"{', '.join(names)}; {len(config.methods)} methods x {config.seeds} seeds, "
        f"{config.steps} steps each; writing to {config.out}",
        highlight=False,
    )
    methods = (SINGLE_TASK, *dict.fromkeys(config.methods))
    programs = {m: train.make_program(config, problem, m) for m in methods}
    rows = {}
    for method in methods:
        result = train.run_method(config, problem, method, programs[method])
        if result.interrupted:
            return
        rows[method] = result.rows
    programs.pop(SINGLE_TASK)
    times = timing.step_times(config, problem, programs) if config.time_steps else {}
    table = report.make_report(rows, problem.columns, names, times)
    written = [
        report.write_rows(rows, times, config),
        report.write_table(table, config, command),
    ]
    if config.plots:
        written += report.write_plots(rows, table, names, config)
    shown = tables.rich_table(
        table.rows,
        table.columns,
        digits=table.digits,
        title=f"{config.data}, test, mean ± sd over {config.seeds} seeds",
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
    run_cli(
        main,
        PRESETS,
        prog="python -m experiments.multidigits",
        description="Single-task baselines and multi-task methods on overlaid real "
        "digits, side by side. Without a preset, `demo` runs.",
        default="demo",
    )


if __name__ == "__main__":
    cli()
