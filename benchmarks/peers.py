"""A whole training step compared with TorchJD's: time, memory, seeds.

``python -m benchmarks.peers`` (about fifteen minutes on two idle CPU cores, with the
extra ``bench``) builds each model twice with the same weights and data. It checks that
losses and updates of the first step agree. It then runs the steps of both libraries
alternately in one process, so that drift affects both equally:

- ``mlp``, ``lenet``, ``transformer``, ``resnet18``: Forward pass, balancing and SGD for
  several T and six methods. ``scaling`` is the MLP at other widths.
- ``memory``: The peak of a step, each side in a separate process. For both sides it is
  the growth of the resident set. On a GPU it is the memory of the allocator, for
  TorchJD only. For ours the result also contains the memory that XLA plans.
- ``seeds``: Ten runs at once, ours by ``vmap``, TorchJD's one after the other.
- ``compile``: Compile time of our step in seconds.

TorchJD runs in the fastest of the ways in its documentation (``peer_steps.Theirs``),
selected for each model and T. ``--only`` runs some parts, and ``--full`` all sizes.
Results are merged into the file of the device, so that parts can be run separately.
``--report`` renders the file, and ``--readme`` prints the speed table. LibMTL is not
compared, because it could not be installed from the package index.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# The two libraries share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from benchmarks import peer_report as report
from benchmarks.engine import Sample, busy_seconds, quiet
from benchmarks.peer_models import MODELS, Problem
from benchmarks.peer_steps import (
    BASELINE,
    METHODS,
    Ours,
    Theirs,
    differences,
    ways_of,
)

OUT = pathlib.Path(__file__).parent / "results"
SEEDS = 10
LONG = 0.1  # seconds
TYPICAL = "UPGrad"  # represents all methods in some parts
Row = dict[str, Any]


class Cell(NamedTuple):
    """A model at one T, and the methods to compare."""

    model: str
    tasks: int
    options: tuple[tuple[str, int], ...] = ()
    methods: tuple[str, ...] = METHODS

    def make(self) -> Problem:
        return MODELS[self.model](self.tasks, **dict(self.options))


def step_cells(full: bool) -> dict[str, list[Cell]]:
    """Returns the cells of each part."""
    everything = (2, 3, 11, 40)
    chosen = {
        "mlp": everything,
        "lenet": everything if full else (2, 3, 11),
        "transformer": everything if full else (3,),
        "resnet18": everything if full else (2,),
    }
    parts = {
        model: [Cell(model, tasks) for tasks in counts]
        for model, counts in chosen.items()
    }
    widths = (128, 256, 1024, 2048) if full else (128, 256, 1024)
    few = (BASELINE, TYPICAL)
    parts["scaling"] = [Cell("mlp", 11, (("width", width),), few) for width in widths]
    return parts


def memory_cells(full: bool) -> list[Cell]:
    """Returns the largest T of each model, and all T of the MLP."""
    parts = step_cells(full)
    cells = [cell for cell in parts["mlp"] if cell.tasks > 2] + parts["scaling"]
    for model in ("lenet", "transformer", "resnet18"):
        cells += parts[model] if full else parts[model][-1:]
    return cells


# --- time ---------------------------------------------------------------------------


def sample(call: Callable[[], Any], least: float) -> Sample:
    """Runs after one run during which the threads of the other library become idle.

    A long call is a sample by itself, because this does not matter then.
    """
    found = runs_of(call, 0)
    return found if found.seconds > LONG else runs_of(call, least)


def runs_of(call: Callable[[], Any], least: float) -> Sample:
    """Runs once, and then for up to ``least`` seconds."""
    runs: list[float] = []
    busy, own = busy_seconds(), time.process_time()
    while not runs or sum(runs) < least:
        start = time.perf_counter()
        call()
        runs.append(time.perf_counter() - start)
    others = busy_seconds() - busy - (time.process_time() - own)
    return Sample(statistics.median(runs), max(others, 0) / sum(runs))


def take_turns(
    calls: dict[Any, Callable[[], Any]], patience: float, least: float = 0.03
) -> dict[Any, Row]:
    """Returns median and quartiles of each call, in about ``patience`` seconds.

    Also returns the times of each round. Ratios are computed within a round, because
    the speed of a machine may change between rounds.
    """
    samples: dict[Any, list[Sample]] = {key: [] for key in calls}
    end = time.perf_counter() + patience
    for turn in itertools.count(1):
        for key, call in calls.items():
            samples[key].append(sample(call, least))
        late = time.perf_counter() > end
        calm = min(sum(s.others < 0.1 for s in each) for each in samples.values())
        if (late and turn >= 3) or calm >= 12:
            break
    return {
        key: summary(quiet(each)) | {"turns_ms": [1e3 * s.seconds for s in each]}
        for key, each in samples.items()
    }


def summary(samples: list[Sample]) -> Row:
    seconds = [one.seconds for one in samples]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {
        "ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "samples": len(samples),
        "others": round(statistics.mean(s.others for s in samples), 3),
    }


def fastest_way(problem: Problem, method: str, device: str, patience: float) -> Row:
    """Finds TorchJD's fastest way for this model. Returns it and all times."""
    calls, failed = {}, {}
    for way in ways_of(method):
        theirs = Theirs(problem, method, way, device)
        try:
            theirs()
        except Exception as error:
            failed[way] = type(error).__name__
            continue
        calls[way] = theirs
    times: dict[str, Row] = {way: {} for way in calls}
    if len(calls) > 1:
        times = take_turns(calls, patience)
    ways = {way: row.get("ms") for way, row in times.items()} | failed
    best = min(times, key=lambda way: times[way].get("ms", 0))
    return {"way": best, "ways_ms": ways}


