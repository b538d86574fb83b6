"""Losses outside the domain of a method: a NaN update, and the state as it was."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax

GRADS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)}
LOSSES = jnp.array([0.5, 2.0, 1.0])
SMALL = {
    "phases": mtljax.IGBPhases(window=(1, 2)),
    "agent": mtljax.IGBAgent(hidden=(4,), capacity=4, batch_size=2),
}
POSITIVE = [
    ("scale_invariant", {}),
    ("geometric_mean", {}),
    ("igb_v1", {}),
    ("igb_v2", SMALL),
    ("famo", {}),
    ("stch", {"form": "mtl", "warmup_steps": 1}),
    ("mgda", {"normalize": "loss"}),
]
NONNEGATIVE = [
    ("uncertainty", {}),
    ("imtl_l", {}),
    ("dwa", {"window": 1}),
    ("gradnorm", {}),
    ("cosmos", {}),
    ("db_mtl", {}),
    ("db_mtl", {"beta": 0.0}),
    ("moco", {"compat": "libmtl"}),
]


def build(name, options):
    return mtljax.get_method(name).build(3, key=jax.random.key(0), **options)


def check(balancer, bad):
    """The bad step leaves no trace, and an absent task may hold the loss."""
    state = balancer.init({"w": jnp.zeros(5)})
    _, state = balancer.update(GRADS, state, losses=LOSSES)
    update, new = balancer.update(GRADS, state, losses=LOSSES.at[1].set(bad))
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(new, state)
    mask = jnp.array([True, False, True])
    losses = LOSSES.at[1].set(bad)
    update, _ = balancer.update(GRADS, state, losses=losses, mask=mask)
    assert np.isfinite(update["w"]).all()


@pytest.mark.parametrize(("name", "options"), POSITIVE)
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_positive(name, options, bad):
    balancer = build(name, options)
    assert balancer.positive_losses
    check(balancer, bad)


@pytest.mark.parametrize(("name", "options"), NONNEGATIVE)
def test_not_negative(name, options):
    balancer = build(name, options)
    assert not balancer.positive_losses
    check(balancer, -1.0)


def test_lower_bounds_and_offsets_move_the_domain():
    check(build("famo", {"min_losses": 0.25}), 0.2)
    check(build("famo", {"min_losses": [0.25, 1.0, 0.0]}), 0.9)
    shifted = build("scale_invariant", {"offset": 1.0})
    check(shifted, -1.0)
    _, state = shifted.update(GRADS, shifted.init({}), losses=LOSSES.at[1].set(-0.5))
    assert float(state.task_weights[1]) == 2


def test_an_observed_loss_outside_the_domain_changes_nothing():
    balancer = build("famo", {})
    _, state = balancer.update(GRADS, balancer.init({}), losses=LOSSES)
    for bad in (0.0, jnp.nan):
        new = mtljax.observe(balancer, state, losses=LOSSES.at[1].set(bad))
        chex.assert_trees_all_equal(new, state)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("scale", ["native", "sum"])
def test_a_solved_task_gets_nothing_from_db_mtl(beta, scale):
    balancer = mtljax.db_mtl(3, beta=beta, scale=scale)
    state = balancer.init({"w": jnp.zeros(5)})
    solved = {"w": GRADS["w"].at[1].set(0)}
    losses = LOSSES.at[1].set(0.0)
    update, _ = balancer.update(solved, state, losses=losses)
    mask = jnp.array([True, False, True])
    dropped, _ = balancer.update(solved, state, losses=LOSSES, mask=mask)
    ratio = 1 if scale == "native" else 3 / 2  # the sum counts the solved task
    np.testing.assert_allclose(update["w"], ratio * dropped["w"], rtol=1e-6)
    # A loss of zero that still has a gradient has no logarithm.
    update, new = balancer.update(GRADS, state, losses=losses)
    assert np.isnan(update["w"]).all()
    chex.assert_trees_all_equal(new, state)
