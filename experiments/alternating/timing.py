"""Time and memory of one batch of one run, rows taking turns so that drift hits all."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.alternating.problem import Problem
from experiments.alternating.report import Measured
from experiments.alternating.train import Run, initial_state, make_program


def _megabytes(program: Any) -> float:
    found = program.memory_analysis()
    if found is None:  # a backend that does not tell
        return float("nan")
    total = found.temp_size_in_bytes + found.argument_size_in_bytes
    return (total + found.output_size_in_bytes - found.alias_size_in_bytes) / 2**20


def measure(
    problem: Problem,
    names: Sequence[str],
    batch_size: int,
    rounds: int,
    steps: int = 20,
) -> dict[str, Measured]:
    """Median milliseconds over rounds, and the program's memory."""
    batch = {k: v[:batch_size] for k, v in problem.train.items()}
    programs, states = {}, {}
    for name in names:
        row = make_program(problem, name)
        state, _ = initial_state(problem, row, [Run(0, 1e-4)])
        state = jax.tree.map(lambda x: x[0].copy(), state)
        step = jax.jit(row.step, donate_argnums=0)
        programs[name] = step.lower(state, batch).compile()
        states[name] = programs[name](state, batch)[0]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, program in programs.items():
            state = jax.block_until_ready(states[name])
            start = time.perf_counter()
            for _ in range(steps):
                state, _ = program(state, batch)
            states[name] = jax.block_until_ready(state)
            times[name].append(1e3 * (time.perf_counter() - start) / steps)
    return {
        name: Measured(float(np.median(found)), _megabytes(programs[name]))
        for name, found in times.items()
    }
