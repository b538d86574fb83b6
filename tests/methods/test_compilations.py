"""A second call outside ``jit`` compiles nothing, of methods and of solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from registry import CLASSICS

import mtljax
from mtljax import solvers

GRAMIAN = np.array([[18.0, -22.0, 1.0], [-22.0, 38.0, 2.0], [1.0, 2.0, 3.0]])
SMALL = {
    "igb_v2": {
        "phases": mtljax.IGBPhases(window=(0, 1)),
        "agent": mtljax.IGBAgent(hidden=(4,), capacity=4, batch_size=2),
    }
}


COUNTED = []


def listen(event, duration, **_):
    del duration
    if event.endswith("backend_compile_duration"):
        COUNTED.append(event)


monitoring.register_event_duration_secs_listener(listen)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CLASSICS else pytest.mark.deep)
        for name in mtljax.METHODS
    ],
)
def test_methods(name):
    key = jax.random.key(0)
    balancer = mtljax.get_method(name).build(3, key=key, **SMALL.get(name, {}))
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))}
    losses = jnp.array([0.5, 2.0, 1.0])
    _, state = balancer.update(grads, balancer.init({"w": jnp.zeros(4)}), losses=losses)
    before = len(COUNTED)
    balancer.update(grads, state, losses=losses)
    assert len(COUNTED) == before


@pytest.mark.parametrize(
    "solve",
    [
        solvers.min_norm_point,
        solvers.solve_bargaining,
        lambda g: solvers.solve_bargaining(g, jnp.float32(2)),
        lambda g: solvers.nonnegative_qp(g, -jnp.ones(3)),
        lambda g: solvers.project_cone(g, jnp.ones(3)),
        lambda g: solvers.max_min_in_ball(g, jnp.ones(3) / 3, jnp.float32(0.5)),
    ],
)
def test_solvers(solve):
    gramian = jnp.asarray(GRAMIAN, jnp.float32)
    solve(gramian)
    before = len(COUNTED)
    assert before  # the listener hears of compilations
    solve(gramian)
    assert len(COUNTED) == before
