"""The time to trace a step, relative to that of ``jax.value_and_grad``.

A process of its own: in the tests, every signature of mtljax is checked at run time.
"""

import json
import time

import jax
import jax.numpy as jnp

import mtljax

LAYERS, TASKS, WIDTH = 48, 4, 8


def task_losses(p, x):
    for w, b in p["trunk"]:
        x = x + jnp.tanh(x @ w + b)
    return ((x @ p["heads"]) ** 2).mean(0)


PARAMS = {
    "trunk": [(jnp.ones((WIDTH, WIDTH)), jnp.ones((1, WIDTH)))] * LAYERS,
    "heads": jnp.ones((WIDTH, TASKS)),
}
X = jnp.ones((16, WIDTH))


def seconds(step, *args):
    """The least processor time of some traces; the functions are new each time."""
    found = []
    for _ in range(5):
        start = time.process_time()
        jax.make_jaxpr(lambda *a: step(*a))(*args)  # noqa: PLW0108, a cached trace is free
        found.append(time.process_time() - start)
    return min(found)


def balanced(balancer, engine):
    step = mtljax.value_and_balanced_grad(
        task_losses, balancer, engine=engine, backward="jax"
    )
    return seconds(step, PARAMS, balancer.init(PARAMS), X)


def measure():
    """Ratios by engine."""
    once = seconds(jax.value_and_grad(lambda p, x: task_losses(p, x).sum()), PARAMS, X)
    upgrad = mtljax.upgrad(TASKS)

    def by_hand(p, state, x):
        return task_losses(p, x), upgrad.update(jax.jacrev(task_losses)(p, x), state)

    rows = seconds(by_hand, PARAMS, upgrad.init(PARAMS), X)
    return {
        "losses": balanced(mtljax.linear(TASKS), "losses") / once,
        "stacked": balanced(upgrad, "stacked") / rows,
        "gramian": balanced(upgrad, "gramian") / once,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
