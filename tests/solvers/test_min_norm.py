"""The min-norm point against enumeration of all faces, and its certificate."""

import functools

import jax
import numpy as np
import pytest
from solvers import problems

from mtljax import solvers


@functools.cache
def solver():
    return jax.jit(jax.vmap(solvers.min_norm_point))


def run(gramians, masks=None):
    masks = np.ones(gramians.shape[:2], bool) if masks is None else masks
    weights, status = solver()(gramians, masks)
    return np.asarray(weights, np.float64), status


def certificate(gramian, weights):
    """``wᵀGw − min_i (Gw)_i`` over the terms added up, in float64."""
    slope = gramian.astype(np.float64) @ weights
    terms = (np.abs(gramian) @ weights).max()
    return (weights @ slope - slope.min()) / terms


@pytest.mark.parametrize("tasks", problems.SIZES)
def test_certificate(tasks):
    gramians = problems.gramians(tasks, 100)
    weights, status = run(gramians)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert max(map(certificate, gramians, weights)) < 1e-5
    assert status.converged.all()
    assert (status.residual < 1e-5).all()


@pytest.mark.parametrize("tasks", [2, 3])
def test_against_all_faces(tasks):
    gramians = problems.gramians(tasks, 100)
    expected = [problems.min_norm(g.astype(np.float64)) for g in gramians]
    np.testing.assert_allclose(run(gramians)[0], expected, atol=2e-4)


def test_against_all_faces_of_six_among_eleven():
    gramians = problems.gramians(11, 100)
    masks = np.broadcast_to(np.arange(11) < 6, (100, 11))
    got = run(gramians, masks)[0]
    assert (got[:, 6:] == 0).all()
    expected = [problems.min_norm(g[:6, :6].astype(np.float64)) for g in gramians[:8]]
    np.testing.assert_allclose(got[:8, :6], expected, atol=2e-4)


def test_stationary_and_rank_deficient():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(100, 10, 3))
    convex = rng.uniform(0.5, 2, size=(100, 10, 1))
    rows = np.concatenate([rows, -(convex * rows).sum(1, keepdims=True)], 1)
    gramians = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    weights, _ = run(gramians)
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    # The length of the answer vanishes up to the rounding of the Gramian.
    squares = np.einsum("bi,bij,bj->b", weights, gramians.astype(np.float64), weights)
    assert (squares / np.trace(gramians, axis1=1, axis2=2) < 1e-5).all()


def test_a_zero_gradient_takes_everything():
    gramians = problems.gramians(3, 100)
    gramians[:, 1, :] = gramians[:, :, 1] = 0
    weights, _ = run(gramians)
    np.testing.assert_allclose(weights, np.eye(3)[[1] * 100], atol=1e-5)


def test_empty_mask():
    weights, status = run(problems.gramians(3, 100), np.zeros((100, 3), bool))
    np.testing.assert_array_equal(weights, np.zeros((100, 3)))
    assert (status.residual == 0).all()
