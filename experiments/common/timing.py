"""Time of a training step of one run."""

import time
from collections.abc import Callable
from typing import Any

import jax


def stopwatch(
    step: Callable[..., Any], state: Any, *args: Any, steps: int
) -> tuple[Callable[..., float], float | None]:
    """Compiles a loop of steps on one batch.

    XLA counts the body of a loop once, so the operations of iterative solvers are a
    lower bound.

    Args:
      step: Function ``step(state, *args) -> state``. A state has ``params``.
      state: A state.
      *args: Further arguments of the step.
      steps: Number of steps of the loop.

    Returns:
      A function ``clock(state)`` that measures the milliseconds of a step, by default
      from the given state, and the number of operations of a step, if it is known.
    """

    @jax.jit
    def whole(state, *args):
        one = lambda state, _: (step(state, *args), None)
        return jax.lax.scan(one, state, None, length=steps)[0].params

    compiled = whole.lower(state, *args).compile()
    found: Any = compiled.cost_analysis()
    found = found[0] if isinstance(found, list) and found else found
    flops = found.get("flops") if isinstance(found, dict) else None

    def clock(state: Any = state) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, *args))
        return 1e3 * (time.perf_counter() - start) / steps

    clock()
    return clock, flops
