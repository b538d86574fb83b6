"""The bargaining equation: its residual in float64 is the whole truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from solvers import problems

from mtljax import solvers


@functools.cache
def solver(alpha):
    def solve(gramian, mask):
        return solvers.solve_bargaining(gramian, alpha, mask)

    return jax.jit(jax.vmap(solve))


def run(gramians, alpha=1.0, masks=None):
    masks = np.ones(gramians.shape[:2], bool) if masks is None else masks
    weights, status = solver(alpha)(gramians, masks)
    return np.asarray(weights, np.float64), status


def residuals(gramians, weights, alpha):
    slope = np.einsum("bij,bj->bi", gramians.astype(np.float64), weights)
    return np.abs(weights ** (1 / alpha) * slope - 1).max(1)


@pytest.mark.parametrize("tasks", problems.SIZES)
def test_nash(tasks):
    gramians = problems.gramians(tasks, 100)
    weights, status = run(gramians)
    assert (weights > 0).all()
    assert residuals(gramians, weights, 1.0).max() < 1e-5
    assert status.converged.all()
    assert status.iterations.max() < 45
    # wᵀGw = T for every set of gradients.
    squares = np.einsum("bi,bij,bj->b", weights, gramians.astype(np.float64), weights)
    np.testing.assert_allclose(squares, tasks, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.5, 1e-4), (2.0, 1e-5)])
def test_other_powers(alpha, tolerance):
    gramians = problems.gramians(11, 100)
    weights, status = run(gramians, alpha)
    assert residuals(gramians, weights, alpha).max() < tolerance
    assert status.converged.all()


def test_golden_fair_gradients():
    """FairGrad's values of J2, among eleven tasks of which two are present."""
    gramians = problems.gramians(11, 100)
    gramians[:, :2, :2] = [[18, -22], [-22, 38]]
    masks = np.broadcast_to(np.arange(11) < 2, (100, 11))
    for alpha, expected in (
        (0.5, [0.742828, 0.525393]),
        (1.0, [0.591461, 0.407071]),
        (2.0, [0.471363, 0.319454]),
    ):
        got = run(gramians, alpha, masks)[0][0]
        np.testing.assert_allclose(got[:2], expected, atol=1e-5)


def test_stationary_falls_back_and_says_so():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(100, 10, 20))
    convex = rng.uniform(0.5, 2, size=(100, 10))
    last = -np.einsum("bt,btd->bd", convex, rows)[:, None]
    rows = np.concatenate([rows, last], 1)
    gramians = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    weights, status = run(gramians)
    assert not status.converged.any()
    expected = np.hstack([convex, np.ones((100, 1))])
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, atol=1e-3)


def test_zero_rows_and_masks_take_no_part():
    gramians = problems.gramians(11, 100)
    masks = np.broadcast_to(np.arange(11) < 3, (100, 11))
    zeroed = np.where(masks[:, :, None] & masks[:, None, :], gramians, 0)
    for got, status in (run(gramians, masks=masks), run(zeroed)):
        assert (got[:, 3:] == 0).all()
        assert residuals(gramians[:, :3, :3], got[:, :3], 1.0).max() < 1e-5
        assert status.converged.all()


def test_nothing_to_bargain_for():
    weights, _ = run(np.zeros((100, 11, 11), np.float32))
    np.testing.assert_array_equal(weights, np.zeros((100, 11)))


# Gradients whose norms differ by six orders of magnitude. The second weight is below
# the range of float32.
SPREAD = np.array(
    [
        [8.7889e-4, -6.15833, -8.23042e-5],
        [-6.15833, 702768.956, 2.737999],
        [-8.23042e-5, 2.737999, 8.494278e-5],
    ]
)


def test_a_weight_below_the_range_of_float32_is_zero():
    weights, status = run(np.float32(SPREAD)[None], 10.0)
    np.testing.assert_allclose(weights[0, [0, 2]], [1127.5, 6023.0], rtol=1e-4)
    assert weights[0, 1] == 0
    assert status.converged.all()
    with enable_x64():
        weights, _ = solvers.solve_bargaining(jnp.asarray(SPREAD), 10.0)
        np.testing.assert_allclose(weights, [1127.47, 1.589e-40, 6022.97], rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 10.0, 30.0])
def test_spread_norms_in_float64(alpha):
    """The equation itself, whose solution is unique."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(300, 3, 8)) * 10.0 ** rng.uniform(-3, 3, (300, 3, 1))
    gramians = rows @ rows.swapaxes(1, 2)
    with enable_x64():
        solve = jax.jit(jax.vmap(lambda g: solvers.solve_bargaining(g, alpha)))
        weights, status = jax.tree.map(np.asarray, solve(gramians))
    assert status.converged.all()
    assert status.iterations.max() <= 25
    gains = np.einsum("bij,bj->bi", gramians, weights)
    representable = weights > 1e-250
    logs = np.log(np.where(representable, weights, 1)) / alpha + np.log(gains)
    np.testing.assert_allclose(np.where(representable, logs, 0), 0, atol=1e-8)
    solve = jax.jit(jax.vmap(lambda g: solvers.solve_bargaining(g, alpha)))
    narrow, status = solve(gramians.astype(np.float32))
    assert status.converged.all()
    # The direction, which no weight below the range of float32 has a part in.
    wide = np.einsum("bi,bid->bd", weights, rows)
    error = np.einsum("bi,bid->bd", np.asarray(narrow, np.float64), rows) - wide
    error = np.linalg.norm(error, axis=1) / np.linalg.norm(wide, axis=1)
    assert np.median(error) < 1e-5
    assert error.max() < 0.1


def test_a_traced_power_is_a_constant_one():
    gramians = problems.gramians(3, 4)
    alphas = np.array([0.5, 1.0, 2.0, 10.0], np.float32)
    together, _ = jax.jit(jax.vmap(solvers.solve_bargaining))(gramians, alphas)
    for gramian, alpha, found in zip(gramians, alphas, together, strict=True):
        alone, _ = solvers.solve_bargaining(jnp.asarray(gramian), float(alpha))
        np.testing.assert_allclose(found, alone, rtol=1e-4)
