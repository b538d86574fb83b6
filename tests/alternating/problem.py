"""Small quadratics with analytic gradients, and the algorithm in plain numpy.

``L_t(θ, φ; x) = ½ (θ − c_t)ᵀ A_t (θ − c_t) + x φᵀ M_t θ + ½ |φ|²`` with θ ∈ R³ shared,
φ ∈ R² the task's own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

TASKS = 5
_rng = np.random.default_rng(0)
_roots = _rng.normal(size=(TASKS, 3, 3))
A = _roots @ _roots.transpose(0, 2, 1) + np.eye(3)
C = _rng.normal(size=(TASKS, 3))
M = _rng.normal(size=(TASKS, 2, 3))
XS = _rng.normal(size=6)
LABELS = {"theta": "shared", "phi": "own"}
LR = 0.05


def start(tasks=TASKS):
    rng = np.random.default_rng(1)
    theta, phi = rng.normal(size=3), rng.normal(size=(TASKS, 2))[:tasks]
    return {"theta": jnp.asarray(theta), "phi": jnp.asarray(phi)}


def task_loss(params, task, x):
    a, c, m = (jnp.asarray(v)[task] for v in (A, C, M))
    d = params["theta"] - c
    phi = params["phi"]
    return d @ a @ d / 2 + x * (phi @ m @ params["theta"]) + phi @ phi / 2


def gradients(theta, phi, task, x):
    g = A[task] @ (theta - C[task]) + x * M[task].T @ phi
    return g, x * M[task] @ theta + phi


class Adam:
    """Textbook Adam on one array."""

    def __init__(self):
        self.m, self.v, self.n = 0.0, 0.0, 0

    def __call__(self, grad):
        self.n += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m, v = self.m / (1 - 0.9**self.n), self.v / (1 - 0.999**self.n)
        return -LR * m / (np.sqrt(v) + 1e-8)


class Momentum:
    """Heavy ball on one array."""

    def __init__(self):
        self.v = 0.0

    def __call__(self, grad):
        self.v = 0.9 * self.v + grad
        return -LR * self.v


OPTIMIZERS = {
    "adam": (Adam, optax.adam(LR)),
    "momentum": (Momentum, optax.sgd(LR, momentum=0.9)),
}


class Reference:
    """The algorithm, one task after the other, in float64."""

    def __init__(self, kind, *, state, mean=False):
        params = start()
        self.theta = np.array(params["theta"], np.float64)
        self.phi = np.array(params["phi"], np.float64)
        self.state, self.mean = state, mean
        self.slots = [kind() for _ in range(TASKS)]
        self.heads = [kind() for _ in range(TASKS)]

    def step(self, plan, x, mask):
        for row, group in zip(*map(np.asarray, plan), strict=True):
            tasks = [t for t in row if t < TASKS and mask[t]]
            if not tasks:
                continue
            weight = 1 / len(tasks) if self.mean else 1
            pairs = [gradients(self.theta, self.phi[t], t, x) for t in tasks]
            if self.state == "per_task":
                moves = [
                    self.slots[t](weight * g)
                    for t, (g, _) in zip(tasks, pairs, strict=True)
                ]
                self.theta = self.theta + sum(moves)
            else:
                slot = self.slots[group if self.state == "slot" else 0]
                self.theta = self.theta + slot(weight * sum(g for g, _ in pairs))
            for t, (_, q) in zip(tasks, pairs, strict=True):
                self.phi[t] += self.heads[t](weight * q)


def all_present():
    return np.ones(TASKS, bool)


@functools.cache
def jitted(step, loss=task_loss, masked=False):
    """One program for a step function; the batch and the mask are arguments."""
    if masked:
        return jax.jit(lambda p, s, x, mask: step(loss, p, s, x, mask=mask))
    return jax.jit(lambda p, s, x: step(loss, p, s, x))


def run(alternating, params, batches, *, state=None, loss=task_loss):
    """``(params, state, losses of every batch)``."""
    state = alternating.init(params) if state is None else state
    step, seen = jitted(alternating.step, loss), []
    for x in batches:
        losses, params, state = step(params, state, x)
        seen.append(np.asarray(losses))
    return params, state, np.array(seen)
