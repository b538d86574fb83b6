"""GradVac: golden values of two steps, and the rule in parameter space in float64."""

import functools

import jax
import numpy as np
import pytest
from methods.stepping import padded, step
from zoo import J2, J3

import mtljax

KEY = jax.random.key(0)


@functools.cache
def natural(**options):
    return mtljax.gradvac(3, key=KEY, order="fixed", **options)


def test_golden_of_the_first_two_steps():
    first = step(natural(beta=0.5), J3)
    update = [2.212121, 3.530303, -0.545455, 5.833333]  # PCGrad's, natural order
    np.testing.assert_allclose(first.update, update, atol=1e-5)
    second = step(natural(beta=0.5), J3, state=first.state)
    update = [1.71008, 3.31066, -0.73372, 5.48818]
    np.testing.assert_allclose(second.update, update, atol=1e-5)
    matrix, mask = padded(J2)
    first = step(natural(beta=0.5), matrix, mask=mask)
    np.testing.assert_allclose(first.update, [0.584795, 3.80117, 3.80117, 0], atol=1e-5)
    second = step(natural(beta=0.5), matrix, state=first.state, mask=mask)
    update = [1.00654, 3.264403, 3.264403, 0]
    np.testing.assert_allclose(second.update, update, atol=1e-5)
    goals = np.array([[0, -0.630893, 0], [-0.630893, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(second.state.targets, goals, atol=1e-6)


def vaccine(matrix, goals, beta, always):
    """The rule on the vectors, tasks met in natural order."""
    turned = matrix.copy()
    goals = goals.copy()
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            if i == j:
                continue
            g, other = turned[i], matrix[j]
            size, length = np.linalg.norm(g), np.linalg.norm(other)
            phi, goal = g @ other / size / length, goals[i, j]
            low = phi < goal
            if low:
                up = goal * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - goal**2)
                turned[i] = g + size * up / length / np.sqrt(1 - goal**2) * other
                after = turned[i] @ other / np.linalg.norm(turned[i]) / length
                np.testing.assert_allclose(after, goal, atol=1e-9)
            if always or low:
                goals[i, j] = (1 - beta) * goal + beta * phi
    return turned.sum(0), goals


@pytest.mark.parametrize(
    ("options", "beta", "always"),
    [
        ({}, 0.01, True),
        ({"beta": 0.5}, 0.5, True),
        ({"beta": 0.5, "update_always": False}, 0.5, False),
    ],
)
def test_eight_steps_against_the_rule_in_parameter_space(options, beta, always):
    rng = np.random.default_rng(1)
    goals, state = np.zeros((3, 3)), None
    for _ in range(8):
        matrix = (rng.normal(size=(3, 4)) + 0.5).astype(np.float32)
        expected, goals = vaccine(matrix.astype(np.float64), goals, beta, always)
        update, _, state = step(natural(**options), matrix, state=state)
        np.testing.assert_allclose(update, expected, atol=1e-4)
        np.testing.assert_allclose(state.targets, goals, atol=1e-5)


def test_beta_zero_is_pcgrad_with_the_same_key():
    vac = mtljax.gradvac(3, key=KEY, beta=0.0)
    surgery = mtljax.pcgrad(3, key=KEY)
    matrix = np.array([[1.0, 0.2, -0.5], [-1.2, 1.0, 0.1], [-0.3, -0.9, 1.0]])
    left, right = None, None
    seen = set()
    for _ in range(6):
        got, _, left = step(vac, matrix, state=left)
        expected, _, right = step(surgery, matrix, state=right)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        seen.add(tuple(np.round(got, 3)))
    assert len(seen) > 1  # the orders matter here


def test_targets_of_absent_and_of_zero_gradients_stay():
    state = step(natural(beta=0.5), J3).state
    before = np.asarray(state.targets)
    mask = np.array([True, False, True])
    after = np.asarray(step(natural(beta=0.5), J3[::-1], state=state, mask=mask)[2][1])
    changed = np.zeros((3, 3), bool)
    changed[0, 2] = changed[2, 0] = True
    np.testing.assert_array_equal(after != before, changed)
    zero = np.vstack([J3[2], 0 * J3[1], J3[0]])
    again = np.asarray(step(natural(beta=0.5), zero, state=state)[2][1])
    np.testing.assert_array_equal(again, after)


def test_parallel_gradients_stay_finite_when_the_target_reaches_one():
    state = None
    for _ in range(3):
        _, _, state = step(natural(beta=1.0), np.repeat(J3[:1], 3, 0), state=state)
    update, _, _ = step(natural(beta=1.0), J3, state=state)
    assert np.isfinite(update).all()


@pytest.mark.usefixtures("as_users")
def test_errors():
    for beta in (-0.1, 1.5, float("nan")):
        with pytest.raises(
            ValueError,
            match=r"gradvac: beta must be a finite number at least 0 and at most 1",
        ):
            mtljax.gradvac(2, key=KEY, beta=beta)
    with pytest.raises(ValueError, match="order='sorted' is not one of"):
        mtljax.gradvac(2, key=KEY, order="sorted")
