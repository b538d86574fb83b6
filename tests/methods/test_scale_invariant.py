"""Scale-invariant scalarisation is the gradient of the sum of log losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, step
from zoo import J3, LOSSES3

import mtljax


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2.0, 0.5, 1.0]),
        ({"offset": 1.0}, [1 / 1.5, 1 / 3, 1 / 2]),
        ({"scale": "mean"}, [4 / 7, 1 / 7, 2 / 7]),
        ({"scale": "sum"}, [12 / 7, 3 / 7, 6 / 7]),
    ],
)
def test_weights(options, expected):
    update, weights, _ = step(make(mtljax.scale_invariant, 3, **options), J3)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(update, np.asarray(expected) @ J3, rtol=1e-5)


def test_descends_the_sum_of_logs():
    centers = jnp.asarray(J3, jnp.float32)

    def task_losses(x):
        return jnp.mean((x[None] - centers) ** 2, axis=1)

    x = jnp.array([1.0, 0.5, -1.0, 2.0])
    losses, grads = mtljax.value_and_task_grads(task_losses)(x)
    update, _, _ = step(make(mtljax.scale_invariant, 3), grads, losses)
    expected = jax.grad(lambda x: jnp.log(task_losses(x)).sum())(x)
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_the_unit_of_a_loss_does_not_matter():
    units = np.array([1e-3, 1.0, 1e4])
    plain, _, _ = step(make(mtljax.scale_invariant, 3), J3)
    scaled, _, _ = step(
        make(mtljax.scale_invariant, 3), J3 * units[:, None], LOSSES3 * units
    )
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(
        ValueError, match="offset must be a finite number at least 0, not -1"
    ):
        mtljax.scale_invariant(2, offset=-1.0)
    shifted = mtljax.scale_invariant(2, offset=1.0)
    update, _ = shifted.update({"w": jnp.eye(2)}, shifted.init({}), losses=jnp.zeros(2))
    np.testing.assert_allclose(update["w"], [1.0, 1.0])
