"""Step time of alternating steps for numbers of tasks and groups.

``python -m benchmarks.alternating`` (about two minutes on two idle CPU cores) trains an
MLP 256-512-512 with T stacked linear heads on batches of 128, with Adam. A row has G
groups (one state per slot), AdaTask (states per task, one group) or one group per
batch. All rows of a T are interleaved. Their times are divided by that of one joint
step on the sum of the losses with plain optax. ``temporary_mb`` is the memory of a step
in addition to parameters and optimizer states, which are replaced in place. An
additional copy of the states would show there. Compile times are processor times
without a cache, the minimum of several. The command writes
``benchmarks/results/alternating.json``.
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
    """Returns the parameters of the network."""
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    pairs = itertools.pairwise(WIDTHS)
    trunk = [
        jax.random.normal(k, shape) / shape[0] ** 0.5
        for k, shape in zip(keys[1:], pairs, strict=True)
    ]
    return {"trunk": trunk, "head": jax.random.normal(keys[0], (tasks, WIDTHS[-1]))}


def features(trunk: Any, x: jax.Array) -> jax.Array:
    """Computes the input features of the heads."""
    for layer in trunk:
        x = jax.nn.relu(x @ layer)
    return x


def task_loss(params: Any, task: jax.Array, batch: Any) -> jax.Array:
    """Computes the squared error of one task, whose row is ``params["head"]``."""
    x, targets = batch
    return jnp.square(
        features(params["trunk"], x) @ params["head"] - targets[task]
    ).mean()


def joint_step(optimizer: optax.GradientTransformation, batch: Any):
    """Builds the baseline, one step on the sum of the losses."""

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
    """Returns the rows of the table as options of ``alternate``."""
    groups = [g for g in (1, 2, 4) if g < tasks]
    rows: dict[str, dict[str, Any]] = {f"G = {g}": {"groups": g} for g in groups}
    rows["G = T"] = {}
    rows["G = 2, per_task"] = {"groups": 2, "state": "per_task"}
    rows["AdaTask"] = {"groups": 1, "state": "per_task"}
    rows["G = T, 16-bit moments"] = {"moments": "bfloat16"}
    rows["G = T, per_batch"] = {"schedule": "per_batch"}
    return rows


def cpu_model() -> str:
    """Returns the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def make_step(tasks: int, batch: Any, options: dict[str, Any]):
    """Builds ``(init, step, cost)`` of a row."""
    alternating = alternate(
        optax.adam(1e-3), tasks, key=jax.random.key(0), labels=LABELS, **options
    )

    def init(params):
        return params, alternating.init(params)

    def step(carry):
        return alternating.step(task_loss, *carry, batch)[1:]

    return init, step, alternating.cost._asdict()


def make_batch(tasks: int, size: int) -> Any:
    """Returns inputs ``[size, features]`` and targets ``[tasks, size]``."""
    key = jax.random.key(1)
    x = jax.random.normal(key, (size, WIDTHS[0]))
    return x, jax.random.normal(key, (tasks, size))


def compile_seconds(batch_size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Returns XLA's processor time for 4 and for 64 tasks."""
    found = {}
    for name, options in (("G = T", {}), ("G = 2", {"groups": 2})):
        seconds: dict[int, list[float]] = {4: [], 64: []}
        for _ in range(repeats):
            for tasks, times in seconds.items():
                batch = make_batch(tasks, batch_size)
                init, step, _ = make_step(tasks, batch, options)
                carry = jax.eval_shape(init, make_params(tasks))
                lowered = jax.jit(step, donate_argnums=0).lower(carry)
                start = time.process_time()
                lowered.compile()
                times.append(time.process_time() - start)
        few, many = (min(times, default=float("nan")) for times in seconds.values())
        found[name] = {"T = 4": few, "T = 64": many, "ratio": many / few}
        print(f"compile {name}: T = 4 {few:.2f} s, T = 64 {many:.2f} s")
    return found


def measure(tasks: int, rounds: int, steps: int, batch_size: int) -> dict[str, Any]:
    """Measures all rows for a number of tasks."""
    batch = make_batch(tasks, batch_size)
    programs, carries, rows = {}, {}, {}

    def add(name, init, step, about):
        carry = init(make_params(tasks))
        program = jax.jit(step, donate_argnums=0).lower(carry).compile()
        programs[name] = program
        # Copied, because leaves of a fresh state may share a buffer, which donation
        # forbids.
        carry = jax.tree.map(jnp.copy, carry)
        carries[name] = jax.block_until_ready(program(carry))
        memory = program.memory_analysis()
        if memory is not None:
            about = about | {"temporary_mb": memory.temp_size_in_bytes / 2**20}
        rows[name] = about

    optimizer = optax.adam(1e-3)
    init, step = joint_step(optimizer, batch)
    add("joint", lambda p: (p, init(p)), step, {})
    for name, options in entries(tasks).items():
        add(name, *make_step(tasks, batch, options))
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
            f"{rows[name]['ratio_of_minima']:6.2f}  temporary "
            f"{rows[name].get('temporary_mb', float('nan')):.1f} MB"
        )
    return rows


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--compiles", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    compiled = compile_seconds(options.batch_size, options.compiles)
    jax.config.update("jax_enable_compilation_cache", True)
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
        "compile_seconds": compiled,
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
