"""``python -m experiments.alternating [smoke|cpu|paper] --data-dir DIR``."""

from experiments.alternating.config import PRESETS, SINGLE_TASK, Config, check
from experiments.common import cli as common


def run_set(config: Config, problem, command: str, screen) -> None:
    """Trains all rows of a set and writes its comparison."""
    from experiments.alternating import figures, report, studies, timing, train

    name = problem.name
    setting = config.setting(name)
    screen.say(
        f"{name}: {problem.num_tasks} tasks, {len(setting.rows)} rows x "
        f"{config.seeds} seeds, {setting.steps} batches each; writing to "
        f"{config.out / problem.folder}"
    )
    evaluator = train.Evaluator(problem)
    names = (SINGLE_TASK, *setting.rows)
    found = {row: train.run_row(config, problem, row, evaluator) for row in names}
    rows = {row: found[row] for row in names if found[row]}
    if SINGLE_TASK not in rows or len(rows) < 2:
        screen.say(f"{name}: nothing is finished")
        return
    scales = studies.scale(config, problem, rows, evaluator) if setting.scales else {}
    aligned = {}
    if setting.alignment:
        aligned = studies.alignment(config, problem, rows, evaluator)
    left = [row for row in names if row not in rows]
    if left:
        screen.say(f"{name}: not finished: {', '.join(left)}")
    measured = {}
    if config.time_rounds and not config.report_only:
        measured = timing.measure(
            problem, tuple(rows)[1:], setting.batch_size, config.time_rounds
        )
    results = report.Results(problem, rows, measured, scales, aligned, setting.steps)
    table = report.make_report(results)
    written = report.write(results, table, config, command)
    written += figures.write(results, config)
    title = f"{name}, test, mean ± sd over {config.seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


def main(config: Config, command: str) -> None:
    """All sets, one after the other."""
    check(config)
    # Here, so that --help and mistyped options answer at once.
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
        "Joint, alternating and grouped optimiser steps on tasks of different nature, "
        "learning rates matched.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
