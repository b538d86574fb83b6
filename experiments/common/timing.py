"""Step times of rows, measured alternately.

A drift of the machine then affects all rows equally.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mtljax import training


def stopwatch(
    step: Callable[..., Any],
    state: Any,
    data: Any,
    order: Any,
    *,
    batch_size: int,
    steps: int,
) -> Callable[[], float]:
    """Returns a function that measures the milliseconds of one step of stacked runs.

    It uses the program that was compiled for training.
    """
    one = jax.tree.map(lambda x: x[0], state)
    batch = {name: array[:batch_size] for name, array in data.items()}
    run = training.make_runner(
        step, one, batch, batch_size=batch_size, seeds=True, loop_on="auto"
    )
    state = jax.tree.map(jax.numpy.copy, state)  # it is donated

    def measure() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = run(state, data, order, 0, steps)
        jax.block_until_ready((state, metrics))
        return 1e3 * (time.perf_counter() - start) / steps

    return measure


def step_times(
    watches: Mapping[str, Callable[[], float]], rounds: int = 3
) -> dict[str, float]:
    """Returns the median milliseconds of one step for each of several rows."""
    for measure in watches.values():
        measure()  # compiles the program, unless training compiled it
    times = [[measure() for measure in watches.values()] for _ in range(rounds)]
    return dict(zip(watches, np.median(times, axis=0).tolist(), strict=True))
