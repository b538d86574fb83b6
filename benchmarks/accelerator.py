"""Checks and times the library on an accelerator, in up to eight minutes.

``python -m benchmarks.accelerator`` compares all engines and methods on the device with
float64 on the CPU. It times training steps and TorchJD's steps on the same device, and
measures memory and compile times. It rewrites
``benchmarks/results/accelerator.json`` after each row and runs the most valuable parts
first, so that an interrupted run is useful. ``benchmarks/README.md`` describes the
command, the fields of the file and the decisions that depend on it.

This process imports neither jax nor torch. The parts run one after the other in
separate processes, so that the two libraries never share the device. If a process
fails, crashes or exceeds its time limit, its row contains the error. ``--rehearse``
runs the whole program on the CPU with tiny sizes and writes
``accelerator-rehearsal.json``.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.accelerator_report import printed, summary_of

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 460.0  # seconds, the sum of the times of the plan
REHEARSAL = 2000.0  # a small or busy CPU is slow
WARMED_S = 35.0  # the time limit of a cell whose programs were compiled in advance
START_S = 60.0  # a process must begin its next job within this time
PATIENCE = 5  # factor of the time limits in a rehearsal
CHECKED = ("smoke", "correctness")
NAMES = ("part", "check", "model", "tasks", "size", "method", "engine", "strategy")
NAMES += ("backward", "precision", "side")
FIELDS = (*NAMES, "ms", "low_ms", "high_ms", "samples", "compile_s", "peak_mb")
FIELDS += ("temp_mb", "flops", "loss", "update_norm", "rel_error", "tolerance")
FIELDS += ("converged", "auto", "regret", "error")
Row = dict[str, Any]
# What the rows of a kind of job are called, if not by the name of the kind.
CHECKS = {
    "engines": ("gradient",),
    "methods": ("update", "update, mask"),
    "solvers": ("solver", "solver, singular"),
    "steps": (None,),
}


class Job(NamedTuple):
    """One piece of work of a process, with its own time limit."""

    kind: str  # name of a function in the module of the side
    limit_s: float
    options: Row

    @property
    def row(self) -> Row:
        """The row that reports a failure of the whole job."""
        known = {k: v for k, v in self.options.items() if k in NAMES}
        return {"check": self.kind, **known}

    def matches(self, row: Row) -> bool:
        """Whether a row of the same part can be from this job."""
        known = {k: v for k, v in self.options.items() if k in NAMES}
        kind = row["check"] in (self.kind, *CHECKS.get(self.kind, ()))
        return kind and all(row[k] in (v, None) for k, v in known.items())


class Part(NamedTuple):
    """Jobs of one side, and the second of a full run at which they must end."""

    name: str
    side: str
    end_s: float
    jobs: list[Job]
    fresh: bool = False  # whether each job has its own process


MODULES = {
    "mtljax": "benchmarks.accelerator_ours",
    "TorchJD": "benchmarks.accelerator_peers",
}


# --- the plan -----------------------------------------------------------------------


def plan(rehearse: bool) -> list[Part]:
    """Returns all parts in order. A rehearsal has longer time limits."""
    parts = [*check_parts(rehearse), *time_parts(rehearse)]
    if not rehearse:
        return parts

    def patient(job):
        return job._replace(limit_s=PATIENCE * job.limit_s)

    return [part._replace(jobs=[patient(job) for job in part.jobs]) for part in parts]


def check_parts(rehearse: bool) -> list[Part]:
    """Returns the smoke test and all comparisons with float64."""
    models = ("mlp", "conv", "transformer", "embedding", "scan")
    few, several = 3, 3 if rehearse else 11

    def engines(tasks):
        return [Job("engines", 60, {"model": m, "tasks": tasks}) for m in models]

    def methods(tasks):
        shares = [{"share": [i, 4], "tasks": tasks} for i in range(4)]
        return [*(Job("methods", 60, share) for share in shares), solvers(tasks)]

    def solvers(tasks):
        return Job("solvers", 60, {"tasks": tasks})

    jobs = [*engines(few), Job("seeds", 40, {"tasks": few}), *methods(several)]
    if not rehearse:
        jobs += [*engines(several), *methods(few), solvers(40)]
    return [
        Part("smoke", "mtljax", 40, [Job("smoke", 60, {"tasks": 3})]),
        Part("correctness", "mtljax", 150, jobs),
    ]


def sizes(rehearse: bool) -> dict[str, list[tuple[str, Row, tuple[int, ...]]]]:
    """Returns the sizes of each timed model, most important first.

    A size is its name in the rows, the arguments of the model and the numbers of tasks.
    """
    if rehearse:
        small = {"sequences": 2, "length": 4, "layers": 1, "width": 16}
        return {
            "mlp": [("width 16, N=8", {"examples": 8, "width": 16}, (3,))],
            "transformer": [("1 layers of 16, 2x4 tokens", small, (3,))],
            "resnet18": [
                ("2 channels, 32x32, N=2", {"examples": 2, "channels": 2}, (2,))
            ],
        }
    layers = {"layers": 4, "width": 256}
    few = {"sequences": 4, "length": 64, **layers}
    many = {"sequences": 32, "length": 256, **layers}
    return {
        "mlp": [("width 512, N=128", {"examples": 128, "width": 512}, (3, 11, 40))],
        "transformer": [
            ("4 layers of 256, 4x64 tokens", few, (3, 11, 40)),
            ("4 layers of 256, 32x256 tokens", many, (3, 11, 40)),
        ],
        "resnet18": [
            ("32x32, N=128", {"examples": 128}, (3, 11)),
            ("32x32, N=32", {"examples": 32}, (3, 11)),
            ("32x32, N=128", {"examples": 128}, (40,)),
        ],
    }


ENDS = {"mlp": (220, 250), "transformer": (300, 330), "resnet18": (395, 425)}


def time_parts(rehearse: bool) -> list[Part]:
    """Returns the steps of both sides, then some peak memory measurements."""
    parts, peaks = [], []
    for model, cells in sizes(rehearse).items():
        # TF32 is the default on the device; the exact products come second.
        precisions = ("tf32", "highest") if model == "mlp" else ("tf32",)
        cases = [
            {
                "model": model,
                "size": size,
                "options": options,
                "tasks": t,
                "precision": precision,
            }
            for precision in precisions
            for size, options, tasks in cells
            for t in tasks
        ]
        seconds = 0.2 if rehearse else 3.0
        for side, end in zip(MODULES, ENDS[model], strict=True):
            jobs = [Job("steps", 60, {**case, "seconds": seconds}) for case in cases]
            parts.append(Part(model, side, end, jobs))
        engines = ("losses", "stacked", "gramian")
        at = [c for c in cases if c["tasks"] == 11 or rehearse][:1]
        peaks += [
            Job("peak", 30, {**case, "engine": e}) for case in at for e in engines
        ]
    return [*parts, Part("peaks", "mtljax", 452, peaks, fresh=True)]


def warm_part(parts: Iterable[Part], seconds: float) -> Part:
    """Returns the part that compiles the programs of the timed parts in advance.

    The first cells of all models come first.
    """
    queues = [p.jobs for p in parts if p.name in ENDS and p.side == "mtljax"]
    rounds = itertools.zip_longest(*queues)
    jobs = [job for each in rounds for job in each if job is not None]
    cells = [job.options for job in jobs]
    return Part("warm", "mtljax", seconds, [Job("warm", seconds, {"cells": cells})])


def quicker(part: Part) -> Part:
    """Returns the part with the time limits after the compilation in advance."""
    if part.name not in ENDS or part.side != "mtljax":
        return part
    jobs = [job._replace(limit_s=min(job.limit_s, WARMED_S)) for job in part.jobs]
    return part._replace(jobs=jobs)


def deadline(part: Part, budget: float, warm: float) -> float:
    """Returns the second at which a part must end.

    The timed parts share the time after the compilation in advance.
    """
    checks_end = 150.0
    if not warm or part.name in CHECKED:
        return part.end_s * budget / BUDGET
    share = (part.end_s - checks_end) / (BUDGET - checks_end)
    return warm + share * (budget - warm)


# --- the file -----------------------------------------------------------------------


class Results:
    """The rows in the order of their arrival. They are written after each row."""

    def __init__(self, path: pathlib.Path, about: Row):
        self.path, self.about = path, about
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.lock = threading.Lock()

    def resume(self, parts: Iterable[Part]) -> list[Part]:
        """Reads an earlier file. Returns the parts without the jobs that it contains.

        The rows that report a lack of time are removed, because their jobs run again.
        Jobs without any row run too: the earlier run was stopped before them.
        """
        if not self.path.exists():
            raise SystemExit(f"benchmarks.accelerator: no file to resume, {self.path}.")
        earlier = json.loads(self.path.read_text())
        self.about["earlier"] = [*earlier["about"].pop("earlier", []), earlier["about"]]
        # TorchJD's processes do not name the device.
        known = {"platform", "device"} & earlier["about"].keys()
        self.about |= {name: earlier["about"][name] for name in known}
        left = []
        for part in parts:
            rows = [row for row in earlier["rows"] if of_part(row, part)]
            late = [row for row in rows if unfinished(row)]
            jobs = [
                job
                for job in part.jobs
                if any(job.matches(row) for row in late)
                or not any(job.matches(row) for row in rows)
            ]
            left.append(part._replace(jobs=jobs))
            earlier["rows"] = [row for row in earlier["rows"] if row not in late]
        for row in earlier["rows"]:
            self.rows[tuple(str(row[name]) for name in NAMES)] = row
        return left

    def add(self, row: Row) -> None:
        """Adds a row, or merges it with an existing row of the same case."""
        full = {name: row.get(name) for name in FIELDS}
        unknown = set(row) - set(FIELDS)
        assert not unknown, f"unknown fields {sorted(unknown)}"
        for name, value in full.items():
            if isinstance(value, float) and not math.isfinite(value):
                full[name] = None
                full["error"] = full["error"] or f"{name} is not finite"
        key = tuple(str(full[name]) for name in NAMES)
        known = {k: v for k, v in full.items() if v is not None}
        with self.lock:
            earlier = self.rows.get(key, full)
            if earlier["compile_s"] is not None:
                known.pop("compile_s", None)  # the later one was read from the cache
            self.rows[key] = {**earlier, **known}
            self.write()

    def write(self, summary: Row | None = None) -> None:
        """Replaces the file atomically."""
        rows = list(self.rows.values())
        both = {"about": self.about, "summary": summary or {}, "rows": rows}
        text = json.dumps(both, indent=1, allow_nan=False, default=str) + "\n"
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self.path)


def of_part(row: Row, part: Part) -> bool:
    """Whether a row is from a job of the part."""
    return row["part"] == part.name and row["side"] == part.side


def unfinished(row: Row) -> bool:
    """Whether a row reports that its job had not enough time."""
    late = ("time limit", "not run")
    return any(words in (row["error"] or "") for words in late)


def command_output(*command: str) -> str | None:
    """Returns the output of a command, or None if it is missing or fails."""
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=20, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "optax", "jaxtyping", "numpy")
PACKAGES += ("torch", "torchjd")
SWITCHES = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")


def header(rehearse: bool, budget: float, warm: float) -> Row:
    """Returns the versions and settings on which the numbers depend."""
    query = "--query-gpu=name,driver_version,memory.total,power.limit"
    about: Row = {"rehearsal": rehearse, "budget_s": budget}
    about["started"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # A copy of the tree without its history is told the commit.
    told = os.environ.get("GIT_COMMIT")
    about["commit"] = told or command_output("git", "rev-parse", "HEAD")
    about["python"] = platform.python_version()
    about["warm_s"] = warm
    about["cores"] = len(os.sched_getaffinity(0))
    about["nvidia_smi"] = command_output("nvidia-smi", query, "--format=csv,noheader")
    for package in PACKAGES:
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = None
    return about | {name: os.environ.get(name) for name in SWITCHES}


# --- processes ----------------------------------------------------------------------


def environment(rehearse: bool, cache: str) -> dict[str, str]:
    """Returns the environment variables of the processes."""
    settings = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # The peak measurements reuse the programs that the other processes compiled.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and "cpu" not in platforms.split(","):
        settings["JAX_PLATFORMS"] = f"{platforms},cpu"  # for the reference values
    if rehearse:
        settings["JAX_PLATFORMS"] = "cpu"
        settings["CUDA_VISIBLE_DEVICES"] = ""
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # compiles faster
    return {**os.environ, **settings}


class Process:
    """A process that works on jobs and reports rows, one line each."""

    def __init__(self, part: Part, jobs: list[Job], end: float, env: dict[str, str]):
        ask = {"end": end, "jobs": [job._asdict() for job in jobs]}
        command = [sys.executable, "-m", MODULES[part.side], json.dumps(ask)]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=env,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                if line.startswith("@"):
                    self.lines.put(line[1:])
        self.lines.put(None)

    def message(self, until: float) -> Row | None:
        """Returns the next message, or None at the end. Raises TimeoutError."""
        try:
            line = self.lines.get(timeout=max(until - time.time(), 0.01))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def stop(self) -> str:
        """Ends the process. Returns the last line of its errors."""
        self.process.kill()
        code = self.process.wait()
        self.reader.join()
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        self.errors.close()
        return lines[-1][:300] if lines else f"exit code {code}"


def run_part(part: Part, end: float, env: dict[str, str], results: Results) -> None:
    """Runs the jobs of a part. A failed job does not stop the others."""
    pending = list(part.jobs)
    while pending and time.time() < end:
        batch = pending[:1] if part.fresh else pending
        finished = run_process(part, batch, end, env, results)
        pending = pending[finished:]
    for job in pending:
        report(results, part, job.row | {"error": "not run: no time was left"})


def run_process(
    part: Part,
    jobs: list[Job],
    end: float,
    env: dict[str, str],
    results: Results,
    *,
    live: list[Process] | None = None,
) -> int:
    """Runs jobs in one process until one fails. Returns the number that ended.

    The process is added to ``live``.
    """
    process = Process(part, jobs, end, env)
    if live is not None:
        live.append(process)
    current, until = 0, min(end, time.time() + START_S)
    reason = None
    try:
        while True:
            message = process.message(until)
            if message is None:
                break
            if "about" in message:
                results.about |= message["about"]
                check_platform(results.about)
            elif "begin" in message:
                current = message["begin"]
                until = min(end, time.time() + jobs[current].limit_s)
            elif "end" in message:
                current = message["end"] + 1
                until = min(end, time.time() + START_S)
            else:
                report(results, part, message["row"])
    except TimeoutError:
        reason = "time limit"
    finally:
        last = process.stop()
    if current == len(jobs):
        return current
    report(results, part, jobs[current].row | {"error": reason or last})
    return current + 1


@contextlib.contextmanager
def compiling(part: Part, begin: float, env: dict[str, str], results: Results):
    """Compiles programs in the background. Yields a function that waits for the end."""
    live: list[Process] = []
    end = begin + part.end_s
    (job,) = part.jobs
    if not part.end_s or not job.options["cells"]:
        yield lambda: None
        return
    run = functools.partial(run_process, part, [job], end, env, results, live=live)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield thread.join
    finally:
        for process in live:
            process.process.kill()
        thread.join()


def check_platform(about: Row) -> None:
    """Raises before a CPU row can replace the results of a device."""
    if about["platform"] == "cpu" and not about["rehearsal"]:
        raise SystemExit(
            "benchmarks.accelerator: jax finds no accelerator. Use --rehearse to run "
            "the program on the CPU."
        )
    if any(run["device"] != about["device"] for run in about.get("earlier", ())):
        raise SystemExit(
            f"benchmarks.accelerator: the file to resume is not from {about['device']}."
        )


def report(results: Results, part: Part, row: Row) -> None:
    """Adds a row and prints it."""
    row = {"part": part.name, "side": part.side, **row}
    results.add(row)
    print(f"{time.strftime('%H:%M:%S')} {printed(row)}", flush=True)


def failures(rows: Iterable[Row]) -> list[Row]:
    """Returns the rows of the checks that did not pass."""
    return [
        row
        for row in rows
        if row["part"] in CHECKED
        and (
            row["error"]
            or row["converged"] is False
            or (
                row["rel_error"] is not None
                and not row["rel_error"] <= row["tolerance"]
            )
        )
    ]


# --- the command --------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ("smoke", "correctness", *ENDS, "peaks")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="a folder")
    parser.add_argument("--budget", type=float, help="total time in seconds (460)")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--side", nargs="+", choices=list(MODULES), default=[*MODULES])
    parser.add_argument(
        "--resume", action="store_true", help="run only what lacked time in the file"
    )
    parser.add_argument("--cache", help="a folder that keeps compiled programs")
    parser.add_argument(
        "--warm",
        type=float,
        default=0.0,
        help="compile the programs of the timed parts in a separate process until this "
        "second, while the checks run",
    )
    asked = parser.parse_args(arguments)
    if asked.budget is None:
        asked.budget = REHEARSAL if asked.rehearse else BUDGET
    return asked


def main() -> int:
    asked = parse()
    begin = time.time()
    # The worker process must end with this process, because it holds the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked.out.mkdir(parents=True, exist_ok=True)
    name = "accelerator-rehearsal" if asked.rehearse else "accelerator"
    about = header(asked.rehearse, asked.budget, asked.warm)
    results = Results(asked.out / f"{name}.json", about)
    with tempfile.TemporaryDirectory() as folder:
        env = environment(asked.rehearse, asked.cache or folder)
        parts = [
            part
            for part in plan(asked.rehearse)
            if part.name in asked.only and part.side in asked.side
        ]
        parts = results.resume(parts) if asked.resume else parts
        if asked.warm:
            parts = [quicker(part) for part in parts]
        with compiling(warm_part(parts, asked.warm), begin, env, results) as wait:
            for part in parts:
                if part.name not in CHECKED:
                    wait()
                end = begin + deadline(part, asked.budget, asked.warm)
                run_part(part, end, env, results)
    results.about["seconds"] = round(time.time() - begin, 1)
    rows = list(results.rows.values())
    summary = summary_of(rows, failures(rows))
    results.write(summary)
    print(json.dumps(summary["checks"], indent=1))
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
