"""Command line: ``python -m experiments.multidigits [PRESET]``."""

from experiments.common.cli import make_cli
from experiments.multidigits.config import SINGLE_TASK, Config, check


def main(config: Config, command: str) -> None:
    """Trains all rows, then writes and prints the comparison."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen
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
    rows = {m: train.run_method(config, problem, m, programs[m]) for m in methods}
    programs.pop(SINGLE_TASK)
    times = {}
    if config.time_steps:
        times = train.step_times(config, problem, programs)
    table = report.make_report(rows, problem.columns, names, times)
    written = report.write(rows, times, table, config, command)
    if config.plots:
        written += report.write_plots(rows, table, names, config)
    title = f"{config.data}, test, mean ± sd over {config.seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


cli = make_cli(main, "multidigits", default="demo")

if __name__ == "__main__":
    cli()
