"""Branches in one program, compared with sequential runs and devices.

``python -m benchmarks.forkmerge`` (about a minute on two CPU cores) trains the branches
of :mod:`mtljax.forkmerge` on synthetic data in several ways with equal results. It
writes ``benchmarks/results/forkmerge.json``:

- On one device with four branches: four separately compiled trainings in sequence,
  ``vmap`` and ``map``. The network is large or small, because the overhead of a step is
  what can be saved.
- In a process with as many virtual CPU devices as branches: ``vmap`` on one device and
  ``shard`` on all. Virtual devices share the existing cores, so the speedup cannot
  exceed the number of cores.

The ways are interleaved in each round, and ratios are computed within a round. Other
load on the machine therefore affects both sides. The results also contain the processor
time of all threads, which remains comparable on a busy machine.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtljax import forkmerge, training

OUT = pathlib.Path(__file__).parent / "results" / "forkmerge.json"
ROOT = pathlib.Path(__file__).parents[1]
TASKS, CLASSES, INPUTS = 3, 10, 256
SIZES = {"small": (64, 16, 100), "large": (256, 128, 10)}  # width, batch, steps


def make_problem(width: int, batch: int, steps: int):
    """Builds a train state, its step, and batches for one round."""
    keys = jax.random.split(jax.random.key(0), 5)
    scale = lambda n: 1 / np.sqrt(n)
    params = {
        "in": scale(INPUTS) * jax.random.normal(keys[0], (INPUTS, width)),
        "mid": scale(width) * jax.random.normal(keys[1], (width, width)),
        "heads": scale(width) * jax.random.normal(keys[2], (TASKS, width, CLASSES)),
    }
    optimizer = optax.adam(1e-3)

    def step(state, weights, data):
        def objective(params):
            hidden = jax.nn.relu(data["x"] @ params["in"])
            hidden = jax.nn.relu(hidden @ params["mid"])
            logits = jnp.einsum("bw,twc->tbc", hidden, params["heads"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, data["y"])
            return forkmerge.weighted_sum(losses.mean(1), weights)

        params, opt_state = state
        loss, grad = jax.value_and_grad(objective)(params)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    batches = {
        "x": jax.random.normal(keys[3], (steps, batch, INPUTS)),
        "y": jax.random.randint(keys[4], (steps, TASKS, batch), 0, CLASSES),
    }
    return (params, optimizer.init(params)), step, batches


def weights_of(count: int):
    """Returns a branch for the target and branches of growing auxiliary weight."""
    rows = [[1.0, b / count, b / count] for b in range(count)]
    return forkmerge.custom(rows)


def make_ways(names: Sequence[Any], count: int, size: str) -> dict[str, Any]:
    """Builds a function for each way that runs one round and waits for it."""
    state, step, batches = make_problem(*SIZES[size])
    nu = weights_of(count)
    ways = {}
    for name in names:
        if name == "sequential":

            @jax.jit
            def alone(state, row):
                one = forkmerge.fork(state, 1)
                return forkmerge.train_branches(step, one, row[None], batches)

            ways[name] = lambda alone=alone: [
                jax.block_until_ready(alone(state, row)) for row in nu
            ]
            continue
        mesh = forkmerge.branch_mesh(count) if name == "shard" else None
        train = functools.partial(
            forkmerge.train_branches,
            step,
            branch_weights=nu,
            batches=batches,
            strategy=name,
            mesh=mesh,
        )
        run, branches = jax.jit(train), forkmerge.fork(state, count, mesh=mesh)
        ways[name] = lambda run=run, branches=branches: jax.block_until_ready(
            run(branches)
        )
    return ways


def measure(
    names: Sequence[Any], count: int, size: str, seconds: float
) -> dict[str, Any]:
    """Times all ways, interleaved. Returns times and ratios to the first way."""
    ways = make_ways(names, count, size)
    compile_s, finals = {}, {}
    for name, way in ways.items():
        start = time.perf_counter()
        finals[name] = way()
        compile_s[name] = time.perf_counter() - start
    times, spent = {name: [] for name in names}, {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 3:
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            way()
            times[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - busy)
    steps = SIZES[size][2]
    first = np.array(times[names[0]])
    cpu_first = np.median(spent[names[0]])
    found = {}
    for name in names:
        ratio = np.array(times[name]) / first
        found[name] = {
            "cpu_ms_per_step_of_all": 1e3 * float(np.median(spent[name])) / steps,
            "cpu_ratio": float(np.median(spent[name]) / cpu_first),
            "ms_per_step_of_all": 1e3 * float(np.median(times[name])) / steps,
            "ms_min": 1e3 * float(np.min(times[name])) / steps,
            "ratio": float(np.median(ratio)),
            "ratio_low": float(np.quantile(ratio, 0.1)),
            "ratio_high": float(np.quantile(ratio, 0.9)),
            "ratio_of_minima": float(np.min(times[name]) / first.min()),
            "first_call_s": compile_s[name],
        }
    record = {"branches": count, "size": size, "rounds": len(first), "ways": found}
    if "sequential" in finals and "vmap" in finals:
        record["largest_difference"] = difference(finals["sequential"], finals["vmap"])
    return record


def difference(sequential: Any, vmapped: Any) -> float:
    """Returns the largest difference of the parameters, relative to the largest."""
    worst = 0.0
    for b, (state, _) in enumerate(sequential):
        pairs = zip(
            jax.tree.leaves(state[0]), jax.tree.leaves(vmapped[0][0]), strict=True
        )
        for one, many in pairs:
            gap = np.abs(np.asarray(one[0]) - np.asarray(many[b])).max()
            worst = max(worst, float(gap / np.abs(one).max()))
    return worst


def in_process(count: int, size: str, seconds: float) -> dict[str, Any]:
    """Calls :func:`measure` for vmap and shard in a process with ``count`` devices."""
    flags = f"--xla_force_host_platform_device_count={count}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    arguments = ["--worker", str(count), size, str(seconds)]
    out = subprocess.run(
        [sys.executable, "-m", "benchmarks.forkmerge", *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


def show(record: dict[str, Any]) -> None:
    """Prints one line per way."""
    for name, row in record["ways"].items():
        print(
            f"B={record['branches']} {record['size']:5s} {name:10s} "
            f"{row['ms_per_step_of_all']:8.3f} ms a step of all branches  "
            f"x{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]  "
            f"of minima x{row['ratio_of_minima']:.2f}  "
            f"of processor time x{row['cpu_ratio']:.2f}"
        )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="a comparison")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        count, size, seconds = options.worker
        print(json.dumps(measure(["vmap", "shard"], int(count), size, float(seconds))))
        return
    records = []
    for size in SIZES:
        names = ["sequential", "vmap", "map"]
        records.append(measure(names, 4, size, options.seconds))
        show(records[-1])
    for count in (2, 4):
        for size in SIZES:
            records.append(in_process(count, size, options.seconds))
            show(records[-1])
    result = {
        "what": "steps of all branches; ratios to the first way of each comparison",
        "sizes": {
            name: dict(zip(("width", "batch", "steps_a_round"), size, strict=True))
            for name, size in SIZES.items()
        },
        "comparisons": records,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        **training.environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


def cpu_model() -> str:
    """Returns the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
