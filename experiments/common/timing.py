"""Step times of rows, measured alternately.

A drift of the machine then affects all rows equally.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mtljax import training


class Stopwatch:
    """Times steps of stacked runs with the program compiled for training."""

    def __init__(
        self,
        step: Callable[..., Any],
        state: Any,
        data: Any,
        order: Any,
        *,
        batch_size: int,
        steps: int,
    ):
        one = jax.tree.map(lambda x: x[0], state)
        batch = {name: array[:batch_size] for name, array in data.items()}
        self._run = training.make_runner(
            step, one, batch, batch_size=batch_size, seeds=True, loop_on="auto"
        )
        self._state = jax.tree.map(jax.numpy.copy, state)  # it is donated
        self._data, self._order, self._steps = data, order, steps

    def measure(self) -> float:
        """Returns the milliseconds of one step of all runs together."""
        start = time.perf_counter()
        self._state, metrics = self._run(
            self._state, self._data, self._order, 0, self._steps
        )
        jax.block_until_ready((self._state, metrics))
        return 1e3 * (time.perf_counter() - start) / self._steps


def step_times(watches: Mapping[str, Stopwatch], rounds: int = 3) -> dict[str, float]:
    """Returns the median milliseconds of one step for each of several rows."""
    for watch in watches.values():
        watch.measure()  # compiles the program, unless training compiled it
    times = [[watch.measure() for watch in watches.values()] for _ in range(rounds)]
    return dict(zip(watches, np.median(times, axis=0).tolist(), strict=True))
