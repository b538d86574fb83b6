"""Step time of alternating steps against the number of tasks and groups, in one run.

``python -m benchmarks.alternating`` (about a minute on two idle CPU cores) trains an
MLP 256-512-512 with T stacked linear heads on batches of 128, with Adam. A row is G
groups (a state per slot), AdaTask (per-task states, one group) or one group per batch.
All rows of a T take turns; their times are divided by that of one joint step on the sum
of the losses with plain optax. Writes ``benchmarks/results/alternating.json``.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtljax import training
from mtljax.alternating import alternate

OUT = pathlib.Path(__file__).parent / "results" / "alternating.json"
WIDTHS = (256, 512, 512)
LABELS = {"trunk": "shared", "head": "own"}


def make_params(tasks: int) -> Any:
    """The network."""
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    pairs = itertools.pairwise(WIDTHS)
    trunk = [
        jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, shape in zip(keys[1:], pairs, strict=True)
    ]
    return {"trunk": trunk, "head": jax.random.normal(keys[0], (tasks, WIDTHS[-1]))}


def features(trunk: Any, x: jax.Array) -> jax.Array:
    """What the heads read."""
    for layer in trunk:
        x = jax.nn.relu(x @ layer)
    return x


def task_loss(params: Any, task: jax.Array, batch: Any) -> jax.Array:
    """Squared error of one task; ``params["head"]`` is its row."""
    x, targets = batch
    return jnp.square(
        features(params["trunk"], x) @ params["head"] - targets[task]
    ).mean()


def joint_step(optimizer: optax.GradientTransformation, batch: Any):
    """The baseline: one step on the sum of the losses."""

    def loss(params):
        x, targets = batch
        out = features(params["trunk"], x) @ params["head"].T
        return jnp.square(out - targets.T).mean(0).sum()

    def step(carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return optimizer.init, step


def entries(tasks: int) -> dict[str, dict[str, Any]]:
    """Rows of the table: options of alternate."""
    groups = [g for g in (1, 2, 4) if g < tasks]
    rows: dict[str, dict[str, Any]] = {f"G = {g}": {"groups": g} for g in groups}
    rows["G = T"] = {}
    rows["G = 2, per_task"] = {"groups": 2, "state": "per_task"}
    rows["AdaTask"] = {"groups": 1, "state": "per_task"}
    rows["G = T, 16-bit moments"] = {"moments": "bfloat16"}
    rows["G = T, per_batch"] = {"schedule": "per_batch"}
    return rows


def cpu_model() -> str:
    """The name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(tasks: int, rounds: int, steps: int, batch_size: int) -> dict[str, Any]:
    """All rows of a number of tasks."""
    optimizer = optax.adam(1e-3)
    key = jax.random.key(1)
    x = jax.random.normal(key, (batch_size, WIDTHS[0]))
    batch = x, jax.random.normal(key, (tasks, batch_size))
    programs, carries, rows = {}, {}, {}

    def add(name, init, step, **about):
        carry = init(make_params(tasks))
        start = time.perf_counter()
        programs[name] = jax.jit(step, donate_argnums=0).lower(carry).compile()
        seconds = time.perf_counter() - start
        # Some leaves of a fresh state share a buffer; donated buffers must not.
        carry = jax.tree.map(jnp.copy, carry)
        carries[name] = jax.block_until_ready(programs[name](carry))
        rows[name] = {"compile_s": seconds, **about}

    init, step = joint_step(optimizer, batch)
    add("joint", lambda p: (p, init(p)), step)
    for name, options in entries(tasks).items():
        alternating = alternate(
            optimizer, tasks, key=jax.random.key(0), labels=LABELS, **options
        )

        def one(carry, alternating=alternating):
            return alternating.step(task_loss, *carry, batch)[1:]

        init_one = alternating.init
        add(
            name,
            lambda p, init_one=init_one: (p, init_one(p)),
            one,
            **alternating.cost._asdict(),
        )
    times = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            for _ in range(steps):
                carries[name] = program(carries[name])
            jax.block_until_ready(carries[name])
            times[name].append(1e3 * (time.perf_counter() - start) / steps)
    for name, values in times.items():
        ratio = np.array(values) / np.array(times["joint"])
        rows[name] |= {
            "ms": float(np.median(values)),
            "ms_min": float(np.min(values)),
            "ratio": float(np.median(ratio)),
            "ratio_of_minima": float(np.min(values) / np.min(times["joint"])),
        }
        print(
            f"T = {tasks:3d}  {name:22s} {rows[name]['ms']:8.2f} ms "
            f" x{rows[name]['ratio']:6.2f}  of minima x"
            f"{rows[name]['ratio_of_minima']:6.2f}  compile "
            f"{rows[name]['compile_s']:.2f} s"
        )
    return rows


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    rows = {
        str(tasks): measure(tasks, options.rounds, options.steps, options.batch_size)
        for tasks in options.tasks
    }
    record = {
        "what": "one training step of an MLP 256-512-512 with T heads; ratios to a "
        "joint step on the sum",
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "batch_size": options.batch_size,
        "tasks": rows,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        **training.environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
