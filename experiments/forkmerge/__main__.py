"""Command line: ``python -m experiments.forkmerge [PRESET]``."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.common.cli import make_cli
from experiments.forkmerge.config import LABELS, Config, check


def main(config: Config, command: str) -> None:
    """Trains all rows, then writes and prints the comparison."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen
    from experiments.forkmerge import report

    screen = Screen()
    screen.say(
        f"{len(config.domains)} targets x {config.seeds} seeds, {config.steps} steps "
        f"each; writing to {config.out}"
    )
    kept, written = [], []
    for rows, last in train_all(config, screen.say):
        kept = report.reported(rows)
        written = report.write(kept, config, command)
        if config.plots and last:
            from experiments.forkmerge import figures

            written += figures.write(rows, kept, config)
    if "table" in config.parts:
        title = f"test score on the target at the last step, %, {config.seeds} seeds"
        screen.show(report.make_report(kept, config), title, exclude=[LABELS["stl"]])
    screen.finish(written)


def train_all(
    config: Config, say: Callable[[str], None]
) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """The rows so far after every method; then all, and True.

    What is on disk already is not trained again.
    """
    from experiments.common.selection import search
    from experiments.forkmerge import problem, report, train
    from experiments.forkmerge.steps import JOINT

    rows: list[dict[str, Any]] = []
    found = problem.make_problem(config)
    evaluate = problem.make_evaluate(found)

    def finish(method: str, rates: Sequence[float], *, measure=evaluate, **more: Any):
        begun = time.perf_counter()
        job = train.make_job(config, found, measure, method, rates, **more)
        made = train.Run(config, job).finish()
        rows.extend(made)
        say(f"{LABELS[method]}, {job.name}: {time.perf_counter() - begun:.0f} s")
        return made

    def tune(methods: Sequence[str], rates: Sequence[float], extensions: int):
        return search(
            lambda rates: {method: finish(method, rates) for method in methods},
            report.choose,
            rates,
            extensions,
        )

    _, choices, offered = tune(("stl", "ew"), config.lrs, config.extensions)
    tuned = {m: (c.lr,) for m, c in choices.items() if c.lr is not None}
    yield rows, False
    joint = [m for m in config.methods if m in JOINT and m != "ew"]
    alone = [m for m in config.methods if m not in (*joint, "stl", "ew")]
    if "table" in config.parts:
        for method in sorted(alone, key=lambda m: m in ("post_train", "lambda_grid")):
            finish(method, tuned["stl"])
            yield rows, False
    if "pairs" in config.parts:
        finish("ew", tuned["ew"], part="pairs")
        finish("forkmerge", tuned["stl"], part="pairs")
        yield rows, False
    if "intervals" in config.parts:
        for interval in config.intervals:
            finish("forkmerge", tuned["stl"], part="intervals", interval=interval)
        yield rows, False
    if "analysis" in config.parts:
        cosines = problem.make_evaluate(found, cosines=True)
        rates = tuned["stl"]
        finish("lambda_grid", rates, part="analysis", measure=cosines)
        yield rows, False
    if "table" in config.parts:
        for method in joint:
            tune((method,), offered, 0)  # no more rates than STL and EW had
            yield rows, False
    yield rows, True


cli = make_cli(main, "forkmerge", default="cpu")

if __name__ == "__main__":
    cli()
