"""One update of a balancer on a matrix of gradients, compiled once per shape."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from zoo import LOSSES3


class Step(NamedTuple):
    update: np.ndarray  # float64 [d]
    weights: np.ndarray  # float64 [T]
    state: Any


@functools.cache
def make(factory, num_tasks, **options):
    """The same object for the same arguments, so that tests share compilations."""
    return factory(num_tasks, **options)


def padded(pair):
    """Two rows of three as the present tasks of a problem of three by four."""
    assert pair.shape == (2, 3)
    return np.pad(pair, ((0, 1), (0, 1))), np.array([True, True, False])


@functools.cache
def _jitted(balancer):
    return jax.jit(balancer.update)


def step(balancer, matrix, losses=LOSSES3, *, state=None, mask=None) -> Step:
    matrix = jnp.asarray(matrix, jnp.float32)
    mask = jnp.ones(len(matrix), bool) if mask is None else jnp.asarray(mask)
    losses = jnp.ones(len(matrix)) if len(losses) != len(matrix) else losses
    losses = jnp.asarray(losses, jnp.float32)
    state = balancer.init({}) if state is None else state
    update, state = _jitted(balancer)({"w": matrix}, state, losses=losses, mask=mask)
    weights = np.asarray(state.task_weights, np.float64)
    return Step(np.asarray(update["w"], np.float64), weights, state)


@functools.cache
def _batched(balancer):
    def one(matrix):
        losses = jnp.ones(balancer.num_tasks)
        return balancer.update({"w": matrix}, balancer.init({}), losses=losses)

    return jax.jit(jax.vmap(one))


def steps(balancer, matrices) -> Step:
    """The first step on every matrix of a batch ``[B, T, d]``."""
    update, state = _batched(balancer)(jnp.asarray(matrices, jnp.float32))
    weights = np.asarray(state.task_weights, np.float64)
    return Step(np.asarray(update["w"], np.float64), weights, state)


def random_pairs(count=200, dim=4, seed=0):
    """Pairs of gradients of unequal length, about half of them in conflict."""
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-1, 1, size=(count, 2, 1))
    return (rng.normal(size=(count, 2, dim)) * lengths).astype(np.float32)
