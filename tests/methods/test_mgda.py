"""MGDA: golden values, the two-task formula, normalisations, stationary points."""

import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3, LOSSES3

import mtljax

PAIR, PAIR_MASK = padded(J2)
NORMALISED = [0.482901, 0.486693, 0.030406]


def test_golden():
    got = step(make(mtljax.mgda, 3), J3)
    np.testing.assert_allclose(got.weights, [0.592593, 0.407407, 0], atol=1e-5)
    np.testing.assert_allclose(
        got.update, [0.777778, 0.62963, 0.407407, 0.592593], atol=1e-5
    )
    assert got.state.solver.converged
    got = step(make(mtljax.mgda, 3), PAIR, mask=PAIR_MASK)
    np.testing.assert_allclose(got.weights, [0.6, 0.4, 0], atol=1e-5)
    np.testing.assert_allclose(got.update, [0, 1, 1, 0], atol=1e-5)


def test_golden_l2():
    balancer = make(mtljax.mgda, 3, normalize="l2")
    got = step(balancer, J3)
    np.testing.assert_allclose(got.weights, NORMALISED, atol=1e-5)
    np.testing.assert_allclose(
        got.update, [0.479109, 1.007584, 0.425882, 0.604524], atol=1e-5
    )
    got = step(balancer, PAIR, mask=PAIR_MASK)
    np.testing.assert_allclose(got.weights, [0.5, 0.5, 0], atol=1e-5)
    np.testing.assert_allclose(got.update, [1, 1, 1, 0], atol=1e-5)
    got = step(make(mtljax.mgda, 3, normalize="l2", apply_to="normalized"), J3)
    update = [0.247544, 0.249722, 0.133473, 0.223684]
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    lengths = np.linalg.norm(J3, axis=1)
    np.testing.assert_allclose(got.weights, NORMALISED / lengths, atol=1e-5)


def test_two_tasks_closed_form():
    pairs = random_pairs()
    g, h = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
    share = ((h - g) * h).sum(1) / ((h - g) ** 2).sum(1)
    share = np.clip(share, 0, 1)[:, None]
    assert 0.1 < np.mean((share > 0) & (share < 1)) < 0.9  # both sorts are met
    got = steps(make(mtljax.mgda, 2), pairs)
    np.testing.assert_allclose(got.weights, np.hstack([share, 1 - share]), atol=1e-5)


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_loss_normalisations_are_mgda_on_divided_rows(normalize):
    divisor = LOSSES3 * (np.linalg.norm(J3, axis=1) if normalize == "loss+" else 1)
    plain = step(make(mtljax.mgda, 3), J3 / divisor[:, None])
    raw = step(make(mtljax.mgda, 3, normalize=normalize), J3)
    np.testing.assert_allclose(raw.weights, plain.weights, atol=1e-5)
    np.testing.assert_allclose(raw.update, plain.weights @ J3, atol=1e-5)
    divided = step(make(mtljax.mgda, 3, normalize=normalize, apply_to="normalized"), J3)
    np.testing.assert_allclose(divided.update, plain.update, atol=1e-5)


def test_every_task_of_the_face_gains_the_square_of_the_length():
    update, weights, _ = step(make(mtljax.mgda, 3), J3)
    gains = J3 @ update
    np.testing.assert_allclose(gains[weights > 0], update @ update, rtol=1e-5)
    assert gains[2] > update @ update


def test_zero_at_a_stationary_point():
    matrix = np.vstack([J3[:2], -(0.5 * J3[0] + 2.0 * J3[1])])
    update, weights, _ = step(make(mtljax.mgda, 3), matrix)
    np.testing.assert_allclose(weights, np.array([0.5, 2, 1]) / 3.5, atol=1e-4)
    np.testing.assert_allclose(update, 0, atol=1e-4)


def test_the_shortest_of_parallel_gradients_wins():
    matrix = np.outer([3.0, 1.0, 2.0], J3[0])
    _, weights, _ = step(make(mtljax.mgda, 3), matrix)
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="normalize='l1' is not one of 'none', 'l2'"):
        mtljax.mgda(2, normalize="l1")
    with pytest.raises(ValueError, match="apply_to='both' is not one of"):
        mtljax.mgda(2, apply_to="both")
    balancer = mtljax.mgda(2, normalize="loss")
    with pytest.raises(ValueError, match="mgda reads the task losses"):
        balancer.update({"w": jnp.eye(2)}, balancer.init({}))
