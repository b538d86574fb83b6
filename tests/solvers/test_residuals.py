"""Optimality of 2,000 solutions per solver, computed in float64 from float32 answers.

Gramians of T = 2, 3, 11, 40 and 128 tasks, half of them rank deficient, of gradients
whose scale runs over 1e-6 ... 1e6, and whose lengths differ by up to twelve decades
among the tasks of one problem. A residual is relative to the terms that are added up in
the condition it violates: what rounding can tell.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import solvers

COUNTS = {2: 600, 3: 600, 11: 500, 40: 240, 128: 60}
BOUND = 1e-5

pytestmark = pytest.mark.deep


def test_there_are_2000():
    assert sum(COUNTS.values()) == 2000


@functools.cache
def family(tasks):
    """Gramians ``[n, T, T]`` in float32; every second is of deficient rank."""
    rng = np.random.default_rng([2026, tasks])
    found = np.empty((COUNTS[tasks], tasks, tasks), np.float32)
    for k in range(len(found)):
        dim = int(rng.choice([tasks + 8, 4 * tasks]))
        if k % 2:
            dim = int(rng.integers(1, tasks))
        rows = rng.normal(size=(tasks, dim))
        rows += rng.choice([0, 0.5, 1.0]) * rng.normal(size=(1, dim))
        spread = rng.choice([0, 1, 3, 6])
        rows *= 10.0 ** rng.uniform(-spread, spread, (tasks, 1))
        rows *= 10.0 ** rng.uniform(-6, 6)
        found[k] = rows @ rows.T
    return found


def each(tasks):
    return pytest.mark.parametrize("tasks", tasks)


def solve(function, *arrays):
    return jax.jit(jax.vmap(function))(*map(jnp.asarray, arrays))


def times(matrix, vector):
    return np.einsum("bij,bj->bi", matrix, vector)


def lengths(gramians):
    return np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))


@each(COUNTS)
def test_simplex_projection(tasks):
    rng = np.random.default_rng(5)
    gramians = family(tasks)
    norms = lengths(gramians)
    points = gramians[:, 0] / (norms[:, :1] * norms)
    points = (points * 10.0 ** rng.uniform(-6, 6, (len(points), 1))).astype(np.float32)
    found = np.asarray(solve(solvers.project_simplex, points), np.float64)
    points = points.astype(np.float64)
    low, high = points.max(1) - 1, points.max(1)
    for _ in range(100):  # bisection on the threshold
        middle = (low + high) / 2
        above = np.maximum(points - middle[:, None], 0).sum(1) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    wanted = np.maximum(points - low[:, None], 0)
    assert np.abs(found - wanted).max() <= BOUND


@each(COUNTS)
def test_min_norm_point(tasks):
    gramians = family(tasks)
    weights, status = solve(solvers.min_norm_point, gramians)
    weights, gramians = np.asarray(weights, np.float64), gramians.astype(np.float64)
    slope, terms = times(gramians, weights), times(np.abs(gramians), weights)
    level = (weights * slope).sum(1, keepdims=True)
    size = terms + (weights * terms).sum(1, keepdims=True)
    short = np.maximum(level - slope, 0)
    wrong = np.where(weights > 0, np.abs(slope - level), short)
    assert (wrong / size).max() <= BOUND
    np.testing.assert_allclose(weights.sum(1), 1, atol=BOUND)
    assert np.asarray(status.converged).all()


def cone_residual(gramians, lower, found):
    """Of the KKT conditions of ``min_{v >= lower} vᵀGv``."""
    gramians = gramians.astype(np.float64)
    lower, found = lower.astype(np.float64), np.asarray(found, np.float64)
    slope = times(gramians, found)
    terms = times(np.abs(gramians), np.abs(lower) + (found - lower))
    wrong = np.where(found > lower, np.abs(slope), np.maximum(-slope, 0))
    return (wrong / terms).max()


@each(COUNTS)
def test_cone_projections_of_dualproj_upgrad_and_any_vector(tasks):
    gramians = family(tasks)
    count = len(gramians)
    norms = lengths(gramians)
    rng = np.random.default_rng(7)
    scale = np.sqrt(norms.max(1) * norms.min(1))[:, None]
    mean = np.full((count, tasks), 1 / tasks, np.float32)
    free = (rng.normal(size=(count, tasks)) / norms * scale).astype(np.float32)
    corner = np.eye(tasks, dtype=np.float32)[rng.integers(0, tasks, count)]
    for lower in (mean, free, corner):
        found, status = solve(solvers.project_cone, gramians, lower)
        assert cone_residual(gramians, lower, found) <= BOUND
        assert np.asarray(status.converged).all()


@each(COUNTS)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5])
def test_bargaining_of_nash_and_fairgrad(tasks, alpha):
    gramians = family(tasks)
    weights, status = solve(lambda g: solvers.solve_bargaining(g, alpha), gramians)
    solved = np.asarray(status.converged)
    weights, gramians = np.asarray(weights, np.float64), gramians.astype(np.float64)
    assert np.isfinite(weights).all()
    weights, gramians_solved = weights[solved], gramians[solved]
    force = weights ** (-1 / alpha)
    slope = times(gramians_solved, weights)
    terms = times(np.abs(gramians_solved), weights) + force
    assert (np.abs(slope - force) / terms).max() <= BOUND
    # What has no solution says so: Pareto-stationary inputs, none of full rank.
    assert solved[::2].all()
    assert solved.mean() >= 0.75


@each(COUNTS)
@pytest.mark.parametrize("c", [0.4, 1.5])
def test_max_min_in_the_ball_of_cagrad(tasks, c):
    """No task gains less than a bound of the dual problem, and the ball is kept."""
    gramians = family(tasks)
    mean = np.full(tasks, 1 / tasks, np.float32)

    def run(gramian):
        square = mean @ jnp.matmul(gramian, mean, precision="highest")
        radius = c * jnp.sqrt(jnp.maximum(square, 0))
        weights, status = solvers.max_min_in_ball(gramian, jnp.asarray(mean), radius)
        units = jnp.sqrt(jnp.diagonal(gramian))
        cosines = gramian / units[:, None] / units[None, :]
        return weights, radius, status, solvers.min_norm_point(cosines)[0]

    found, radius, status, nearest = solve(run, gramians)
    found, radius, nearest = (
        np.asarray(a, np.float64) for a in (found, radius, nearest)
    )
    gramians = gramians.astype(np.float64)
    norms = lengths(gramians)
    center = np.broadcast_to(mean.astype(np.float64), found.shape)
    at_center, slope = times(gramians, center), times(gramians, center + found)
    rounding = 4 * np.finfo(np.float32).eps

    def bound(s):  # weak duality, at any s >= 0, less what rounding of G adds to it
        square = (s * times(gramians, s)).sum(1) - rounding * (s * norms).sum(1) ** 2
        line = (s * at_center).sum(1)
        line -= rounding * (s * norms).sum(1) * (center * norms).sum(1)
        gain = line + radius * np.sqrt(np.maximum(square, 0))
        return gain / s.sum(1)

    top = found.max(1, keepdims=True)
    nearest = nearest / norms
    nearest /= nearest.max(1, keepdims=True)
    shares = np.where(top > 0, found / np.where(top > 0, top, 1), nearest)
    best = np.minimum(bound(shares), bound(nearest))[:, None]
    reach = np.sqrt(np.maximum((center * at_center).sum(1), 0)) + radius
    terms = times(np.abs(gramians), center + found) + norms * reach[:, None]
    missed = (np.maximum(best - slope, 0) / terms).max(1)
    square = (found * times(gramians, found)).sum(1)
    outside = np.maximum(square - radius**2, 0)
    outside = outside / ((found * norms).sum(1) ** 2 + radius**2)
    assert np.maximum(missed, outside).max() <= BOUND
    assert np.asarray(status.converged).all()
