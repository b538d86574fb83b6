"""What a probe adds to a run at its default cadence.

``python -m experiments.trajectories.timing --data-dir DIR`` prints milliseconds and the
share; times of steps and probes are taken in turns, so that drift hits both.
"""

import dataclasses
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from experiments.common.runs import on_device, stack
from experiments.trajectories import data, model, train
from experiments.trajectories.config import PRESETS, Config
from mtljax import training, trajectory


def timed(config: Config, problem: data.Problem, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of a step and of a probe, all seeds together, and the share."""
    scale = config.scale(problem.name)
    functions = model.make_functions(config, scale, problem)
    row = train.Row(problem.tasks)
    init, step = train.make_step(functions, row, careful=False)
    arrays = on_device(problem.train)
    ids = jnp.arange(len(problem.tasks), dtype=jnp.uint32)
    classes = jnp.array(problem.classes)
    keys = jax.random.split(jax.random.key(0), config.seeds)
    made = [functions.init(k, arrays["image"][:1], ids, classes) for k in keys]
    params, stats = stack(made)
    rates = jnp.full(config.seeds, scale.lrs[0])
    state = jax.vmap(init)(params, stats, keys, rates)
    probe = functions.probe
    every = trajectory.cadence(probe.cost(), len(problem.tasks) * scale.batch_size)
    single = jax.tree.map(lambda x: x[0], state)
    batch = jax.tree.map(lambda x: x[: scale.batch_size], arrays)
    run = training.make_runner(
        step, single, batch, batch_size=scale.batch_size, seeds=True, loop_on="auto"
    )
    period = config.sharpness_every  # after so many probes, all have been measured
    chunk = 200

    def probes():
        point = state.params, state.batch_stats
        return [probe(point, (1 + i) * probe.every) for i in range(period)]

    jax.block_until_ready(probes())
    state, _ = jax.block_until_ready(run(state, arrays, keys, 0, chunk))
    steps, measured = [], []
    for _ in range(rounds):
        start = time.process_time()
        state, _ = jax.block_until_ready(run(state, arrays, keys, 0, chunk))
        steps.append((time.process_time() - start) / chunk)
        start = time.process_time()
        jax.block_until_ready(probes())
        measured.append((time.process_time() - start) / period)
    a_step, a_probe = statistics.median(steps), statistics.median(measured)
    return {
        "tasks": len(problem.tasks),
        "seeds": config.seeds,
        "step_ms": 1e3 * a_step,
        "probe_ms": 1e3 * a_probe,
        "default_every": every,
        "added_percent": 100 * a_probe / (every * a_step),
        "preset_every": scale.eval_every,
        "added_percent_preset": 100 * a_probe / (scale.eval_every * a_step),
    }


def main(data_dir: pathlib.Path, rounds: int = 5) -> None:
    """Prints one line a number of tasks, on FashionMTL at the ``cpu`` preset.

    Args:
      data_dir: As for the experiment.
      rounds: Times are medians of so many.
    """
    config = dataclasses.replace(PRESETS["cpu"][1], data_dir=data_dir)
    whole = data.load(config, "fashion_mtl")
    for tasks in ((data.TARGET,), (data.TARGET, data.OTHER)):
        found = timed(config, whole.select(tasks), rounds)
        print(", ".join(f"{k}={v:.4g}" for k, v in found.items()))


if __name__ == "__main__":
    tyro.cli(main)
