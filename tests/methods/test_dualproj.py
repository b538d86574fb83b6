"""DualProj: golden values, the conditions of the projection, GEM's closed form."""

import numpy as np
import pytest
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3

import mtljax


def test_golden():
    got = step(make(mtljax.dualproj, 3), J3)  # the mean hurts nobody
    np.testing.assert_allclose(got.weights, np.full(3, 1 / 3), rtol=1e-6)
    matrix, mask = padded(J2)
    got = step(make(mtljax.dualproj, 3), matrix, mask=mask)
    np.testing.assert_allclose(got.weights, [0.611111, 0.5, 0], atol=1e-5)
    np.testing.assert_allclose(got.update, [0.555556, 1.111111, 1.111111, 0], atol=1e-5)
    assert got.state.solver.converged


def test_the_update_is_the_projection_of_the_mean():
    matrices = np.random.default_rng(0).normal(size=(50, 5, 8)).astype(np.float32)
    matrices *= np.array([0.1, 1, 1, 3, 10], np.float32)[None, :, None]
    got = steps(make(mtljax.dualproj, 5), matrices)
    for matrix, update, weights in zip(matrices, got.update, got.weights, strict=True):
        rows = matrix.astype(np.float64)
        gains = rows @ update
        size = np.linalg.norm(rows, axis=1) * np.linalg.norm(update)
        added = weights - 0.2
        assert (gains >= -1e-5 * size).all()
        assert (added >= -1e-7).all()
        assert (added * gains <= 1e-4 * np.maximum(added, 1) * size).all()
        np.testing.assert_allclose(update, weights @ rows, atol=1e-4)
    assert (got.weights > 0.21).any()


def test_one_hot_preference_is_gem_with_one_memory():
    """``g`` where ``<g, m> ≥ 0``, else ``g − <g, m>/‖m‖² m``."""
    pairs = random_pairs()
    g, m = pairs.astype(np.float64).swapaxes(0, 1)
    dot = (g * m).sum(1, keepdims=True)
    expected = g - np.minimum(dot, 0) / (m * m).sum(1, keepdims=True) * m
    got = steps(make(mtljax.dualproj, 2, preference=(1.0, 0.0)), pairs)
    scale = np.linalg.norm(g, axis=1, keepdims=True)
    np.testing.assert_allclose(got.update / scale, expected / scale, atol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match=r"dualproj: preference has shape \(1,\)"):
        mtljax.dualproj(3, preference=[1.0])
    with pytest.raises(ValueError, match="dualproj: preference must be finite"):
        mtljax.dualproj(2, preference=[float("nan"), 1.0])
