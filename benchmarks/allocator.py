"""Cost of small memory pages for a training step on a CPU.

``python -m benchmarks.allocator`` (three minutes on two idle CPU cores) times the steps
of ``benchmarks.peers`` in separate processes. The processes use either the default
settings of glibc's allocator or huge pages, in alternation. XLA:CPU allocates the
memory for intermediate results again in each step. The system zeroes each page at the
first write, in units of 4 KiB or 2 MiB. The command writes
``benchmarks/results/allocator.json`` and ``allocator.md``. It requires Linux with
transparent huge pages.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks.alternating import cpu_model
from benchmarks.peer_models import MODELS
from benchmarks.peer_steps import Ours

OUT = pathlib.Path(__file__).parent / "results" / "allocator.json"
HUGE = "glibc.malloc.hugetlb=1"
CELLS = [
    ("mlp", 11, "UPGrad"),
    ("mlp", 40, "UPGrad"),
    ("transformer", 3, "equal weights"),
    ("transformer", 3, "UPGrad"),
]


def median_of_step(model: str, tasks: int, method: str, seconds: float) -> list[float]:
    """Returns milliseconds of a step and megabytes of its intermediate results."""
    step = Ours(MODELS[model](tasks), method)
    runs: list[float] = []
    step()
    while len(runs) < 5 or sum(runs) < seconds:
        start = time.perf_counter()
        step()
        runs.append(time.perf_counter() - start)
    return [1e3 * statistics.median(runs), step.memory / 2**20]


def in_process(cell: tuple[str, int, str], tunables: str, seconds: float) -> list[Any]:
    """Calls :func:`median_of_step` in a process with an allocator setting."""
    model, tasks, method = cell
    command = [sys.executable, "-m", "benchmarks.allocator"]
    command += ["--of", model, str(tasks), method, "--seconds", str(seconds)]
    env = {**os.environ, "GLIBC_TUNABLES": tunables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the results as Markdown."""
    lines = [
        "# Steps with huge pages",
        "",
        "`python -m benchmarks.allocator`: medians over processes of the median of a "
        f"step in ms, with the default setting and with `GLIBC_TUNABLES={HUGE}`.",
        "",
        "| model | T | method | MB a step | default | huge pages | ratio |",
        "|:--|--:|:--|--:|--:|--:|--:|",
    ]
    for row in rows:
        before, after = (statistics.median(row[way]) for way in ("as_is", "huge"))
        lines.append(
            f"| {row['model']} | {row['tasks']} | {row['method']} | {row['mb']:.0f} | "
            f"{before:.3g} | {after:.3g} | {after / before:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes per setting")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed in each")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.of:
        model, tasks, method = arguments.of
        print(json.dumps(median_of_step(model, int(tasks), method, arguments.seconds)))
        return
    rows = []
    for cell in CELLS:
        print(*cell, flush=True)
        times: dict[str, list[float]] = {"as_is": [], "huge": []}
        memory = 0.0
        for _ in range(arguments.rounds):
            for way, tunables in (("as_is", ""), ("huge", HUGE)):
                found, memory = in_process(cell, tunables, arguments.seconds)
                times[way].append(found)
        names = ("model", "tasks", "method")
        rows.append(dict(zip(names, cell, strict=True)) | times | {"mb": memory})
    about = {"device": cpu_model(), "cores": os.cpu_count(), "jax": jax.__version__}
    about |= {
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
    }
    arguments.out.write_text(
        json.dumps({"about": about, "rows": rows}, indent=1) + "\n"
    )
    text = table(rows) + "\n\n" + ", ".join(f"{k} {v}" for k, v in about.items()) + "\n"
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
