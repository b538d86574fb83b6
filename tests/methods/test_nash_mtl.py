"""Nash-MTL: golden values, its identities, and the stationary fallback."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3

import mtljax


def test_golden():
    got = step(make(mtljax.nash_mtl, 3), J3)
    np.testing.assert_allclose(got.weights, [0.576882, 0.449011, 0.172407], atol=1e-5)
    update = [0.704752, 0.942558, 0.104196, 1.266511]
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got.update), np.sqrt(3), rtol=1e-5)
    assert got.state.solver.converged
    assert got.state.solver.residual < 1e-5


def test_golden_of_two_and_clipped():
    matrix, mask = padded(J2)
    got = step(make(mtljax.nash_mtl, 3), matrix, mask=mask)
    np.testing.assert_allclose(got.weights, [0.591461, 0.407071, 0], atol=1e-5)
    np.testing.assert_allclose(got.update, [0.076584, 0.998533, 0.998533, 0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got.update), np.sqrt(2), rtol=1e-5)
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(jnp.asarray(got.update, jnp.float32), clip.init(None))
    np.testing.assert_allclose(clipped, [0.054153, 0.706069, 0.706069, 0], atol=1e-5)


def test_two_tasks_closed_form():
    """``α_i = 1 / (‖g_i‖ √(1 + cos))``."""
    pairs = random_pairs()
    wide = pairs.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=2)
    cosine = (wide[:, 0] * wide[:, 1]).sum(1) / lengths.prod(1)
    expected = 1 / (lengths * np.sqrt(1 + cosine)[:, None])
    got = steps(make(mtljax.nash_mtl, 2), pairs)
    # The equation amplifies the rounding of the Gramian by 1 / (1 + cos).
    assert (np.abs(got.weights / expected - 1) < 2e-6 / (1 + cosine)[:, None]).all()
    np.testing.assert_allclose(
        np.linalg.norm(got.update, axis=1), np.sqrt(2), rtol=1e-4
    )


def test_scaling_a_task_changes_its_weight_but_not_the_update():
    units = np.array([1e-3, 1.0, 1e2])
    plain = step(make(mtljax.nash_mtl, 3), J3)
    scaled = step(make(mtljax.nash_mtl, 3), J3 * units[:, None])
    np.testing.assert_allclose(scaled.update, plain.update, atol=1e-4)
    np.testing.assert_allclose(scaled.weights * units, plain.weights, rtol=1e-4)


def test_every_task_gains_the_inverse_of_its_weight():
    update, weights, _ = step(make(mtljax.nash_mtl, 3), J3)
    np.testing.assert_allclose(J3 @ update, 1 / weights, rtol=1e-4)


def test_stationary_falls_back_to_mgda_and_says_so():
    convex = np.array([0.5, 2, 1]) / 3.5
    matrix = np.vstack([J3[:2], -(0.5 * J3[0] + 2.0 * J3[1])])
    update, weights, state = step(make(mtljax.nash_mtl, 3), matrix)
    assert not state.solver.converged
    np.testing.assert_allclose(weights, convex, atol=1e-4)
    np.testing.assert_allclose(update, 0, atol=1e-4)
    again = step(make(mtljax.nash_mtl, 3), J3, state=state)  # and recovers
    assert again.state.solver.converged
    np.testing.assert_allclose(again.weights, [0.576882, 0.449011, 0.172407], atol=1e-5)


def test_a_zero_gradient_takes_no_part():
    got = step(make(mtljax.nash_mtl, 3), np.vstack([J2, np.zeros((1, 3))]))
    np.testing.assert_allclose(got.weights, [0.591461, 0.407071, 0], atol=1e-5)


def test_solves_anew_every_so_many_steps():
    balancer = mtljax.nash_mtl(3, update_every=3)
    first, second = [0.576882, 0.449011, 0.172407], None
    state = None
    for count, scale in enumerate([1.0, 2.0, 4.0, 5.0, 9.0]):
        update, weights, state = step(balancer, scale * J3, state=state)
        second = np.array(first) / 5 if count >= 3 else np.array(first)
        np.testing.assert_allclose(weights, second, atol=1e-5)
        np.testing.assert_allclose(update, weights @ (scale * J3), rtol=1e-4, atol=1e-6)


def test_a_task_absent_at_the_solve_keeps_its_last_weight():
    balancer = mtljax.nash_mtl(3, update_every=2)
    present = np.array([True, True, False])
    state = None
    for mask in (np.ones(3, bool), np.ones(3, bool), present):
        _, weights, state = step(balancer, J3, state=state, mask=mask)
    pair = step(make(mtljax.nash_mtl, 3), J3, mask=present).weights[:2]
    np.testing.assert_allclose(weights, [*pair, 0], rtol=1e-4)
    _, weights, _ = step(balancer, J3, state=state)
    np.testing.assert_allclose(weights, [*pair, 0.172407], atol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="update_every must be positive, not 0"):
        mtljax.nash_mtl(2, update_every=0)
