"""``python -m experiments.trajectories [smoke|cpu|paper] --data-dir DIR``."""

from experiments.common import cli as common
from experiments.trajectories.config import PRESETS, Config, check


def main(config: Config, command: str) -> None:
    """Trains and measures everything, then writes tables and figures."""
    check(config)
    # Here, so that --help and mistyped options answer at once.
    from experiments.common.report import Screen
    from experiments.trajectories import data, model, report, train

    screen = Screen()
    problems = {name: data.load(config, name) for name in config.settings}
    lines = []
    for name, problem in problems.items():
        scale = config.scale(name)
        rows = train.rows_of(config, problem)
        screen.say(
            f"{name}: {len(problem.train['label'])} training images a task, "
            f"{len(problem.tasks)} tasks, {len(rows)} rows x {config.seeds} seeds, "
            f"{scale.steps} steps each; writing to {config.out}"
        )
        shared: dict[int, model.Functions] = {}  # by K: data are arguments
        for row in rows:
            chosen = problem.select(row.tasks)
            if len(row.tasks) not in shared:
                made = model.make_functions(config, scale, chosen)
                shared[len(row.tasks)] = made
            functions = shared[len(row.tasks)]
            lines += train.run_tuned(config, scale, chosen, functions, row)
    screen.finish(report.write(config, lines, command))


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "trajectories",
        "What training with other tasks does to each task's trajectory, and whether it "
        "explains transfer.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
