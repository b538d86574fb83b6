"""Gains, discrepancy, maps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from forkmerge.problem import VALIDATION, batches, initial, score, task_losses, trained

from mtljax import forkmerge

LAMBDAS = [0.0, 1 / 16, 1 / 4, 1.0]


def test_gains_and_their_kinds():
    scores = np.array([[0.6, 0.7, 0.65, 0.5], [0.6, 0.59, 0.5, 0.4]])
    gains = forkmerge.transfer_gain(scores, 0.6)
    np.testing.assert_allclose(gains, scores - 0.6, atol=1e-6)
    errors = forkmerge.transfer_gain(1 - scores, 0.4, direction="min")
    np.testing.assert_allclose(errors, gains, atol=1e-6)
    found = forkmerge.negative_transfer(gains, LAMBDAS)
    np.testing.assert_array_equal(found.strong, [False, True])
    np.testing.assert_array_equal(
        found.weak, [[False, False, False, True], [False, True, True, True]]
    )
    np.testing.assert_allclose(found.best_gain, [0.1, -0.01], atol=1e-6)
    np.testing.assert_allclose(found.best_weight, [1 / 16, 1 / 16])
    # λ = 0 does not help: without it the answer is the same.
    same = forkmerge.negative_transfer(gains[:, 1:], LAMBDAS[1:])
    np.testing.assert_array_equal(same.strong, found.strong)


def test_discrepancy():
    logits = np.random.default_rng(0).normal(0, 3, (5, 4)).astype(np.float32)
    exp = np.exp(logits.astype(np.float64))
    sure = (exp / exp.sum(1, keepdims=True)).max(1)
    found = forkmerge.confidence_score_discrepancy(jnp.asarray(logits))
    np.testing.assert_allclose(found, 1 - sure.mean(), rtol=1e-5)
    mask = jnp.array([True, False, True, True, False])
    found = forkmerge.confidence_score_discrepancy(jnp.asarray(logits), mask)
    np.testing.assert_allclose(found, 1 - sure[np.asarray(mask)].mean(), rtol=1e-5)


def test_a_triangle_of_models():
    corners = forkmerge.take_branches(trained()[0], (0, 1, 2))
    found = forkmerge.ternary_map(corners, score, VALIDATION, levels=4)
    assert found.weights.shape == (15, 3)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-6)
    for row in (0, 1, 2, 7, 14):
        mixed = jax.tree.map(
            lambda x, row=row: jnp.tensordot(found.weights[row], x, 1),
            corners.params,
        )
        want = -task_losses(mixed, VALIDATION)[0]
        np.testing.assert_allclose(found.scores[row], want, rtol=1e-4)
    # Corners of an equilateral triangle, and its middle.
    sides = found.points[:3] - found.points[jnp.array([1, 2, 0])]
    np.testing.assert_allclose(np.linalg.norm(sides, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        found.points, found.weights @ found.points[:3], atol=1e-6
    )


def test_one_step():
    params, batch = (
        initial(optax.identity()).params,
        jax.tree.map(lambda x: x[0], batches(1)),
    )
    pair = lambda p: task_losses(p, batch)[jnp.array([0, 2])]
    worth = lambda p, v: -task_losses(p, v)[0]
    found = jax.jit(
        lambda p: forkmerge.one_step_transfer(
            pair, worth, p, LAMBDAS, learning_rate=0.3, validation=VALIDATION
        )
    )(params)
    rows = jax.jit(jax.jacobian(pair))(params)
    flat = np.stack(
        [
            np.concatenate([np.ravel(x[i]) for x in jax.tree.leaves(rows)])
            for i in range(2)
        ]
    ).astype(np.float64)
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-4)

    jitted = jax.jit(lambda p: worth(p, VALIDATION))

    def at(weight):
        moved = jax.tree.map(
            lambda p, g: p - 0.3 * (g[0] + weight * g[1]), params, rows
        )
        return float(jitted(moved))

    want = [at(weight) - at(0.0) for weight in LAMBDAS]
    np.testing.assert_allclose(found.gains, want, atol=1e-6)
    assert np.abs(want).max() > 1e-4


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: forkmerge.negative_transfer([0.1, 0.2], [1.0]),
            r"gains of shape \(2,\) .* not \(1,\)",
        ),
        (
            lambda: forkmerge.negative_transfer([0.1], [0.0]),
            r"weights=\[0.0\] must not be negative, and one must be positive",
        ),
        (lambda: forkmerge.transfer_gain([1.0], 0.0, direction="up"), "'up'"),
        (
            lambda: forkmerge.ternary_map(jnp.zeros(2), jnp.sin),
            "has 3 corners, not 2",
        ),
        (
            lambda: forkmerge.ternary_map(jnp.zeros(3), jnp.sin, jnp.ones((0, 1))),
            "validation set is empty",
        ),
        (
            lambda: forkmerge.one_step_transfer(
                lambda w: jnp.stack([w, w, w]), jnp.sin, jnp.array(0.0), [1.0]
            ),
            r"shape \(2,\), not \(3,\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
