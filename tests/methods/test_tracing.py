"""Hyper-parameters may be traced: ``vmap`` over one is a balancer for each value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import CLASSICS, arguments, with_number

import mtljax

# Arguments of each factory that are real numbers, and eight values of each.
UNIT = np.linspace(0.05, 0.95, 8)
VALUES = {
    ("cagrad", "c"): 2 * UNIT,
    ("cosmos", "lam"): 2 * UNIT,
    ("db_mtl", "beta"): UNIT,
    ("db_mtl", "beta_sigma"): UNIT,
    ("dwa", "temperature"): UNIT,
    ("excess_mtl", "step_size"): UNIT,
    ("fairgrad", "alpha"): 4 * UNIT,
    ("famo", "learning_rate"): UNIT,
    ("famo", "weight_decay"): UNIT,
    ("famo", "min_losses"): UNIT / 10,
    ("gradient_norm_weighting", "decay"): UNIT,
    ("graddrop", "leak"): UNIT,
    ("gradnorm", "alpha"): 2 * UNIT,
    ("gradnorm", "learning_rate"): UNIT / 10,
    ("gradvac", "beta"): UNIT,
    ("igb_v1", "ema"): UNIT,
    ("igb_v1", "temperature"): UNIT,
    ("igb_v2", "agent.discount"): UNIT,
    ("igb_v2", "agent.initial_temperature"): UNIT,
    ("igb_v2", "agent.optimizer"): UNIT / 100,
    ("igb_v2", "agent.target_entropy"): -UNIT,
    ("igb_v2", "agent.tau"): UNIT,
    ("igb_v2", "ema"): UNIT,
    ("imtl_l", "initial_log_scale"): UNIT,
    ("imtl_l", "learning_rate"): UNIT,
    ("moco", "beta"): UNIT,
    ("moco", "beta_sigma"): UNIT,
    ("moco", "gamma"): UNIT / 10,
    ("moco", "gamma_sigma"): UNIT,
    ("moco", "rho"): UNIT,
    ("modo", "gamma"): UNIT / 10,
    ("modo", "rho"): UNIT,
    ("ol_aux", "learning_rate"): UNIT,
    ("pbi", "ideal"): UNIT / 10,
    ("pbi", "theta"): 5 * UNIT,
    ("pcd", "decay"): UNIT,
    ("pcd", "eps"): UNIT,
    ("pcd", "tau"): UNIT,
    ("scale_invariant", "offset"): UNIT,
    ("sdmgrad", "lamda"): UNIT,
    ("sdmgrad", "learning_rate"): UNIT / 10,
    ("sdmgrad", "momentum"): UNIT / 2,
    ("stch", "ideal"): UNIT / 10,
    ("stch", "mu"): UNIT,
    ("uncertainty", "initial_log_variance"): UNIT,
    ("uncertainty", "learning_rate"): UNIT,
}
OPTIONS = {
    "dwa": {"window": 1},
    "igb_v1": {"window": (0, 1)},
    "igb_v2": {
        "phases": mtljax.IGBPhases(window=(0, 1)),
        "agent": mtljax.IGBAgent(
            hidden=(4,), capacity=8, batch_size=2, period=1, updates=1
        ),
    },
    ("sdmgrad", "learning_rate"): {"inner": "reference", "steps": 3},
    ("sdmgrad", "momentum"): {"inner": "reference", "steps": 3, "learning_rate": 0.05},
    "gradient_norm_weighting": {"update_every": 1},
    "ol_aux": {"update_every": 1},
}
GRADS = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
LOSSES = np.array(
    [[1.0, 2.0, 0.5], [0.8, 1.5, 0.6], [0.7, 1.6, 0.4], [0.6, 1.0, 0.3]], np.float32
)


def updates(name, argument, value):
    options = OPTIONS.get(name, {}) | OPTIONS.get((name, argument), {})
    method = mtljax.get_method(name)
    key = jax.random.key(1)
    options = with_number(method.factory, options, argument, value)
    balancer = method.build(3, key=key, **options)
    state = balancer.init({"w": jnp.zeros(5)})

    def one(state, batch):
        update, state = balancer.update({"w": batch[0]}, state, losses=batch[1])
        return state, update["w"]

    return jax.lax.scan(one, state, (jnp.asarray(GRADS), jnp.asarray(LOSSES)))[1]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        pytest.param(*key, marks=() if key[0] in CLASSICS else pytest.mark.deep)
        for key in VALUES
    ],
)
def test_vmap_over_a_number_is_a_balancer_for_each(name, argument, deep_run):
    values = VALUES[name, argument]
    together = jax.jit(jax.vmap(lambda v: updates(name, argument, v)))(
        jnp.asarray(values, jnp.float32)
    )
    assert np.isfinite(together).all()
    for i in range(8) if deep_run else (1, 6):  # each is a program of its own
        value = float(np.float32(values[i]))
        alone = jax.jit(updates, static_argnums=(0, 1, 2))(name, argument, value)
        np.testing.assert_allclose(together[i], alone, rtol=2e-4, atol=2e-5)


def test_every_number_of_every_method_is_in_the_table():
    numbers = {
        (method.name, argument)
        for method in mtljax.METHODS.values()
        for argument, default, annotation in arguments(method.factory)
        if isinstance(default, float) or "Number" in str(annotation)
    }
    assert numbers <= set(VALUES)


def test_a_traced_zero_keeps_the_general_state():
    def build(beta):
        return mtljax.db_mtl(2, beta=beta).init({"w": jnp.zeros(2)})

    assert hasattr(jax.jit(build)(0.0), "tracked")
    assert not hasattr(build(0.0), "tracked")
