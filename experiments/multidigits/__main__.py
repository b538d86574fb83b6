"""Command line: ``python -m experiments.multidigits [PRESET]``."""

from experiments.common import cli as common
from experiments.multidigits.config import PRESETS, SINGLE_TASK, Config, check


def main(config: Config, command: str) -> None:
    """Trains all rows, then writes and prints the comparison."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen
    from experiments.common.timing import step_times
    from experiments.multidigits import report, train

    screen = Screen()
    problem = train.make_problem(config)
    names = [task.name for task in problem.dataset.tasks]
    screen.say(
        f"{config.data}: {len(problem.train['image'])} training examples, tasks "
        f"{', '.join(names)}; {len(config.methods)} methods x {config.seeds} seeds, "
        f"{config.steps} steps each; writing to {config.out}"
    )
    methods = (SINGLE_TASK, *config.methods)
    programs = {m: train.make_program(config, problem, m) for m in methods}
    rows = {m: train.run_method(config, problem, m, programs[m]).rows for m in methods}
    programs.pop(SINGLE_TASK)
    times = {}
    if config.time_steps:
        times = step_times(
            {m: train.stopwatch(config, problem, m, p) for m, p in programs.items()}
        )
    table = report.make_report(rows, problem.columns, names, times)
    written = [
        report.write_rows(rows, times, config),
        report.write_table(table, rows, config, command),
        *report.write_plots(rows, table, names, config),
    ]
    title = f"{config.data}, test, mean ± sd over {config.seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "multidigits",
        "Compares single-task baselines with multi-task methods on overlaid real "
        "digits or on your own data set.",
        default="demo",
    )


if __name__ == "__main__":
    cli()
