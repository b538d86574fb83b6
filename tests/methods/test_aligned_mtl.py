"""Aligned-MTL: golden values, the polar factor, dropped ranks, the cone."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, padded, step, steps
from zoo import J2, J3

import mtljax


@pytest.mark.parametrize(
    ("condition", "two", "three"),
    [
        ("min", [0.559072, 0.408261], [0.328542, 0.25645, 0.068976]),
        ("median", [0.559072, 0.408261], [0.794256, 0.619973, 0.16675]),
        ("rmse", [1.510866, 1.103306], [0.754875, 0.589233, 0.158483]),
    ],
)
def test_golden(condition, two, three):
    balancer = make(mtljax.aligned_mtl, 3, condition=condition, scale="mean")
    got = step(balancer, J3)
    np.testing.assert_allclose(got.weights, three, atol=1e-5)
    assert got.state.solver.converged
    matrix, mask = padded(J2)
    got = step(balancer, matrix, mask=mask)
    np.testing.assert_allclose(got.weights, [*two, 0], atol=1e-5)
    assert got.state.solver.converged


def test_default_adds_up_where_torchjd_averages():
    got = step(make(mtljax.aligned_mtl, 3), J3)
    expected = 3 * np.array([0.400634, 0.509785, 0.118499, 0.604446])
    np.testing.assert_allclose(got.update, expected, atol=1e-5)
    matrix, mask = padded(J2)
    got = step(make(mtljax.aligned_mtl, 3), matrix, mask=mask)
    expected = 2 * np.array([0.213279, 0.967333, 0.967333, 0])
    np.testing.assert_allclose(got.update, expected, atol=1e-5)


def test_the_rows_are_replaced_by_the_polar_factor():
    """``J = UΣWᵀ`` becomes ``√s UWᵀ``, whose rows preference adds up."""
    matrices = np.random.default_rng(0).normal(size=(20, 4, 9)).astype(np.float32)
    p = np.array([1.0, 0.5, 2.5, 0.0])  # sums to T
    left, sizes, right = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    expected = sizes[:, -1:] * np.einsum("i,bij,bjd->bd", p, left, right)
    got = steps(make(mtljax.aligned_mtl, 4, preference=tuple(p)), matrices)
    np.testing.assert_allclose(got.update, expected, atol=2e-5)
    balancer = mtljax.aligned_mtl(4)
    grads = {"w": jnp.asarray(matrices[0])}
    side = jnp.asarray(p, jnp.float32)
    update, _ = balancer.update(grads, balancer.init(grads), preference=side)
    np.testing.assert_allclose(update["w"], expected[0], atol=2e-5)


def test_cone_stops_the_harm_to_a_weak_task():
    # Gramian [[100, -9], [-9, 1]], the specification's example.
    matrix = np.array([[10.0, 0.0], [-0.9, np.sqrt(0.19)]])
    plain = step(make(mtljax.aligned_mtl, 2), matrix).update
    np.testing.assert_allclose(matrix @ plain, [3.95, -0.15], atol=5e-3)
    guarded = step(make(mtljax.aligned_mtl, 2, cone=True), matrix)
    # The weak task's component is all that is taken out.
    weak = matrix[1] / np.linalg.norm(matrix[1])
    np.testing.assert_allclose(guarded.update, plain - plain @ weak * weak, atol=1e-5)
    assert guarded.state.solver.converged
    harmless = step(make(mtljax.aligned_mtl, 3, cone=True), J3)
    np.testing.assert_allclose(
        harmless.update, step(make(mtljax.aligned_mtl, 3), J3).update, rtol=1e-6
    )


def test_a_dropped_rank_is_declared():
    copies = np.vstack([J3[0], J3[0], J3[1]])
    update, weights, state = step(make(mtljax.aligned_mtl, 3), copies)
    assert not state.solver.converged
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4)
    left, sizes, right = np.linalg.svd(copies, full_matrices=False)
    expected = sizes[1] * np.ones(3) @ left[:, :2] @ right[:2]
    np.testing.assert_allclose(update, expected, atol=1e-4)
    update, weights, state = step(make(mtljax.aligned_mtl, 3), np.zeros((3, 4)))
    np.testing.assert_array_equal(update, np.zeros(4))
    np.testing.assert_array_equal(weights, np.ones(3))
    assert not state.solver.converged


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="condition='max' is not one of 'min'"):
        mtljax.aligned_mtl(2, condition="max")
    with pytest.raises(ValueError, match="aligned_mtl: preference must be"):
        mtljax.aligned_mtl(2, preference=[1.0, -2.0])
