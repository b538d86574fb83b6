"""IMTL-G: golden values, the paper's closed form, and the step uphill."""

import numpy as np
import pytest
from methods.stepping import make, random_pairs, step, steps
from zoo import J2, J3

import mtljax


def papers_weights(matrix):
    """α_{2:T} = g_1 Uᵀ (E Uᵀ)⁻¹ with rows E_k = g_1 − g_k, U_k = u_1 − u_k."""
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    e, u = matrix[:1] - matrix[1:], unit[:1] - unit[1:]
    rest = matrix[0] @ u.T @ np.linalg.inv(e @ u.T)
    return np.concatenate([[1 - rest.sum()], rest])


@pytest.mark.parametrize(
    ("matrix", "weights"),
    [(J2, [0.59233, 0.40767]), (J3, [0.562428, 0.418643, 0.018929])],
)
def test_golden(matrix, weights):
    got = step(make(mtljax.imtl_g, len(matrix)), matrix)
    np.testing.assert_allclose(got.weights, weights, atol=1e-5)
    np.testing.assert_allclose(papers_weights(matrix), weights, atol=1e-5)
    assert got.state.solver.converged
    if len(matrix) == 3:
        update = [0.706214, 0.712429, 0.380784, 0.638145]
        np.testing.assert_allclose(got.update, update, atol=1e-5)


def test_two_tasks_closed_form():
    pairs = random_pairs()
    lengths = np.linalg.norm(pairs.astype(np.float64), axis=2)
    expected = lengths[:, ::-1] / lengths.sum(1, keepdims=True)
    got = steps(make(mtljax.imtl_g, 2), pairs)
    np.testing.assert_allclose(got.weights, expected, rtol=1e-4)


def test_projections_are_equal_and_weights_the_papers():
    matrices = np.random.default_rng(0).normal(size=(100, 4, 6)).astype(np.float32)
    expected = np.array([papers_weights(m.astype(np.float64)) for m in matrices])
    tame = np.abs(expected).max(1) < 5  # the sum by which they are divided may vanish
    assert tame.mean() > 0.9
    got = steps(make(mtljax.imtl_g, 4), matrices)
    np.testing.assert_allclose(got.weights[tame], expected[tame], atol=2e-3)
    unit = matrices / np.linalg.norm(matrices, axis=2, keepdims=True)
    gains = np.einsum("btd,bd->bt", unit, got.update)[tame]
    np.testing.assert_allclose(gains, np.broadcast_to(gains[:, :1], gains.shape), 5e-3)


def uphill():
    """ρ12 = .1, ρ13 = ρ23 = .7 and a third gradient ten times shorter."""
    cosines = np.array([[1, 0.1, 0.7], [0.1, 1, 0.7], [0.7, 0.7, 1]])
    return np.linalg.cholesky(cosines) * np.array([[1.0], [1.0], [0.1]])


def test_the_published_rule_may_step_uphill_for_every_task():
    matrix = uphill()
    update, weights, _ = step(make(mtljax.imtl_g, 3), matrix)
    np.testing.assert_allclose(weights, [-0.125, -0.125, 1.25], atol=1e-5)
    np.testing.assert_allclose(matrix @ update, [-0.05, -0.05, -0.005], atol=1e-5)


def test_the_sign_guard_turns_it_round():
    matrix = uphill()
    update, weights, _ = step(make(mtljax.imtl_g, 3, sign_guard=True), matrix)
    # The same line, oriented downhill; |w| sums to one instead of w.
    np.testing.assert_allclose(
        weights, np.array([0.125, 0.125, -1.25]) / 1.5, atol=1e-5
    )
    np.testing.assert_allclose(
        matrix @ update, np.array([0.05, 0.05, 0.005]) / 1.5, atol=1e-5
    )
    plain = step(make(mtljax.imtl_g, 3), J3)
    guarded = step(make(mtljax.imtl_g, 3, sign_guard=True), J3)
    np.testing.assert_allclose(plain.update, guarded.update, rtol=1e-5)


def test_where_no_equal_projections_exist_the_status_says_so():
    opposed = np.vstack([J3[0], -J3[0]])
    _, weights, state = step(make(mtljax.imtl_g, 2), opposed)
    assert not state.solver.converged
    np.testing.assert_allclose(weights, [0.5, 0.5])
    lost = np.vstack([J3[0], -2 * J3[0], J3[1]])  # rows 0 and 1 exclude each other
    _, weights, state = step(make(mtljax.imtl_g, 3), lost)
    assert not state.solver.converged
    assert state.solver.residual > 0.1
    assert np.isfinite(weights).all()
    copies = np.vstack([J3[0], J3[0], J3[1]])  # dependent, and still solvable
    update, weights, state = step(make(mtljax.imtl_g, 3), copies)
    assert state.solver.converged
    gains = copies @ update / np.linalg.norm(copies, axis=1)
    np.testing.assert_allclose(gains, np.full(3, gains[0]), rtol=1e-4)


def test_a_zero_gradient_is_left_out():
    got = step(make(mtljax.imtl_g, 3), np.vstack([J2, np.zeros((1, 3))]))
    np.testing.assert_allclose(got.weights, [0.59233, 0.40767, 0], atol=1e-5)
