"""Interrupts runs at chosen and at random instants, and compares what they become.

Each run goes through several sessions that end in SIGKILL, SIGTERM, SIGINT, or two of
them: while a checkpoint is written or deleted, while a row is written, during a resume,
in the last chunk and its evaluation, or at a random time. The finished run must have
the bits and the rows of an uninterrupted one. Sessions are forks of one process
that has imported everything and started nothing; a session that ended without a kill is
followed by the next in the same process.
"""

# ruff: noqa: E402 the flags come before jax
import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count=8"
if __name__ == "__main__":  # and not where doctests are collected
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import jax
import mesh_toy
import orbax.checkpoint
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtljax import training
from mtljax.training import _run, checkpoint, writers

NUM_STEPS = 14
KINDS = ("resident", "stream", "mesh")
ENDS = {"kill": 3, "term": 6, "int": 6, "int int": 2, "term kill": 2}  # how often
MOMENTS = ("time", "file", "save", "delete", "row", "torn row", "resume", "last")
FILE_CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")
replace = os.replace  # without a hook
NUMBERS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


class Interruption:
    """Sends signals to this process at the ``count``-th event of a kind."""

    def __init__(self, end, moment, rng):
        self.end, self.moment = end, moment
        self.count = {"time": 0, "file": rng.randrange(60)}.get(
            moment, rng.randrange(4)
        )
        self.delay, self.pause = rng.uniform(0, 1.2), rng.uniform(0, 0.03)
        self.sent = False
        if moment == "time":
            timer = threading.Timer(self.delay, self.send)
            timer.daemon = True
            timer.start()

    def happens(self, moment):
        """Whether it is time, which it is once."""
        if self.sent or moment != self.moment:
            return False
        self.count -= 1
        return self.count < 0

    def send(self):
        if self.sent:
            return
        self.sent = True
        for name in self.end.split():
            os.kill(os.getpid(), NUMBERS[name])
            time.sleep(self.pause)


