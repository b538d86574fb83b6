"""The best worst-case step in a ball: duality gap in float64, and SLSQP."""

import functools

import jax
import numpy as np
import pytest
from solvers import problems

from mtljax import solvers


@functools.cache
def solver():
    return jax.jit(jax.vmap(solvers.max_min_in_ball))


def run(gramians, share, masks=None):
    """Radius ``share`` times the length of the centre, as CAGrad has it."""
    masks = np.ones(gramians.shape[:2], bool) if masks is None else masks
    centers = (masks / masks.sum(1, keepdims=True)).astype(np.float32)
    square = np.einsum("bi,bij,bj->b", centers, gramians.astype(np.float64), centers)
    radii = (share * np.sqrt(square)).astype(np.float32)
    extra, status = solver()(gramians, centers, radii, masks)
    return centers, radii, np.asarray(extra, np.float64), status


def gap(gramian, center, radius, extra):
    """Upper minus lower bound of the optimum over its terms; and the radius used."""
    gramian = gramian.astype(np.float64)
    root = np.sqrt(gramian.diagonal().max())
    worst = (gramian @ (center + extra)).min()
    length = np.sqrt(extra @ gramian @ extra)
    simplex = extra / extra.sum()
    bound = simplex @ gramian @ center
    bound += radius * np.sqrt(simplex @ gramian @ simplex)
    scale = root * (np.sqrt(center @ gramian @ center) + radius)
    return (bound - worst) / scale, length / radius


@pytest.mark.parametrize("tasks", problems.SIZES)
def test_duality_gap_closes(tasks):
    gramians = problems.gramians(tasks, 100)
    for share in (0.4, 1.5):
        *problem, status = run(gramians, share)
        assert (problem[2] >= 0).all()
        gaps, lengths = zip(*map(gap, gramians, *problem), strict=True)
        assert np.max(np.abs(gaps)) < 1e-5
        np.testing.assert_allclose(lengths, 1, atol=2e-3)
        assert np.max(lengths) < 1 + 1e-4
        assert status.converged.all()


def test_against_slsqp():
    gramians = problems.gramians(3, 100, spread=0.3)
    centers, radii, extra, _ = run(gramians, 0.7)
    for i, gramian in enumerate(gramians[:15].astype(np.float64)):
        expected = problems.ball_value(gramian, centers[i], radii[i])
        got = (gramian @ (centers[i] + extra[i])).min()
        assert abs(got - expected) < 1e-5 * gramian.diagonal().max()


def test_radius_zero_is_the_centre():
    extra = run(problems.gramians(3, 100), 0.0)[2]
    np.testing.assert_array_equal(extra, np.zeros((100, 3)))


def test_where_no_direction_helps_all_the_cone_is_reached():
    """Rows ±a and b: the best worst case is 0, on the line orthogonal to a."""
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    rows = np.array([a, -2 * a, a + 0.5 * b])
    gramian = (rows @ rows.T).astype(np.float32)
    centers, _, extra, _ = run(np.repeat(gramian[None], 100, 0), 20.0)
    step = (centers[0] + extra[0]) @ rows
    np.testing.assert_allclose(step, [0, 0.5 / 3], atol=2e-4)


def test_rank_deficient_stays_finite_and_inside():
    gramians = problems.gramians(11, 100, dim=3)
    _, radii, extra, _ = run(gramians, 0.5)
    assert np.isfinite(extra).all()
    squares = np.einsum("bi,bij,bj->b", extra, gramians.astype(np.float64), extra)
    assert (squares <= radii**2 * (1 + 1e-3)).all()


def test_masked_tasks_do_not_exist():
    gramians = problems.gramians(11, 100)
    masks = np.broadcast_to(np.arange(11) < 3, (100, 11))
    masked = run(gramians, 0.4, masks)[2]
    small = run(np.ascontiguousarray(gramians[:, :3, :3]), 0.4)[2]
    assert (masked[:, 3:] == 0).all()
    scale = np.abs(small).max(1, keepdims=True)
    np.testing.assert_allclose(masked[:, :3] / scale, small / scale, atol=2e-3)
