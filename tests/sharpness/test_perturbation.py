"""The ascent step: lengths, zero gradients, and what a radius may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.sharpness import Ball, _perturbation
from mtljax.sharpness._perturbation import check_radius, make_ball, shifted

RNG = np.random.default_rng(0)
W = [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((3, 4), (4,))]
V = [jnp.asarray(RNG.normal(size=(5,)), jnp.float32)]
G = [jnp.asarray(RNG.normal(size=x.shape), jnp.float32) for x in W]
Q = [jnp.asarray(RNG.normal(size=x.shape), jnp.float32) for x in V]


def total(leaves):
    return np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in leaves))


def whole(leaves):
    """No leaf is split over devices."""
    return [()] * len(leaves)


def ascend(shared, own, directions, ball):
    splits = whole(shared), whole(own)
    return _perturbation.ascend((shared, own), directions, ball, splits)


def length(leaves):
    return _perturbation.length(leaves, whole(leaves))


def draw_like(key, leaves):
    return _perturbation.draw_like(key, leaves, whole(leaves))


def lean(mean, noise, sign, alpha):
    return _perturbation.lean(mean, noise, whole(mean), sign, alpha)


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_the_step_has_the_length_of_the_radius_whatever_the_gradient(factor):
    big = [factor * g for g in G], [factor * q for q in Q]
    eps, delta, moved = ascend(W, V, big, Ball(0.3, 0.7))
    assert moved
    np.testing.assert_allclose(total(eps), 0.3, rtol=1e-5)
    np.testing.assert_allclose(total(delta), 0.7, rtol=1e-5)
    np.testing.assert_allclose(eps[1] / eps[1][0], G[1] / G[1][0], rtol=1e-5)


def test_an_adaptive_step_is_relative_to_the_weights():
    eps, delta, _ = ascend(W, V, (G, Q), Ball(2.0, adaptive=True))
    relative = [e / np.abs(w) for e, w in zip(eps, W, strict=True)]
    np.testing.assert_allclose(total(relative), 2.0, rtol=1e-5)
    np.testing.assert_allclose(total([delta[0] / np.abs(V[0])]), 2.0, rtol=1e-5)
    # Along w² ⊙ g.
    ratio = eps[1] / (np.square(W[1]) * G[1])
    np.testing.assert_allclose(ratio, np.full(4, ratio[0]), rtol=1e-5)


def test_a_weight_of_zero_is_not_moved_by_an_adaptive_step():
    weights = [W[0].at[0].set(0.0), W[1]]
    eps, _, _ = ascend(weights, V, (G, Q), Ball(2.0, adaptive=True))
    assert (eps[0][0] == 0).all()
    assert (eps[0][1] != 0).all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_joint_step_shares_one_radius(adaptive):
    eps, delta, _ = ascend(W, V, (G, Q), Ball(0.5, adaptive=adaptive, norm="joint"))
    steps = eps + delta
    if adaptive:
        steps = [e / np.abs(w) for e, w in zip(steps, W + V, strict=True)]
    np.testing.assert_allclose(total(steps), 0.5, rtol=1e-5)
    assert total(steps[:2]) < 0.49


def test_no_direction_is_no_step():
    zero = [jnp.zeros_like(g) for g in G]
    eps, delta, moved = ascend(W, [], (zero, []), Ball(0.5))
    assert all((e == 0).all() for e in eps)
    assert delta == []
    assert not moved
    _, delta, moved = ascend(W, V, (zero, Q), Ball(0.5))
    assert moved  # by the head
    np.testing.assert_allclose(total(delta), 0.5, rtol=1e-5)
    assert not ascend(W, V, (G, Q), Ball(jnp.zeros(())))[2]


def test_nan_is_not_mistaken_for_zero():
    bad = [G[0].at[0, 0].set(jnp.nan), G[1]]
    eps, _, moved = ascend(W, [], (bad, []), Ball(0.5))
    assert moved
    assert np.isnan(eps[1]).all()


def test_length_of_nothing():
    assert length([]) == 0
    assert length([jnp.zeros(0)]) == 0
    np.testing.assert_allclose(length([jnp.full(4, 1e25)]), 2e25, rtol=1e-6)


def test_shifted_rounds_once():
    w = [jnp.ones(2, jnp.bfloat16)]
    (moved,) = shifted(w, [jnp.full(2, 0.01, jnp.float32)])
    assert moved.dtype == jnp.bfloat16
    assert moved[0] == jnp.asarray(1.01, jnp.bfloat16)
    (stacked,) = shifted(W[1:], [jnp.stack([W[1], -W[1]])])
    np.testing.assert_allclose(stacked, np.stack([2 * W[1], 0 * W[1]]), atol=1e-6)


def test_samos_direction():
    """Two unit-like parts in every leaf, whatever the scale of the noise."""
    z = draw_like(jax.random.key(0), G)
    assert not np.allclose(z[0][0], z[1])
    u = lean(G, [10 * x for x in z], jnp.float32(-1), 0.25)
    for g, noise, got in zip(G, z, u, strict=True):
        guess = -noise * total([g]) / total([noise])
        np.testing.assert_allclose(got, 0.25 * g + 0.75 * guess, rtol=2e-5, atol=1e-6)
    alone = lean(G, z, jnp.float32(1), 1.0)
    np.testing.assert_allclose(alone[0], G[0], rtol=1e-6)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "0.1", None])
@pytest.mark.usefixtures("as_users")
def test_a_radius_is_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match=r"name: rho must be a finite number >= 0"):
        make_ball("name", bad, None)


def test_a_radius_may_be_an_array_or_traced():
    assert check_radius("n", "rho", jnp.float32(0))
    assert not check_radius("n", "rho", np.float64(0.5))
    known = []

    @jax.jit
    def traced(rho):
        known.append(check_radius("n", "rho", rho))
        return rho

    traced(0.0)
    assert known == [False]
    with pytest.raises(ValueError, match=r"must be a scalar, not \(2,\)"):
        jax.jit(lambda r: check_radius("n", "rho", r))(jnp.ones(2))


@pytest.mark.usefixtures("as_users")
def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match=r"rho_own=0.1 .* without labels"):
        make_ball("n", Ball(0.1, 0.1), None)
    labels = {"trunk": "shared", "heads": "own"}
    with pytest.raises(ValueError, match=r"norm='joint' .* leave rho_own=0.1 out"):
        make_ball("n", Ball(0.1, 0.1, norm="joint"), labels)
    with pytest.raises(ValueError, match="norm='both' is not one of 'separate'"):
        make_ball("n", Ball(0.1, norm="both"), labels)
