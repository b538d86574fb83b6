"""The pseudo-inverse against numpy, and the share it cannot reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import solvers

solve = jax.jit(jax.vmap(solvers.pinv_solve))


@pytest.mark.parametrize("rank", [7, 3])
def test_against_numpy(rank):
    rng = np.random.default_rng(rank)
    rows = rng.normal(size=(50, 7, rank))
    matrices = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    vectors = rng.normal(size=(50, 7)).astype(np.float32)
    if rank == 7:  # a well-posed batch; float32 eigenvalues know no better
        matrices += 0.5 * np.eye(7, dtype=np.float32)[None]
    got, outside = solve(matrices, vectors)
    inverse = np.linalg.pinv(matrices.astype(np.float64), rcond=1e-5, hermitian=True)
    expected = np.einsum("bij,bj->bi", inverse, vectors)
    scale = np.abs(expected).max(1, keepdims=True)
    np.testing.assert_allclose(got / scale, expected / scale, atol=2e-3)
    reached = np.einsum("bij,bj->bi", matrices.astype(np.float64), expected)
    lost = np.linalg.norm(vectors - reached, axis=1) / np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(outside, lost, atol=1e-3)


def test_rows_of_zeros_drop_out():
    matrix = jnp.array([[2.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    x, outside = solvers.pinv_solve(matrix, jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(x, [1 / 3, 0, 1 / 3], atol=1e-6)
    assert outside < 1e-6
    x, outside = solvers.pinv_solve(jnp.zeros((2, 2)), jnp.ones(2))
    np.testing.assert_array_equal(x, np.zeros(2))
    np.testing.assert_allclose(outside, 1)
