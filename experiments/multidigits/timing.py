"""Step times of all methods, measured in turn so that drift hits all alike."""

import time
from collections.abc import Mapping

import jax
import numpy as np

from experiments.multidigits.config import Config
from experiments.multidigits.train import Problem, Program, initial_state
from mtljax import training


def step_times(
    config: Config,
    problem: Problem,
    programs: Mapping[str, Program],
    rounds: int = 3,
) -> dict[str, float]:
    """Median milliseconds of one step of all seeds together, for each method."""
    runs = {}
    for method, program in programs.items():
        state, order = initial_state(config, problem, method, program)
        one = jax.tree.map(lambda x: x[0], state)
        batch = jax.tree.map(lambda a: a[: config.batch_size], problem.train)
        run = training.make_runner(
            program.step,
            one,
            batch,
            batch_size=config.batch_size,
            seeds=True,
            loop_on="auto",
        )
        runs[method] = (run, state, order)

    def once(method: str) -> float:
        run, state, order = runs[method]
        start = time.perf_counter()
        state, metrics = run(state, problem.train, order, 0, config.time_steps)
        jax.block_until_ready((state, metrics))
        runs[method] = (run, state, order)  # the old buffers were donated
        return 1e3 * (time.perf_counter() - start) / config.time_steps

    for method in programs:
        once(method)  # compiles, unless training did
    times = [[once(method) for method in programs] for _ in range(rounds)]
    return dict(zip(programs, np.median(times, axis=0).tolist(), strict=True))