def time_steps(cell: Cell, device: str, patience: float) -> list[Row]:
    """Returns the rows of one cell, for each method and both libraries."""
    problem = cell.make()
    # The work before the solver is the same for all methods except Nash-MTL.
    typical = fastest_way(problem, TYPICAL, device, patience / 4)
    calls: dict[Any, Callable[[], Any]] = {}
    facts: dict[Any, Row] = {}
    for method in cell.methods:
        ours = Ours(problem, method)
        way = typical
        if method == BASELINE:
            way = {"way": "backward"}
        elif way["way"] not in ways_of(method):
            way = fastest_way(problem, method, device, patience / 8)
        theirs = Theirs(problem, method, way["way"], device)
        calls[method, "mtljax"], facts[method, "mtljax"] = ours, {}
        try:
            losses, update = differences(ours, theirs)
        except Exception as error:  # a solver may fail
            failed = {"error": type(error).__name__, **way}
            facts[method, "TorchJD"] = failed
            continue
        report.check_agreement(cell.model, cell.tasks, method, losses, update)
        calls[method, "TorchJD"] = theirs
        facts[method, "TorchJD"] = {"losses_apart": losses, "update_apart": update}
        facts[method, "TorchJD"] |= way
    times = take_turns(calls, patience)
    return [
        {
            "part": "steps",
            "model": cell.model,
            "tasks": cell.tasks,
            "size": problem.size,
            "method": key[0],
            "side": key[1],
            **times.get(key, {}),
            **fact,
        }
        for key, fact in facts.items()
    ]


# --- the other parts ----------------------------------------------------------------


def time_seeds(device: str, patience: float) -> Iterator[list[Row]]:
    """Times ten seeds, by vmap and one after the other on both sides."""
    for model, tasks, options in (
        ("mlp", 3, {"examples": 32, "width": 128}),
        ("mlp", 3, {}),
        ("lenet", 3, {"examples": 32}),
    ):
        problem = MODELS[model](tasks, **options)
        calls: dict[Any, Callable[[], Any]] = {}
        for method in (BASELINE, TYPICAL):
            single = Ours(problem, method)
            way = "backward"
            if method != BASELINE:
                way = fastest_way(problem, method, device, patience / 4)["way"]
            peers = [Theirs(problem, method, way, device) for _ in range(SEEDS)]
            calls[method, "mtljax, vmap"] = Ours(problem, method, SEEDS)
            calls[method, "mtljax, in turn"] = lambda s=single: [
                s() for _ in range(SEEDS)
            ]
            calls[method, "TorchJD, in turn"] = lambda p=peers: [one() for one in p]
        cell = {"part": "seeds", "model": model, "tasks": tasks, "size": problem.size}
        yield [
            {**cell, "method": method, "side": side, **row}
            for (method, side), row in take_turns(calls, patience).items()
        ]


def time_compilation(full: bool, tasks: list[int] | None) -> Iterator[list[Row]]:
    """Measures compile times without a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    cells = [Cell("mlp", 40)]
    few = (BASELINE, TYPICAL)
    cells += [Cell("mlp", tasks, (), few) for tasks in (3, 11)]
    cells += [Cell("lenet", 11, (), few), Cell("transformer", 3, (), few)]
    cells += [Cell("resnet18", 2, (), few)]
    if full:
        cells += [Cell(model, 40, (), few) for model in MODELS if model != "mlp"]
    for cell in cells:
        if tasks is not None and cell.tasks not in tasks:
            continue
        problem = cell.make()
        for method in cell.methods:
            jax.clear_caches()
            row = {"part": "compile", "model": cell.model, "tasks": cell.tasks}
            row |= {"size": problem.size, "method": method, "side": "mtljax"}
            yield [row | {"compile_s": Ours(problem, method).compile_s}]


def measure_memory(cell: Cell, device: str, rows: list[Row]) -> list[Row]:
    """Measures the peaks of both sides, each in a child process."""
    size = cell.make().size
    found = []
    for side in ("mtljax", "TorchJD"):
        ask = [cell.model, cell.tasks, dict(cell.options), side, device]
        command = [sys.executable, "-m", "benchmarks.peers", "--peak", json.dumps(ask)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the peak of {side} failed: {done.stderr[-400:]}")
        peaks = json.loads(done.stdout.splitlines()[-1])
        row = {"part": "memory", "model": cell.model, "tasks": cell.tasks}
        row |= {"size": size, "method": TYPICAL, "side": side}
        if side == "TorchJD":
            timed = report.pick(
                rows, part="steps", model=cell.model, tasks=cell.tasks, size=size
            )
            ways = {r["method"]: r.get("way") for r in timed if r["side"] == side}
            way = ways.get(TYPICAL) or "lean"
            row |= {"way": way, "peak_mb": peaks[way], "ways_mb": peaks}
        else:
            row |= peaks
        found.append(row)
    return found


def peak_of(ask: str) -> None:
    """Prints the peak of one side as JSON, in a child process."""
    model, tasks, options, side, device = json.loads(ask)
    problem = MODELS[model](tasks, **options)
    if side == "mtljax":
        ours = Ours(problem, TYPICAL)
        peaks: Any = {"planned_mb": ours.memory / 2**20}
        if device == "cpu":
            peaks["peak_mb"] = growth(ours)
    else:
        set_threads()
        peaks = {}
        for way in ways_of(TYPICAL):
            theirs = Theirs(problem, TYPICAL, way, device)
            try:
                peaks[way] = growth(theirs, device)
            except Exception as error:
                peaks[way] = type(error).__name__
    print(json.dumps(peaks))


def growth(step: Callable[[], Any], device: str = "cpu") -> float:
    """Returns the MiB of a step at its peak beyond the memory between steps."""
    step()
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # This resets the highest resident set of the process.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    return (resident("VmHWM") - before) / 2**10


def resident(name: str) -> int:
    """Returns an entry of the kernel's process status, in KiB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


