"""Command line: ``python -m experiments.igb [PRESET]``."""

from experiments.common.cli import make_cli
from experiments.igb.config import SINGLE_TASK, Config, check


def main(config: Config, command: str) -> None:
    """Trains all rows, then writes and prints a table for each data set."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen
    from experiments.igb import report, train

    screen = Screen()
    found = {}
    for name in config.data:
        problem = train.make_problem(config, name)
        settings = problem.settings
        screen.say(
            f"{name}: {len(problem.train['image'])} training examples, "
            f"{problem.dataset.num_tasks} tasks; {len(settings.methods)} methods x "
            f"{config.seeds} seeds x {len(settings.lrs)} learning rates, "
            f"{settings.steps} steps each; writing to {config.folder(name)}"
        )
        found[name] = run_problem(config, problem, command, screen)
        if len(found) > 1 and config.seeds > 1:
            screen.finish(report.write_summary(found, config, command))


def run_problem(config: Config, problem, command: str, screen):
    """One data set: the values of all rows."""
    from experiments.common.selection import search
    from experiments.igb import report, train

    settings, names = problem.settings, problem.names
    methods = (SINGLE_TASK, *settings.methods)
    rows, _, _ = search(
        lambda rates: {m: train.run_method(config, problem, m, rates) for m in methods},
        report.any_choice,
        settings.lrs,
        config.extensions,
    )
    values = report.Values(rows, names)
    table = report.make_report(values, problem.name)
    times = {}
    if {report.TIMED, report.REFERENCE} <= set(methods):
        pair = (report.TIMED, report.REFERENCE)
        times = {report.TIMED: train.run_times(config, problem, *pair)}
        times[report.REFERENCE] = [1.0] * config.seeds
    written = report.write(values, table, config, problem, command, times=times)
    title = f"{problem.name}, test, mean ± sd over {config.seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)
    return values


cli = make_cli(main, "igb", default="cpu")

if __name__ == "__main__":
    cli()
