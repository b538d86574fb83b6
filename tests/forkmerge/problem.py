"""Three regression tasks on one small network, and its train step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtljax import forkmerge

TASKS, STEPS, BATCH = 3, 6, 4
RNG = np.random.default_rng(0)


class State(NamedTuple):
    params: Any
    opt_state: Any
    count: Any


def initial(optimizer, dtype=np.float32):
    rng = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), dtype)
    heads = {name: array(5) for name in "abc"}
    params = {"trunk": {"w": array(4, 5)}, "heads": heads}
    return State(params, optimizer.init(params), jnp.int32(0))


def batches(count=STEPS, dtype=np.float32):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(count, BATCH, 4))
    y = np.sin(x @ rng.normal(size=(4, TASKS)))
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def task_losses(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["trunk"]["w"])
    outputs = jnp.stack([hidden @ h for h in params["heads"].values()], -1)
    return jnp.square(outputs - batch["y"]).mean(0)


@functools.cache
def make_step(optimizer):
    def step(state, weights, batch):
        def objective(params):
            losses = task_losses(params, batch)
            return forkmerge.weighted_sum(losses, weights), losses

        grad, losses = jax.grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.count + 1), {"losses": losses}

    return step


ADAM = optax.adam(0.05)


def score(state, batch):
    """Minus the loss of the first task."""
    return -task_losses(state.params, batch)[0]


VALIDATION = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batches(5))


@functools.cache
def trained(strategy="vmap"):
    """Branches of target + each after some steps of Adam, for whoever needs them."""
    branches = forkmerge.fork(initial(ADAM), TASKS)
    nu = forkmerge.target_plus_each(TASKS)
    run = jax.jit(
        lambda b: forkmerge.train_branches(
            make_step(ADAM), b, nu, batches(), strategy=strategy
        )
    )
    return run(branches)