class Hooks:
    """Calls the current interruption at the events of a run."""

    now: Interruption | None = None

    def at(self, moment):
        if self.now is not None and self.now.happens(moment):
            self.now.send()

    def before_and_after(self, moment, function):
        def wrapped(*args, **kwargs):
            self.at(moment)
            result = function(*args, **kwargs)
            self.at(moment)
            return result

        return wrapped

    def install(self):
        for name in FILE_CALLS:
            setattr(os, name, self.before_and_after("file", getattr(os, name)))
        for owner, name, moment in (
            (checkpoint.Checkpointer, "save", "save"),
            (checkpoint.Checkpointer, "wait", "save"),
            (shutil, "rmtree", "delete"),
            (writers.JsonlWriter, "flush", "row"),
            (checkpoint.Checkpointer, "_read_state", "resume"),
            (writers, "sealed_rows", "resume"),
            (writers, "atomic_write", "resume"),
            (_run.Run, "_final_rows", "last"),
            (_run.Run, "result", "last"),
        ):
            function = self.before_and_after(moment, getattr(owner, name))
            setattr(owner, name, function)
        flush = writers.JsonlWriter.flush

        def torn(writer, **options):
            line = b"".join(writer._pending)
            if line and self.now is not None and self.now.happens("torn row"):
                os.write(writer._file.fileno(), line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            flush(writer, **options)

        writers.JsonlWriter.flush = torn


def session(kind, folder, init):
    """One start of a run, or a resume of it."""
    settings = {"eval_every": 4, "checkpoint_every": 3, "resume": "auto"}
    settings |= {"run_dir": folder, "log_every": 2, "state": init}
    if kind == "mesh":
        mesh = mesh_toy.mesh("Auto")
        settings["state"] = mesh_toy.cut(init, mesh, P("data", None))
        settings["batch_sharding"] = NamedSharding(mesh, P("data"))
    if kind == "stream":
        stream = {"data": mesh_toy.Stream(), "batch_size": None, "order_key": None}
        settings |= stream
    settings |= {"eval_fn": evaluate, "select": "loss", "step": STEP}
    return mesh_toy.run(NUM_STEPS, **settings)


STEP = mesh_toy.make_step()


@jax.jit
def evaluate(state):
    losses = mesh_toy.task_losses(state["params"], mesh_toy.make_data(24))
    return {"losses": losses, "loss": losses.mean()}


def write(path, value):
    """Writes JSON so that a kill leaves the old or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value))
    replace(new, path)


def sessions(kind, numbers, root, seed):
    """Sessions of the runs ``numbers``, until a kill, or until all are done."""
    jax.config.update("jax_compilation_cache_dir", str(root / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    rng, hooks = random.Random(seed), Hooks()
    hooks.install()
    init = mesh_toy.init(training.split_run_key(jax.random.key(0))[0])
    for number in numbers:
        folder = root / str(number)
        if (folder / "done").exists():
            continue
        write(root / "current", number)
        while True:
            plan = json.loads((folder / "plan").read_text())
            came = sum(sent for *_, sent in plan)
            hooks.now = None
            if number >= 0 and came < 3 + number % 2 and len(plan) < 20:
                moment = rng.choice(MOMENTS)
                ends = rng.choices(list(ENDS), list(ENDS.values()))
                end = "kill" if moment == "torn row" else ends[0]
                hooks.now = Interruption(end, moment, rng)
                plan.append([end, moment, False])
                write(folder / "plan", plan)
            result = session(kind, folder / "run", init)
            if hooks.now is None:
                digest = training.tree_digest(result.state)
                (folder / "done").write_text(digest)
                break
            plan[-1][2] = hooks.now.sent or result.interrupted
            hooks.now.sent = True  # too late
            write(folder / "plan", plan)


def fork(function, *args):
    """Runs a function in a child; its status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            function(*args)
            os._exit(0)
        except KeyboardInterrupt:  # a second SIGINT
            os._exit(130)
        except BaseException as error:
            traceback.print_exception(error)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_sessions(kind, numbers, root):
    """Forks until all runs are done; what went wrong."""
    for number in numbers:
        (root / str(number)).mkdir()
        write(root / str(number) / "plan", [])
    for start in range(10 * len(numbers)):
        status = fork(sessions, kind, numbers, root, f"{numbers} {start}")
        if status == 0:
            return []
        file = root / (root / "current").read_text() / "plan"  # of the run it was in
        plan = json.loads(file.read_text())
        if status not in (130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return [f"status {status} after {plan[-1:]} in run {file.parent.name}"]
        plan[-1][2] = True
        write(file, plan)
    return ["not finished"]


def differences(folder, digest, rows):
    """What is wrong with a finished run."""
    if not (folder / "done").exists():
        return ["not finished"]
    wrong = []
    if (folder / "done").read_text() != digest:
        wrong.append("other bits")
    found = toy.comparable(folder / "run")
    if found != rows:
        name = lambda row: (row["step"], row["kind"])
        wrong.append(
            f"other rows: {[name(r) for r in found[1]]} instead of "
            f"{[name(r) for r in rows[1]]}"
        )
    left = [p.name for p in (folder / "run" / "checkpoints").iterdir()]
    left = [name for name in left if not name.isdecimal()]
    if left or (folder / "run" / "metrics.jsonl.new").exists():
        wrong.append(f"left behind: {left}")
    return wrong


def main(runs, seed=0, feeds=KINDS):
    """Prints counts; returns the number of interruptions and of wrong runs."""
    root = Path(tempfile.mkdtemp())
    counts = {name: collections.Counter() for name in ("end", "moment", "feed")}
    bad = done = 0
    for i, kind in enumerate(KINDS):
        if kind not in feeds:
            continue
        whole = -1 - i
        assert all_sessions(kind, [whole], root) == []
        digest = (root / str(whole) / "done").read_text()
        rows = toy.comparable(root / str(whole) / "run")
        numbers = [seed + number for number in range(i, runs, len(KINDS))]
        for text in all_sessions(kind, numbers, root):
            print(text, flush=True)
        done += len(numbers)
        for number in numbers:
            wrong = differences(root / str(number), digest, rows)
            bad += bool(wrong)
            for text in wrong:
                print(f"run {number} ({kind}): {text}", flush=True)
            for end, moment, came in json.loads(
                (root / str(number) / "plan").read_text()
            ):
                if came:
                    counts["end"][end] += 1
                    counts["moment"][moment] += 1
                    counts["feed"][kind] += 1
        print(f"{kind}: {len(numbers)} runs", flush=True)
    total = sum(counts["feed"].values())
    print(f"{done} runs, {total} interruptions, {bad} runs with another result")
    for name, found in counts.items():
        print(f"by {name}: {dict(sorted(found.items()))}")
    shutil.rmtree(root)
    return total, bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--feeds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    assert orbax.checkpoint
    sys.exit(main(args.runs, args.seed, args.feeds)[1] > 0)
