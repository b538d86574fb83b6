"""``python -m experiments.alternating [smoke|cpu|paper] --data-dir DIR``."""

import time

from experiments.alternating.config import PRESETS, SINGLE_TASK, Config, check
from mtljax.training.cli import run_cli


def run_set(config: Config, name: str, command: str, console) -> bool:
    """Trains all rows of a set and writes its comparison; False if interrupted."""
    from experiments.alternating import problem as problems
    from experiments.alternating import report, studies, timing, train
    from mtljax.training import tables

    started = time.perf_counter()
    setting = config.setting(name)
    problem = problems.make_problem(config, name)
    console.print(
        f"{name}: {problem.num_tasks} tasks, {len(setting.rows)} rows x "
        f"{config.seeds} seeds, {setting.steps} batches each; writing to "
        f"{config.out / name}",
        highlight=False,
    )
    evaluator = train.Evaluator(problem)
    names = (SINGLE_TASK, *dict.fromkeys(setting.rows))
    rows, scales, aligned = {}, {}, {}
    try:
        for row in names:
            found = train.run_row(config, problem, row, evaluator)
            if found:
                rows[row] = found
        if SINGLE_TASK not in rows or len(rows) < 2:
            console.print(f"{name}: nothing is finished", highlight=False)
            return True
        if setting.scales:
            scales = studies.scale(config, problem, rows, evaluator)
        if setting.alignment:
            aligned = studies.alignment(config, problem, rows, evaluator)
    except train.Interrupted:
        return False
    left = [row for row in names if row not in rows]
    if left:
        console.print(f"{name}: not finished: {', '.join(left)}", highlight=False)
    names = tuple(rows)
    costs = {row: train.cost_of(row, problem.num_tasks) for row in names}
    measured = {}
    if config.time_rounds and not config.report_only:
        measured = timing.measure(
            problem, names[1:], setting.batch_size, config.time_rounds
        )
    table = report.make_report(rows, problem.columns, costs, measured, setting.steps)
    more = {}
    if scales:
        title = f"Test metric by the factor of the loss of {problem.tasks[-1]}:"
        more[title] = report.scale_table(scales, problem.columns)
    if aligned:
        title = "Gradients of the tasks on training examples, plain SGD:"
        more[title] = report.alignment_table(aligned)
    beside = {"scale": scales}
    beside |= {f"alignment-{part}": {row: r} for (row, part), r in aligned.items()}
    written = [
        report.write_rows(rows, beside, measured, name, config),
        report.write_table(table, name, config, command, more),
    ]
    if config.plots:
        from experiments.alternating import figures

        written += figures.write(
            config.out / name,
            name,
            rows,
            problem.columns,
            tasks=problem.tasks,
            costs=costs,
            measured=measured,
            scales=scales,
            aligned=aligned,
        )
    shown = tables.rich_table(
        table.rows,
        table.columns,
        digits=table.digits,
        title=f"{name}, test, mean ± sd over {config.seeds} seeds",
        exclude=["single task"],
    )
    # No number is cut off where the output is narrow, or a pipe.
    wide = console.options.update(max_width=400)
    console.width = max(console.width, console.measure(shown, options=wide).maximum)
    console.print(shown)
    console.print(f"{time.perf_counter() - started:.0f} s. Written:", highlight=False)
    for path in written:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    return True


def main(config: Config, command: str) -> None:
    """All sets, one after the other."""
    # Here, so that --help and mistyped options answer at once.
    from rich.console import Console

    check(config)
    console = Console()
    for name in config.sets:
        if not run_set(config, name, command, console):
            return


def cli() -> None:
    """Reads the command line; errors are one sentence, unless MTLJAX_TRACEBACK=1."""
    run_cli(
        main,
        PRESETS,
        prog="python -m experiments.alternating",
        description="Joint, alternating and grouped optimiser steps on tasks of "
        "different nature, learning rates matched. Without a preset, `cpu` runs.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
