"""``python -m experiments.trajectories [smoke|cpu|paper] --data-dir DIR``."""

import time

from experiments.trajectories.config import PRESETS, Config, check
from mtljax.training.cli import run_cli


def main(config: Config, command: str) -> None:
    """Trains and measures everything, then writes tables and figures."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    from experiments.trajectories import data, model, report, train

    started = time.perf_counter()
    check(config)
    console = Console()
    problems = {name: data.load(config, name) for name in config.settings}
    lines = []
    for name, problem in problems.items():
        scale = config.scale(name)
        rows = train.rows_of(config, problem)
        console.print(
            f"{name}: {len(problem.train['label'])} training images a task, "
            f"{len(problem.tasks)} tasks, {len(rows)} rows x {config.seeds} seeds, "
            f"{scale.steps} steps each; writing to {config.out}",
            highlight=False,
        )
        shared: dict[int, model.Functions] = {}  # by K: data are arguments
        for row in rows:
            chosen = problem.select(row.tasks)
            if len(row.tasks) not in shared:
                made = model.make_functions(config, scale, chosen)
                shared[len(row.tasks)] = made
            functions = shared[len(row.tasks)]
            found = train.run_tuned(config, scale, chosen, functions, row)
            if found is None:
                return
            lines += found
    written = report.write(config, lines, command)
    console.print(f"{time.perf_counter() - started:.0f} s. Written:", highlight=False)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def cli() -> None:
    """Reads the command line; errors are one sentence, unless MTLJAX_TRACEBACK=1."""
    run_cli(
        main,
        PRESETS,
        prog="python -m experiments.trajectories",
        description="What training with other tasks does to each task's trajectory, "
        "and whether it explains transfer. Without a preset, `cpu` runs.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
