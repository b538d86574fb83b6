"""``python -m experiments.fs_mtl [smoke|cpu|lenet|paper] [--field value ...]``."""

import time
from typing import Any, NamedTuple

from experiments.common import cli as common
from experiments.fs_mtl.config import (
    PRESETS,
    Config,
    Entry,
    check,
    entries,
    seed_groups,
)


def say(text: str) -> None:
    """A line that is seen at once, also in a pipe."""
    print(text, flush=True)


class Bench(NamedTuple):
    """What the entries of a data set share, compiled once."""

    problem: Any
    instruments: Any
    probe: Any
    score: Any


def make_benches(config: Config, splits: Any, wanted: set[int | None]):
    """One for the multi-task entries and one for every single task."""
    from experiments.fs_mtl import analysis, problem, train

    strangers = None
    if config.ood is not None:
        strangers = problem.load(config, config.ood).test["image"]

    def make(task: int | None) -> Bench:
        subject = problem.make_problem(config, splits, task)
        return Bench(
            subject,
            analysis.make_instruments(config, subject, strangers),
            train.make_probe(config, subject) if task is None else None,
            train.make_score(subject),
        )

    return {task: make(task) for task in wanted}


class Runner(NamedTuple):
    """Runs entries of one data set, or reads them."""

    config: Config
    name: str
    benches: dict[int | None, Bench]
    steps: int

    def __call__(self, entry: Entry):
        """Rows and measurements of all seeds; None if they are not finished."""
        from experiments.common import runs
        from experiments.fs_mtl import analysis, train

        config, bench = self.config, self.benches[entry.task]
        program = None
        rows, measured = [], []
        for seeds in seed_groups(config):
            folder = entry.folder(config, self.name, seeds)
            if config.report_only:
                found = runs.finished(folder, self.steps)
                if not found:
                    return None
                rows, measured = (
                    rows + found,
                    measured + analysis.stored(config, folder),
                )
                continue
            if program is None:  # one compilation for all seeds
                program = train.make_program(
                    config, bench.problem, entry, bench.probe, bench.score
                )
            place: dict[str, Any] = {"seeds": seeds, "folder": folder}
            result = train.run_entry(config, bench.problem, entry, program, **place)
            rows += result.rows
            measured += analysis.analyse(
                config, entry, result.state, bench.instruments, **place
            )
        return rows, measured


def run_set(config: Config, name: str, command: str, clock: "Clock") -> None:
    """Trains, measures and reports one data set."""
    from experiments.common.runs import prepare
    from experiments.fs_mtl import analysis, problem, report, train

    splits = problem.load(config, name)
    names = tuple(task.name for task in splits.tasks)
    say(
        f"{name}: {len(splits.train['image'])} training canvases, tasks "
        f"{', '.join(names)}; {splits.notes}"
    )
    todo = entries(config)
    benches = make_benches(config, splits, {entry.task for entry in todo})
    folders = [e.folder(config, name, s) for e in todo for s in seed_groups(config)]
    prepare(config, folders, extra=(analysis.FILE,))
    epoch = train.steps_per_epoch(config, next(iter(benches.values())).problem)
    run = Runner(config, name, benches, config.epochs * epoch)
    runs = report.Runs(name, names, {}, {}, epoch)
    for entry in todo:
        clock.next(entry.label)
        found = run(entry)
        if found is None:
            continue
        runs.rows[entry], measured = found
        if measured:
            runs.analysis[entry] = measured
        best = report.chosen(runs.rows[entry])
        mean = sum(row["test_score"] for row in best) / len(best)
        clock.done(f"{entry.label}: test accuracy {100 * mean:.2f}")
    publish(config, runs, command, splits.notes)


def publish(config: Config, runs: Any, command: str, notes: str) -> None:
    """Tables, rows and plots of a data set."""
    from experiments.fs_mtl import figures, report

    if not runs.rows:
        say(f"{runs.name}: no finished run in {config.out}")
        return
    written = [report.write(config, runs, command, notes)]
    written.append(report.write_rows(config, runs))
    if config.plots:
        written += figures.write(config, runs)
    for line in [*report.summary(runs), *map(str, written)]:
        say(f"  {line}")


class Clock:
    """Says which of all runs is on, and about how long the rest takes."""

    def __init__(self, total: int):
        self.total, self.number = total, 0
        self.started = time.perf_counter()

    def next(self, label: str) -> None:
        """Starts a run."""
        self.number += 1
        say(f"[{self.number}/{self.total}] {label}")

    def done(self, text: str) -> None:
        """Ends it."""
        elapsed = time.perf_counter() - self.started
        left = elapsed / self.number * (self.total - self.number)
        say(f"[{self.number}/{self.total}] {text}; {elapsed:.0f} s, {left:.0f} s to go")


def main(config: Config, command: str) -> None:
    """All sets, one after the other."""
    check(config)
    clock = Clock(len(config.sets) * len(entries(config)))
    for name in config.sets:
        run_set(config, name, command, clock)


def cli() -> None:
    """Reads the command line."""
    common.run(
        main,
        PRESETS,
        "fs_mtl",
        "Sharpness-aware multi-task learning: balancers with and without SAM, in every "
        "order of the two, and controls without a balancer.",
    )


if __name__ == "__main__":
    cli()
