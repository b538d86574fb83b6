"""``python -m experiments.fs_mtl [smoke|cpu|...] [--field value ...]``."""

import functools

from experiments.common.cli import make_cli
from experiments.fs_mtl.config import Config, Entry, check, entries, seed_groups


def make_runner(config: Config, name: str, splits, epoch: int):
    """Returns a function that runs an entry of a data set, or reads its files.

    It returns the rows of all seeds, or None if they are not finished.
    """
    from experiments.common import runs
    from experiments.fs_mtl import problem, train

    @functools.cache
    def bench(task: int | None):  # compiled functions that several entries share
        subject = problem.make_problem(config, splits, task)
        probe = train.make_probe(config, subject) if task is None else None
        return subject, probe, train.make_score(subject)

    def run(entry: Entry):
        program, rows = None, []
        for seeds in seed_groups(config):
            folder = entry.folder(config, name, seeds)
            if config.report_only:
                steps = train.epochs_of(config, entry) * epoch
                found = runs.finished(folder, steps)
                if not found:
                    return None
            else:
                subject, probe, score = bench(entry.task)
                if program is None:  # one compilation for all seeds
                    program = train.make_program(config, subject, entry, probe, score)
                found = train.run_entry(
                    config, subject, entry, program, seeds=seeds, folder=folder
                )
            rows += found
        return rows

    return run


def with_radii(config: Config, entry: Entry, chosen: dict[str, float]) -> list[Entry]:
    """An entry at the radii that are tried: that of the F-line, if there is one."""
    if entry.variant == "plain":
        return [entry]
    line = "linear" if entry.method == "random_loss_weighting" else entry.method
    if (entry.variant != "split" or line != entry.method) and line in chosen:
        return [entry._replace(rho=chosen[line])]
    return [entry._replace(rho=rho) for rho in config.rhos]


def run_set(config: Config, name: str, command: str, screen) -> None:
    """Trains and reports one data set; the report is written after every line."""
    from experiments.common.runs import prepare
    from experiments.fs_mtl import figures, problem, report, train

    splits = problem.load(config, name)
    names = tuple(task.name for task in splits.tasks)
    screen.say(
        f"{name}: {len(splits.train['image'])} training canvases, tasks "
        f"{', '.join(names)}; {splits.notes}"
    )
    todo = entries(config)
    folders = [
        one.folder(config, name, seeds)
        for entry in todo
        for one in with_radii(config, entry, {})
        for seeds in seed_groups(config)
    ]
    epoch = train.steps_per_epoch(config, splits)
    prepare(config, folders)
    run = make_runner(config, name, splits, epoch)
    runs = report.Runs(name, names, {}, {}, epoch)
    radii: dict[str, float] = {}
    for number, entry in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {entry.label}"
        screen.say(head)
        tried = {one: run(one) for one in with_radii(config, entry, radii)}
        found = {one: rows for one, rows in tried.items() if rows is not None}
        if len(found) < len(tried):
            continue
        choice, rows = report.choose_radius(found)
        runs.rows.update(report.at_lengths(config, entry, rows, epoch))
        if entry.variant == "split" and choice.lr is not None:
            radii[entry.method] = choice.lr
        if len(found) > 1:
            runs.radii[entry] = {one.rho: rows for one, rows in found.items()}
        best = report.chosen(runs.rows[entry])
        mean = sum(row["test_score"] for row in best) / len(best)
        screen.say(f"{head}: test accuracy {100 * mean:.2f}")
        if not config.report_only:
            report.write(config, runs, command, splits.notes)
    if not runs.rows:
        screen.say(f"{name}: no finished run in {config.out}")
        return
    written = report.write(config, runs, command, splits.notes)
    if config.plots:
        written += figures.write(config, runs)
    title = f"{name}, test, mean ± sd over {config.seeds} seeds"
    screen.show(report.make_report(runs), title, exclude=report.SINGLE)
    screen.finish(written)


def main(config: Config, command: str) -> None:
    """Runs all data sets, one after the other."""
    check(config)
    # Imported here, so that --help and mistyped options respond immediately.
    from experiments.common.report import Screen

    screen = Screen()
    for name in config.sets:
        run_set(config, name, command, screen)


cli = make_cli(main, "fs_mtl")

if __name__ == "__main__":
    cli()
