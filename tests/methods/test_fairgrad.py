"""FairGrad: golden values, its equation, both ends of α, the degree made one."""

import numpy as np
import pytest
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3

import mtljax


@pytest.mark.parametrize(
    ("alpha", "two", "three"),
    [
        (0.5, [0.742828, 0.525393], [0.673692, 0.563207, 0.325736]),
        (1.0, [0.591461, 0.407071], [0.576882, 0.449011, 0.172407]),
        (2.0, [0.471363, 0.319454], [0.504389, 0.371256, 0.079332]),
        (10.0, [0.339274, 0.226945], [0.424991, 0.295383, 0.005436]),
    ],
)
def test_golden(alpha, two, three):
    got = step(make(mtljax.fairgrad, 3, alpha=alpha), J3)
    np.testing.assert_allclose(got.weights, three, atol=1e-5)
    assert got.state.solver.converged
    matrix, mask = padded(J2)
    got = step(make(mtljax.fairgrad, 3, alpha=alpha), matrix, mask=mask)
    np.testing.assert_allclose(got.weights, [*two, 0], atol=1e-5)


def test_default_is_the_authors_scripts():
    got = step(make(mtljax.fairgrad, 3), J3)
    update = [0.637521, 0.688712, 0.212593, 0.821716]
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    # The equation itself, in float64: every gain is w^(-1/2).
    np.testing.assert_allclose(J3 @ got.update, got.weights**-0.5, rtol=1e-4)


def test_small_alpha_is_the_sum():
    got = step(make(mtljax.fairgrad, 3, alpha=0.02), J3)
    np.testing.assert_allclose(got.weights, 1, atol=0.1)


def test_large_alpha_turns_to_the_interior_point_of_mgda():
    update, _, _ = step(make(mtljax.fairgrad, 2, alpha=100.0), J2)
    shortest = np.array([0.0, 1.0, 1.0]) / np.sqrt(2)  # golden of MGDA
    np.testing.assert_allclose(update / np.linalg.norm(update), shortest, atol=1e-2)


def test_two_tasks_of_equal_length():
    """``w = (‖g‖² (1 + cos))^(-α/(1+α))`` for both."""
    pairs = random_pairs()
    pairs /= np.linalg.norm(pairs, axis=2, keepdims=True)
    pairs *= 3
    wide = pairs.astype(np.float64)
    slope = 9 + (wide[:, 0] * wide[:, 1]).sum(1)
    expected = slope ** (-2 / 3)
    got = steps(make(mtljax.fairgrad, 2), pairs)
    error = np.abs(got.weights / expected[:, None] - 1)
    assert (error < (2e-5 / slope)[:, None]).all()  # rounding over 1 + cos


def test_normalize_degree_keeps_the_direction_and_takes_the_length_of_the_mean():
    length = np.linalg.norm(J3.mean(0))
    balancer = make(mtljax.fairgrad, 3, normalize_degree=True)
    for factor in (1e-12, 1.0, 1e12):
        update, _, state = step(balancer, factor * J3)
        plain = np.array([0.637521, 0.688712, 0.212593, 0.821716])
        expected = plain / np.linalg.norm(plain) * length * factor
        np.testing.assert_allclose(update / factor, expected / factor, atol=1e-5)
        assert state.solver.converged


@pytest.mark.parametrize("normalize", [False, True])
def test_stationary_falls_back_to_mgda_and_says_so(normalize):
    matrix = np.vstack([J3[:2], -(0.5 * J3[0] + 2.0 * J3[1])])
    balancer = make(mtljax.fairgrad, 3, normalize_degree=normalize)
    update, weights, state = step(balancer, matrix)
    assert not state.solver.converged
    np.testing.assert_allclose(weights, np.array([0.5, 2, 1]) / 3.5, atol=1e-4)
    np.testing.assert_allclose(update, 0, atol=1e-4)


def test_scales():
    plain = step(make(mtljax.fairgrad, 3), J3).weights
    for scale, total in (("sum", 3), ("mean", 1)):
        got = step(make(mtljax.fairgrad, 3, scale=scale), J3).weights
        np.testing.assert_allclose(got, total * plain / plain.sum(), rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match="fairgrad: alpha must be a finite number above 0"
        ):
            mtljax.fairgrad(2, alpha=alpha)
