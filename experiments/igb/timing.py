"""Step time of a row beside equal weighting's, measured in turn."""

import time
from typing import Any

import jax
import numpy as np

from experiments.igb.train import Problem, Program
from mtljax import training


class Stopwatch:
    """Steps of one row, from where its training ended: the buffer is filled then."""

    def __init__(
        self, problem: Problem, program: Program, state: Any, order_key: jax.Array
    ):
        settings = problem.settings
        one = jax.tree.map(lambda x: x[0], state)
        batch = {k: v[: settings.batch_size] for k, v in problem.train.items()}
        self._run = training.make_runner(  # the program that training compiled
            program.step,
            one,
            batch,
            batch_size=settings.batch_size,
            seeds=True,
            loop_on="auto",
        )
        self._state = jax.tree.map(jax.numpy.copy, state)  # the runner donates it
        self._data, self._order = problem.train, order_key
        self._steps = settings.time_steps

    def measure(self) -> float:
        """Milliseconds of one step of all seeds together."""
        start = time.perf_counter()
        self._state, metrics = self._run(
            self._state, self._data, self._order, 0, self._steps
        )
        jax.block_until_ready((self._state, metrics))
        return 1e3 * (time.perf_counter() - start) / self._steps


def relative_time(
    watch: Stopwatch, reference: Stopwatch, rounds: int = 3
) -> tuple[float, float]:
    """Median milliseconds of a step, and the median ratio to the reference's."""
    watch.measure()  # the first call may compile
    pairs = [(watch.measure(), reference.measure()) for _ in range(rounds)]
    mine, other = np.array(pairs).T
    return float(np.median(mine)), float(np.median(mine / other))