# --- the command --------------------------------------------------------------------


def set_threads() -> int:
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    return cores


def about(device: str) -> Row:
    """Returns the environment of the measurement."""
    import torch

    if device == "gpu":
        name = torch.cuda.get_device_name()
    else:
        cpu = pathlib.Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
        name = models[0] if models else platform.machine()
    names = ("jax", "jaxlib", "torch", "torchjd")
    return {
        "device": name,
        "threads": set_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


KEY = ("part", "model", "tasks", "size", "method", "side")


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Replaces old rows by new rows of the same key."""
    rows = {tuple(row[k] for k in KEY): row for row in old}
    rows |= {tuple(row[k] for k in KEY): row for row in new}
    return list(rows.values())


def run(part: str, arguments: Any, rows: list[Row]) -> Iterator[list[Row]]:
    """Yields the rows of a part in several lists."""
    device, patience = arguments.device, arguments.patience
    torch_device = "cuda" if device == "gpu" else "cpu"
    if part == "seeds":
        yield from time_seeds(torch_device, patience)
    elif part == "compile":
        yield from time_compilation(arguments.full, arguments.tasks)
    else:
        memory = part == "memory"
        full = arguments.full
        cells = memory_cells(full) if memory else step_cells(full)[part]
        for cell in cells:
            if arguments.tasks is not None and cell.tasks not in arguments.tasks:
                continue
            if memory:
                yield measure_memory(cell, torch_device, rows)
            else:
                chosen = {BASELINE, *(arguments.methods or METHODS)}
                methods = tuple(m for m in cell.methods if m in chosen)
                only = cell._replace(methods=methods)
                yield time_steps(only, torch_device, patience)


PARTS = ("mlp", "lenet", "transformer", "resnet18", "scaling", "seeds", "compile")
PARTS += ("memory",)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", type=int, nargs="+", help="only these T")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--full", action="store_true", help="all models at all T")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--patience", type=float, default=12.0, help="seconds per cell")
    parser.add_argument("--out", type=pathlib.Path, help="the JSON file")
    parser.add_argument("--report", action="store_true", help="only render the file")
    parser.add_argument("--readme", action="store_true", help="print a README section")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out is None:
        suffix = "" if arguments.device == "cpu" else "_gpu"
        arguments.out = OUT / f"peers{suffix}.json"
    return arguments


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    if arguments.readme or arguments.report:
        if not arguments.out.exists():
            raise SystemExit(f"{arguments.out.name} does not exist. Run the benchmark.")
        found = json.loads(arguments.out.read_text())
        if arguments.readme:
            print(report.readme(found["rows"], found["about"]))
        else:
            report.write(arguments.out, found)
        return
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[arguments.device])
    if arguments.peak:
        peak_of(arguments.peak)
        return
    try:
        facts = about(arguments.device)
    except ImportError as error:
        raise SystemExit(
            f"benchmarks.peers requires {error.name}. Run: pip install '.[bench]'"
        ) from None
    rows: list[Row] = []
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())
        if found["about"] == facts:
            rows = found["rows"]
        else:
            print("results of another machine or other versions are replaced")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.only:
        start = time.perf_counter()
        for new in run(part, arguments, rows):
            rows = merged(rows, new)
            both = {"about": facts, "rows": rows}
            arguments.out.write_text(json.dumps(both, indent=1) + "\n")
            taken = time.perf_counter() - start
            one = new[0]
            print(f"{part}, {one['model']}, T={one['tasks']}: {taken:.0f} s")
            sys.stdout.flush()
    report.write(arguments.out, {"about": facts, "rows": rows})


if __name__ == "__main__":
    main()
