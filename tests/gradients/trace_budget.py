"""The cost of tracing a step, relative to that of ``jax.value_and_grad``.

The cost is the number of calls of functions, which other programs on the machine cannot
change, as they do the time. The module runs in a process of its own, because in the
tests every signature of mtljax is checked at run time.
"""

import json
import sys

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


def calls(step, *args):
    """The number of calls in a trace; the first trace fills the caches of jax."""
    count = 0

    def profile(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    for hook in (None, profile):
        sys.setprofile(hook)
        try:
            jax.make_jaxpr(lambda *a: step(*a))(*args)  # noqa: PLW0108, not the cached one
        finally:
            sys.setprofile(None)
    return count


def balanced(balancer, engine):
    step = mtljax.value_and_balanced_grad(
        task_losses, balancer, engine=engine, backward="jax"
    )
    return calls(step, PARAMS, balancer.init(PARAMS), X)


def measure():
    """Ratios by engine."""
    once = calls(jax.value_and_grad(lambda p, x: task_losses(p, x).sum()), PARAMS, X)
    upgrad = mtljax.upgrad(TASKS)

    def by_hand(p, state, x):
        return task_losses(p, x), upgrad.update(jax.jacrev(task_losses)(p, x), state)

    rows = calls(by_hand, PARAMS, upgrad.init(PARAMS), X)
    return {
        "losses": balanced(mtljax.linear(TASKS), "losses") / once,
        "stacked": balanced(upgrad, "stacked") / rows,
        "gramian": balanced(upgrad, "gramian") / once,
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
