"""STCH: both forms are gradients of their scalarisation; the phases of the second."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

from mtljax.methods._stch import stch, stch_mtl_weights, stch_weights

LOSSES = jnp.asarray(LOSSES3, jnp.float32)
NADIR = jnp.array([1.0, 2.0, 1.5])


@pytest.mark.parametrize(
    ("mu", "weights"),
    [
        (1.0, [1.384615, 0.692308, 0.923077]),
        (0.1, [0.005754, 1.473017, 0.051089]),
    ],
)
def test_golden_mtl_form(mu, weights):
    got = stch_mtl_weights(LOSSES, NADIR, mu)
    np.testing.assert_allclose(got, weights, atol=2e-6)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_weights_are_the_gradients_of_the_papers_losses(mu):
    preference, ideal = jnp.array([0.2, 0.5, 0.3]), jnp.array([0.1, 0.4, -0.2])

    def set_form(x):
        return mu * jax.nn.logsumexp(preference * (x - ideal) / mu)

    def mtl_form(x):
        return 3 * mu * jax.nn.logsumexp(jnp.log(x / NADIR) / mu)

    np.testing.assert_allclose(
        stch_weights(LOSSES, preference, ideal, mu),
        jax.grad(set_form)(LOSSES),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        stch_mtl_weights(LOSSES, NADIR, mu), jax.grad(mtl_form)(LOSSES), rtol=1e-5
    )


def test_two_tasks_closed_form():
    """A logistic function of half the difference over μ."""
    _, weights, _ = step(make(stch, 2, mu=0.5), np.eye(2), [1.0, 2.0])
    second = 0.5 / (1 + np.exp(-0.5 / 0.5))
    np.testing.assert_allclose(weights, [0.5 - second, second], rtol=1e-5)


def test_limits_of_mu():
    mean = step(make(stch, 3, mu=1e4), J3)
    np.testing.assert_allclose(mean.weights, np.full(3, 1 / 9), rtol=1e-3)
    worst = step(make(stch, 3, mu=1e-6), J3, [1e4, 1e4 + 1, 1e4])
    np.testing.assert_allclose(worst.weights, [0.0, 1 / 3, 0.0], atol=1e-6)
    si = stch_mtl_weights(LOSSES, NADIR, 1e5)
    np.testing.assert_allclose(si, 1 / LOSSES3, rtol=1e-4)


def test_preference_and_ideal_point_of_the_set_form():
    balancer = make(stch, 3, mu=0.5, preference=(2.0, 1.0, 1.0), ideal=(0.1, 0.5, 0.0))
    shifted = LOSSES3 - np.array([0.1, 0.5, 0.0])
    grads, state, update = (
        {"w": jnp.eye(3)},
        balancer.init({}),
        jax.jit(balancer.update),
    )
    given = jnp.array([0.1, 0.2, 0.7])
    for r, extra in (([0.5, 0.25, 0.25], {}), (given, {"preference": given})):
        terms = np.exp(np.asarray(r, np.float64) * shifted / 0.5)
        got, _ = update(grads, state, losses=LOSSES, **extra)
        np.testing.assert_allclose(got["w"], r * terms / terms.sum(), rtol=1e-5)


def test_phases_of_the_mtl_form():
    balancer = make(stch, 3, form="mtl", mu=0.1, warmup_steps=2, nadir_steps=2)
    rng = np.random.default_rng(0)
    seen, state = [], None
    for number in range(6):
        losses = rng.uniform(0.5, 2, size=3)
        update, weights, state = step(balancer, J3, losses, state=state)
        seen.append(losses)
        if number < 4:
            expected = 1 / losses
        else:
            ratio = (losses / np.mean(seen[2:4], 0)) ** (1 / 0.1)
            expected = 3 * ratio / ratio.sum() / losses
        np.testing.assert_allclose(weights, expected, rtol=1e-4)
        np.testing.assert_allclose(update, expected @ J3, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.nadir, np.mean(seen[2:4], 0), rtol=1e-5)


def test_the_nadir_of_a_task_is_over_its_own_batches():
    balancer = make(stch, 3, form="mtl", warmup_steps=0, nadir_steps=2)
    missing = np.array([True, False, True])
    state = None
    for losses in ([1.0, np.nan, 2.0], [3.0, np.nan, 4.0]):
        _, weights, state = step(balancer, J3, losses, state=state, mask=missing)
        np.testing.assert_allclose(weights[0], 1 / losses[0], rtol=1e-6)
    np.testing.assert_allclose(state.nadir, [2.0, 1.0, 3.0])
    np.testing.assert_array_equal(state.steps, [2, 0, 2])
    # The two that are ready go on without it, and wait for it when it comes.
    _, weights, state = step(balancer, J3, [1.0, 7.0, 3.0], state=state, mask=missing)
    np.testing.assert_allclose(weights, [2 / 3, 0, 4 / 9], rtol=1e-5)
    _, weights, state = step(balancer, J3, [1.0, 4.0, 3.0], state=state)
    np.testing.assert_allclose(weights, [1.0, 0.25, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(state.nadir, [2.0, 4.0, 3.0])


def test_default_length_of_the_recording_is_a_quarter_of_the_warm_up():
    balancer = stch(3, form="mtl", warmup_steps=8)
    state = balancer.init({})._replace(steps=jnp.full(3, 9, jnp.int32), nadir=NADIR)
    _, _, state = step(balancer, J3, np.array([2.0, 4.0, 0.5]), state=state)
    np.testing.assert_allclose(state.nadir, [1.5, 3.0, 1.0])
    np.testing.assert_array_equal(state.steps, [10, 10, 10])
    _, weights, _ = step(balancer, J3, state=state)
    ratio = LOSSES3 / np.array([1.5, 3.0, 1.0])
    np.testing.assert_allclose(weights, 3 * ratio / ratio.sum() / LOSSES3, rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="stch: mu must be a finite number above 0, not 0"
    ):
        stch(2, mu=0.0)
    with pytest.raises(ValueError, match="form='soft' is not one of 'set', 'mtl'"):
        stch(2, form="soft")
    with pytest.raises(ValueError, match=r"needs warmup_steps.*not None"):
        stch(2, form="mtl")
    with pytest.raises(ValueError, match="nadir_steps must be at least 1, not 0"):
        stch(2, form="mtl", warmup_steps=4, nadir_steps=0)
    with pytest.raises(ValueError, match='warmup_steps=4 belongs to form="mtl"'):
        stch(2, warmup_steps=4)
    with pytest.raises(ValueError, match="no preference and no ideal point"):
        stch(2, form="mtl", warmup_steps=4, preference=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"stch: ideal has shape \(3,\)"):
        stch(2, ideal=[0.0, 0.0, 0.0])
