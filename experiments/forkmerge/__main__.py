"""``python -m experiments.forkmerge [smoke|cpu|paper] --data-dir DIR``."""

import functools
import time
from collections.abc import Callable
from typing import Any

from experiments.common import cli as common
from experiments.forkmerge.config import LABELS, PRESETS, Config, check


def main(config: Config, command: str) -> None:
    """Trains everything, then writes and prints the comparison."""
    check(config)
    # Here, so that --help and mistyped options answer at once.
    from experiments.common.report import Screen
    from experiments.forkmerge import report

    screen = Screen()
    screen.say(
        f"{len(config.domains)} targets x {config.seeds} seeds, {config.steps} steps "
        f"each; writing to {config.out}"
    )
    rows = train_all(config, screen.say)
    kept = report.reported(rows)
    written = [
        report.write_rows(kept, config),
        report.write_table(rows, kept, config, command),
    ]
    if config.plots:
        from experiments.forkmerge import figures

        written += figures.write(rows, kept, config)
    for part in ("table", "shared"):
        if part in config.parts:
            title = f"test score on the target, %, over {config.seeds} seeds"
            table = report.make_report(kept, config, part)
            screen.show(table, title, exclude=[LABELS["stl"]])
    if "pairs" in config.parts:
        for method, pairs in report.pair_gains(kept, config).items():
            screen.say(
                f"{LABELS[method]}, one auxiliary at a time: {pairs.negative} pairs "
                f"worse than STL, {pairs.significant(-1)} of them significantly"
            )
    screen.finish(written)


def train_all(config: Config, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of all parts; what is on disk already is not trained again."""
    from experiments.forkmerge import problem, report, shared, train

    rows: list[dict[str, Any]] = []

    def finish(job: train.Job, label: str) -> None:
        begun = time.perf_counter()
        rows.extend(train.Run(config, job).finish())
        say(f"{label}: {time.perf_counter() - begun:.0f} s")

    def tune(part: str, method: str) -> float:
        tuned = report.tune(rows, part, method)
        assert tuned is not None
        say(f"{LABELS[method]}: learning rate {tuned:g} of {config.lrs}")
        return tuned

    domains = {"table", "pairs", "intervals"} & set(config.parts)
    if domains:
        found = problem.make_problem(config)
        make = functools.partial(
            train.make_job, config, found, problem.make_evaluate(found)
        )
        tuned: dict[str, float] = {}
        for method in train.TUNED:
            finish(make(method, tuned=tuned), LABELS[method])
            tuned[method] = tune("table", method)
        if "pairs" in domains:
            for method in ("ew", "forkmerge"):
                label = f"{LABELS[method]}, one auxiliary"
                finish(make(method, part="pairs", tuned=tuned), label)
        if "table" in domains:
            for method in dict.fromkeys(config.methods):
                if method not in tuned:
                    finish(make(method, tuned=tuned), LABELS[method])
        if "intervals" in domains:
            for interval in config.intervals:
                job = make(
                    "forkmerge", part="intervals", tuned=tuned, interval=interval
                )
                finish(job, f"{LABELS['forkmerge']}, Δt = {interval}")
    if "shared" in config.parts:
        one_input = shared.make_problem(config)
        measure, tuned = shared.make_evaluate(one_input), {}
        for method in (*train.TUNED, "forkmerge", "forkmerge_each"):
            job = train.make_shared_job(config, one_input, measure, method, tuned=tuned)
            finish(job, f"one input, {LABELS[method]}")
            if method in train.TUNED:
                tuned[method] = tune("shared", method)
    return rows


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "forkmerge",
        "ForkMerge and other ways to learn from auxiliary tasks, on digits of five "
        "domains.",
        default="cpu",
    )


if __name__ == "__main__":
    cli()
