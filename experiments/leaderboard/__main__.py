"""Command line: ``python -m experiments.leaderboard [PRESET]``."""

import os
import sys

from experiments.common.cli import make_cli
from experiments.common.config import folder_name
from experiments.leaderboard.config import Config, check

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def main(config: Config, command: str) -> None:
    """Trains the jobs that are not finished, then writes the report."""
    check(config)
    from experiments.leaderboard.options import external

    for name in config.add:
        external(name)  # a mistyped name is found before anything is trained
    from experiments.common.report import Screen
    from experiments.leaderboard import packed, queue, report

    screen = Screen()
    if config.check_sets:
        from experiments.leaderboard.reference import check_sets

        sys.exit(1 if check_sets(config, screen.say) else 0)
    start = packed.read_start(config)
    queue.open_folder(config)
    if start:
        taken = packed.take_over(config, start)
        screen.say(f"{taken} finished jobs taken from {config.start_from}")
    if config.recheck:
        from experiments.leaderboard.recheck import recheck, sentence

        one_thread()
        found = recheck(config, screen.say)
        screen.say(sentence(found, config))
        sys.exit(int(any(found)))
    wanted = queue.jobs(config)
    left = sum(not job.done(config.out) for job in wanted)
    screen.say(
        f"{len(config.sets)} sets x {len(config.rows)} rows, {left} of {len(wanted)} "
        f"jobs to train; {len(config.lrs)} learning rates x {config.seeds} seeds x "
        f"{config.steps} steps each; writing to {config.out}"
    )
    if left and not config.report_only:
        run_all(config)
    if config.train_only:
        return
    written, conclusions = report.write(config, command)
    screen.say(conclusions)
    if config.steps < 500:
        screen.say("These runs are too short: the numbers of `smoke` mean nothing.")
    screen.finish(written)


def run_all(config: Config) -> None:
    """Trains in this process, and in ``config.jobs - 1`` further ones."""
    import multiprocessing

    one_thread()
    context = multiprocessing.get_context("spawn")
    helpers = [
        context.Process(target=run_one, args=(config, os.getpid()), daemon=True)
        for _ in range(config.jobs - 1)
    ]
    for process in helpers:
        process.start()
    run_one(config)
    for process in helpers:
        process.join()


def one_thread() -> None:
    """Each process uses one thread. XLA reads the flag when it is first used."""
    flags = os.environ.get("XLA_FLAGS", "")
    if ONE_THREAD not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()


def run_one(config: Config, parent: int | None = None) -> None:
    """Trains jobs in this process until none is left, or its parent ends."""
    import jax

    from experiments.common.report import Screen
    from experiments.leaderboard import queue

    # Compiled programs are kept, so that a resumed run does not compile again.
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        folder = config.out / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    screen = Screen()
    for job, seconds in queue.work(config, parent):
        screen.say(f"{folder_name(job.set)} {job.row}: {seconds:.1f} s")


cli = make_cli(main, "leaderboard", default="cpu")

if __name__ == "__main__":
    cli()
