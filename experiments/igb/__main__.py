"""``python -m experiments.igb [smoke|cpu|paper] --data-dir DIR [--field value]``."""

from experiments.common import cli as common
from experiments.igb.config import PRESETS, SINGLE_TASK, Config, check


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints a table for each data set."""
    check(config)
    # Here, so that --help and mistyped options answer at once.
    from experiments.common.report import Screen
    from experiments.igb import train

    screen = Screen()
    for name in config.data:
        problem = train.make_problem(config, name)
        settings = problem.settings
        screen.say(
            f"{name}: {len(problem.train['image'])} training examples, "
            f"{problem.dataset.num_tasks} tasks; {len(settings.methods)} methods x "
            f"{config.seeds} seeds, {settings.steps} steps each; writing to "
            f"{train.folder(config, name)}"
        )
        run_problem(config, problem, command, screen)


def run_problem(config: Config, problem, command: str, screen) -> None:
    """One data set."""
    from experiments.common import timing
    from experiments.igb import report, train

    settings = problem.settings
    rows, times, reference = {}, {}, None
    for method in (SINGLE_TASK, *settings.methods):
        program = train.make_program(config, problem, method)
        result = train.run_method(config, problem, method, program)
        rows[method] = result.rows
        if settings.time_steps and method != SINGLE_TASK:
            _, order = train.initial_state(config, problem, method, program)
            watch = timing.Stopwatch(  # from the end of training: the buffer is full
                program.step,
                result.state,
                problem.train,
                order,
                batch_size=settings.batch_size,
                steps=settings.time_steps,
            )
            if method == "linear":
                watch.measure()
                reference = watch
            if reference is not None:
                times[method] = timing.relative_time(watch, reference)
    table = report.make_report(rows, problem.names, problem.name, times)
    written = report.write(rows, table, times, config, problem, command)
    title = f"{problem.name}, test, mean ± sd over {config.seeds} seeds"
    screen.show(table, title, exclude=["single task"])
    screen.finish(written)


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "igb",
        "Improvable gap balancing and other methods, on molecules and on tables with "
        "several targets.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
