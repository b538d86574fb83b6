"""Command line: ``python -m experiments.alternating [PRESET]``."""

from experiments.alternating.config import SCALED_ROWS, SINGLE_TASK, Config, check
from experiments.common.cli import make_cli


def run_set(config: Config, problem, command: str, screen) -> None:
    """Trains all rows of a data set and writes the comparison."""
    from experiments.alternating import figures, report, train
    from experiments.common.selection import search, select

    name = problem.name
    setting = config.setting(name)
    seeds = len(config.seeds_of(name))
    screen.say(
        f"{name}: {problem.num_tasks} tasks, {len(setting.rows)} rows x {seeds} seeds, "
        f"{setting.steps} batches each; writing to {config.folder(name)}"
    )
    names = (SINGLE_TASK, *setting.rows)

    def trained(rates):
        found = {row: train.run_row(config, problem, row, rates=rates) for row in names}
        return {row: found[row] for row in names if found[row]}

    rows, _, _ = search(
        trained,
        lambda found: select(found, run=("task", "seed")),
        setting.lrs,
        config.extensions,
    )
    if SINGLE_TASK not in rows or len(rows) < 2:
        screen.say(f"{name}: no row is finished")
        return

    def write(scales):
        results = report.Results(problem, rows, scales, setting.steps)
        table = report.make_report(results)
        return results, table, report.write(results, table, config, command)

    results, table, written = write({})
    if setting.scales:
        results, table, written = write(scale_study(config, problem, rows))
    left = [row for row in names if row not in rows]
    if left:
        screen.say(f"{name}: not finished: {', '.join(left)}")
    written += figures.write(results, config)
    title = f"{name}, test, mean ± sd over {seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


def scale_study(config: Config, problem, rows):
    """Multiplies the last task's loss by each factor, at the rate selected for 1."""
    from experiments.alternating import report, train

    scales, seeds = config.setting(problem.name).scales, config.seeds_of(problem.name)
    found = {}
    for name in SCALED_ROWS:
        if name in rows:
            lr = report.chosen_rate(rows[name])
            runs = [train.Run(s, lr, scale=factor) for factor in scales for s in seeds]
            found[name] = train.run_row(config, problem, name, runs=runs, study="scale")
    return {name: rows for name, rows in found.items() if rows}


def main(config: Config, command: str) -> None:
    """Runs all data sets, one after the other."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.alternating.problem import make_problem
    from experiments.common.report import Screen

    screen = Screen()
    for name in config.sets:
        run_set(config, make_problem(config, name), command, screen)


cli = make_cli(main, "alternating", default="cpu")

if __name__ == "__main__":
    cli()
