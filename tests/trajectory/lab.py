"""One small network for all tests of this room, and its matrices by brute force."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from precision import enable_x64

CLASSES, N = 3, 24


@functools.cache
def data():
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(N, 4)),
        "y": rng.integers(CLASSES, size=N),
        "z": rng.integers(CLASSES, size=N),  # the labels of a second task
    }


@functools.cache
def params():
    """39 numbers; biases are not zero, so that all can be perturbed."""
    rng = np.random.default_rng(1)
    shapes = {"a": {"w": (4, 4), "b": (4,)}, "c": {"w": (4, CLASSES), "b": (3,)}}
    draw = lambda s: rng.normal(size=s) * 0.7 + 0.05
    return jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))


def wide(tree):
    """As float64 arrays of jax; inside ``enable_x64`` only."""
    return jax.tree.map(jnp.asarray, tree)


def model(p, x):
    hidden = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None])
    return hidden @ p["c"]["w"] + p["c"]["b"][None]


def cross_entropy(logits, labels):
    rows = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(rows, labels[:, None], 1).mean()


def loss(p, batch):
    return cross_entropy(model(p, batch["x"]), batch["y"])


def task_losses(p, batch):
    """Two classifications and a task that opposes the first."""
    logits = model(p, batch["x"])
    one, two = (cross_entropy(logits, batch[k]) for k in ("y", "z"))
    return jnp.stack([one, two, 0.1 * jnp.square(logits).mean() - one])


def batches(size, tree=None):
    """Consecutive batches ``[n, size, ...]``."""
    return jax.tree.map(
        lambda x: jnp.asarray(x).reshape(-1, size, *x.shape[1:]),
        data() if tree is None else tree,
    )


def ravel(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def per_example_gradients():
    """``[N, P]`` in float64."""
    with enable_x64(True):
        single = lambda e: jax.grad(loss)(wide(params()), e)
        rows = jax.jit(lambda b: jax.lax.map(single, b))(batches(1))
        flat = [np.asarray(x).reshape(N, -1) for x in jax.tree.leaves(rows)]
    return np.concatenate(flat, 1)


@functools.cache
def hessian():
    """``[P, P]`` of the mean loss, from derivatives of the flat function."""
    with enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(wide(params()))
        whole = jax.tree.map(jnp.asarray, data())
        return np.asarray(jax.jit(jax.hessian(lambda f: loss(unravel(f), whole)))(flat))


@functools.cache
def jacobian():
    """``[N, classes, P]`` of the logits, and the probabilities ``[N, classes]``."""
    with enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(wide(params()))
        x = jnp.asarray(data()["x"])
        logits = jax.jit(jax.jacrev(lambda f: model(unravel(f), x)))(flat)
        return np.asarray(logits), np.asarray(jax.nn.softmax(model(wide(params()), x)))


def ggn():
    jac, p = jacobian()
    inner = np.stack([np.diag(q) - np.outer(q, q) for q in p])
    return np.einsum("nip,nij,njq->pq", jac, inner, jac) / N


@functools.cache
def task_gradients():
    """``[T, P]`` of all examples."""
    with enable_x64(True):
        whole = jax.tree.map(jnp.asarray, data())
        rows = jax.jit(jax.jacrev(task_losses))(wide(params()), whole)
        flat = [np.asarray(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(rows)]
    return np.concatenate(flat, 1)


class Counter:
    """Counts how often a loss is evaluated: once a gradient, HVP or forward pass."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def _count(self):
        self.calls += 1

    def __call__(self, *args):
        jax.debug.callback(self._count)
        return self.function(*args)

    def during(self, run):
        self.calls = 0
        jax.block_until_ready(jax.jit(run)())
        jax.effects_barrier()
        return self.calls
