"""Command line: ``python -m experiments.alternating [PRESET]``."""

from experiments.alternating.config import PRESETS, SINGLE_TASK, Config, check
from experiments.common import cli as common


def run_set(config: Config, problem, command: str, screen) -> None:
    """Trains all rows of a data set and writes the comparison."""
    from experiments.alternating import figures, report, studies, train
    from experiments.common.selection import search, select

    name = problem.name
    setting = config.setting(name)
    seeds = len(config.seeds_of(name))
    screen.say(
        f"{name}: {problem.num_tasks} tasks, {len(setting.rows)} rows x {seeds} seeds, "
        f"{setting.steps} batches each; writing to {config.out / problem.folder}"
    )
    evaluator = train.Evaluator(problem)
    names = (SINGLE_TASK, *setting.rows)

    def trained(rates):
        found = {
            row: train.run_row(config, problem, row, evaluator, rates=rates)
            for row in names
        }
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
        scales = studies.scale(config, problem, rows, evaluator)
        results, table, written = write(scales)
    left = [row for row in names if row not in rows]
    if left:
        screen.say(f"{name}: not finished: {', '.join(left)}")
    written += figures.write(results, config)
    title = f"{name}, test, mean ± sd over {seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


def main(config: Config, command: str) -> None:
    """Runs all data sets, one after the other."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.alternating.problem import make_problem
    from experiments.common.report import Screen

    screen = Screen()
    for name in config.sets:
        run_set(config, make_problem(config, name), command, screen)


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "alternating",
        "Joint, alternating and grouped optimizer steps on tasks of different kinds, "
        "at matched learning rates.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
