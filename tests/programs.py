"""Every case of the registry as one compiled program, whoever asks for it."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import CASES
from zoo import LOSSES3

DIM = 8  # all inputs are padded to it, so that one program serves them
LOSSES = jnp.asarray(LOSSES3, jnp.float32)
TRACES = collections.Counter()


def parametrize(cases, deep=()):
    """A case stays on one worker of pytest-xdist, and so do its compiled programs."""

    def marks(case):
        group = pytest.mark.xdist_group(case.id)
        return (group, pytest.mark.deep) if case in deep else (group,)

    return pytest.mark.parametrize(
        "case", [pytest.param(c, id=c.id, marks=marks(c)) for c in cases]
    )


def tree(matrix, dtype=jnp.float32):
    """The rows of a matrix as a tree of two leaves, one of them a matrix."""
    matrix = np.asarray(matrix)
    split = matrix.shape[1] // 2
    a, b = matrix[:, :split], matrix[:, split:]
    return {
        "a": {"kernel": jnp.asarray(a.reshape(*a.shape, 1), dtype)},
        "b": jnp.asarray(b, dtype),
    }


def flat(update):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)])


def wide(matrix):
    """The same Gramian in DIM dimensions."""
    matrix = np.asarray(matrix)
    return np.pad(matrix, ((0, 0), (0, DIM - matrix.shape[1])))


PARAMS = jax.tree.map(lambda g: g[0], tree(np.zeros((3, DIM))))


@functools.cache
def built(case_id, tasks=3, **options):
    """The balancer and its program, compiled once however many tests use it."""
    case = next(c for c in CASES if c.id == case_id)
    balancer = case.build(tasks, **options)
    key = (case_id, tasks, *options.items())

    def update(*args, **kwargs):
        TRACES[key] += 1
        return balancer.update(*args, **kwargs)

    return balancer, jax.jit(update)


def run(case, matrix, losses=LOSSES, state=None, mask=None, **options):
    """One update through the program of the case: (update [DIM], state)."""
    tasks = len(matrix)
    balancer, update = built(case.id, tasks, **options)
    state = balancer.init(PARAMS) if state is None else state
    mask = jnp.ones(tasks, bool) if mask is None else jnp.asarray(mask)
    losses = jnp.asarray(losses, jnp.float32)
    combined, state = update(tree(wide(matrix)), state, losses=losses, mask=mask)
    return flat(combined).astype(np.float64), state
