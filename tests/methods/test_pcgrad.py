"""PCGrad: golden values, and its expectation over all orders by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import random_pairs, step, steps
from zoo import J2, J3

import mtljax

KEY = jax.random.key(0)
# Every projection creates or removes a conflict, so the orders matter.
TANGLED = np.array([[1.0, 0.2, -0.5], [-1.2, 1.0, 0.1], [-0.3, -0.9, 1.0]])


def projected(matrix, task, order):
    """Algorithm 1 for one task, in parameter space."""
    g = matrix[task].copy()
    for other in order:
        dot = g @ matrix[other]
        if other != task and dot < 0:
            g -= dot / (matrix[other] @ matrix[other]) * matrix[other]
    return g


def outcomes(matrix):
    """Per task, what each order of the others leads to."""
    tasks = range(len(matrix))
    return [
        np.array(
            [
                projected(matrix, task, order)
                for order in itertools.permutations([i for i in tasks if i != task])
            ]
        )
        for task in tasks
    ]


@pytest.mark.parametrize(
    ("matrix", "update"),
    [
        (J2, [0.584795, 3.80117, 3.80117]),
        (J3, [2.212121, 3.530303, -0.545455, 5.833333]),
    ],
)
def test_golden_natural_order(matrix, update):
    got = step(mtljax.pcgrad(len(matrix), key=KEY, order="fixed"), matrix)
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    np.testing.assert_allclose(got.weights @ matrix, update, atol=1e-5)


def test_fixed_order_in_parameter_space():
    # A gradient that met itself here, after its edits, would be edited once more.
    matrix = np.random.default_rng(15).normal(size=(5, 3))
    got = step(mtljax.pcgrad(5, key=KEY, order="fixed"), matrix)
    expected = sum(projected(matrix, task, range(5)) for task in range(5))
    np.testing.assert_allclose(got.update, expected, rtol=1e-4, atol=1e-5)


def test_two_tasks_closed_form():
    pairs = random_pairs()
    g, h = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
    dot = np.minimum((g * h).sum(1, keepdims=True), 0)
    expected = g + h - dot / (h**2).sum(1)[:, None] * h
    expected -= dot / (g**2).sum(1)[:, None] * g
    got = steps(mtljax.pcgrad(2, key=KEY), pairs)
    scale = np.abs(pairs).max((1, 2))[:, None]
    np.testing.assert_allclose(got.update / scale, expected / scale, atol=2e-5)


def test_without_conflict_it_is_the_sum():
    matrix = np.abs(J3)
    update, weights, _ = step(mtljax.pcgrad(3, key=KEY), matrix)
    np.testing.assert_array_equal(weights, np.ones(3))
    np.testing.assert_allclose(update, matrix.sum(0), rtol=1e-6)


@jax.jit
@jax.vmap
def draw(key):
    balancer = mtljax.pcgrad(3, key=key)
    grads = jnp.asarray(TANGLED, jnp.float32)
    relabelled = grads[jnp.array([2, 0, 1])]
    return tuple(
        balancer.update({"w": g}, balancer.init({}))[0]["w"]
        for g in (grads, relabelled)
    )


def test_random_order_in_distribution():
    """Uniform and independent over the orders of each task; labels do not matter."""
    possible = outcomes(TANGLED)
    assert all(np.abs(pair[0] - pair[1]).max() > 0.05 for pair in possible)
    plain, relabelled = draw(jax.random.split(jax.random.key(1), 2000))
    sums = np.array([sum(choice) for choice in itertools.product(*possible)])
    for drawn in (plain, relabelled):
        distance = np.abs(np.asarray(drawn)[:, None] - sums[None]).max(-1)
        assert (distance.min(1) < 1e-4).all()
        counts = np.bincount(distance.argmin(1), minlength=8)
        # 250 each, with a standard deviation of 15: independent between tasks.
        assert (np.abs(counts - 250) < 75).all()
        expected = sum(pair.mean(0) for pair in possible)
        np.testing.assert_allclose(drawn.mean(0), expected, atol=0.05)


def test_every_step_draws_anew_and_a_key_repeats():
    balancer = mtljax.pcgrad(3, key=KEY)
    updates, state = [], None
    for _ in range(12):
        update, _, state = step(balancer, TANGLED, state=state)
        updates.append(update)
    assert len({tuple(np.round(u, 4)) for u in updates}) > 2
    np.testing.assert_array_equal(step(balancer, TANGLED).update, updates[0])


def test_absent_tasks_are_not_met():
    matrix = np.vstack([J2, 50 * J2[:1]])
    got = step(mtljax.pcgrad(3, key=KEY), matrix, mask=[True, True, False])
    np.testing.assert_allclose(got.update, [0.584795, 3.80117, 3.80117], atol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(TypeError, match="key"):
        mtljax.pcgrad(2)
    with pytest.raises(ValueError, match="order='sorted' is not one of 'random'"):
        mtljax.pcgrad(2, key=KEY, order="sorted")
