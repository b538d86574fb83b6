"""``python -m experiments.trajectories [smoke|cpu|...] --data-dir DIR``."""

from experiments.common import cli as common
from experiments.trajectories.config import PRESETS, Config, check


def main(config: Config, command: str) -> None:
    """Trains and measures all rows, then writes tables and figures."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen
    from experiments.trajectories import data, model, report, train

    screen = Screen()
    problems = {name: data.load(config, name) for name in config.settings}
    sets = {name: problem.dataset() for name, problem in problems.items()}
    lines = []
    written = []
    for name, problem in problems.items():
        scale = config.scale(name)
        rows = train.rows_of(config, problem)
        screen.say(
            f"{name}: {len(problem.train['label'])} training images a task, "
            f"{len(problem.tasks)} tasks, {len(rows)} rows x {config.seeds} seeds, "
            f"{scale.steps} steps each; writing to {config.out}"
        )
        shared: dict[int, model.Functions] = {}  # by T, since data are arguments

        def functions_of(tasks, problem=problem, scale=scale, shared=shared):
            if len(tasks) not in shared:
                chosen = problem.select(tasks)
                shared[len(tasks)] = model.make_functions(config, scale, chosen)
            return shared[len(tasks)]

        choice, grid = train.choose_rate(config, scale, problem, functions_of)
        assert choice.lr is not None
        others = [lr for lr in grid if lr != choice.lr and config.blocks == "all"]
        screen.say(f"{name}: learning rate {choice.lr:g} of {grid}")
        for lr in (choice.lr, *others):
            for row in rows:
                lines += train.run_at(
                    config,
                    scale,
                    problem.select(row.tasks),
                    functions_of(row.tasks),
                    row,
                    lr=lr,
                    edge=lr == choice.lr and choice.edge is not None,
                )
                written = report.write(config, lines, command, sets)
    screen.finish(written)


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "trajectories",
        "The effect of joint training on each task's trajectory, and whether it "
        "explains transfer.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
