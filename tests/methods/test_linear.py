"""Linear scalarisation: the arithmetic, and what the weights may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import step
from zoo import J3

import mtljax


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 3.0, -1.0, 5.0]),
        ({"scale": "sum"}, [1.0, 3.0, -1.0, 5.0]),
        ({"scale": "mean"}, [1 / 3, 1.0, -1 / 3, 5 / 3]),
        ({"weights": [1.0, 0.5, 2.0]}, [1.5, 2.5, -3.5, 9.0]),
        ({"weights": [1.0, 1.0, 2.0], "scale": "sum"}, [0.75, 3.0, -2.25, 6.75]),
        ({"weights": [1.0, 1.0, 2.0], "scale": "mean"}, [0.25, 1.0, -0.75, 2.25]),
    ],
)
def test_values(options, expected):
    update, _, _ = step(mtljax.linear(3, **options), J3)
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_a_mask_renormalises_the_declared_scale():
    balancer = mtljax.linear(3, weights=[1.0, 3.0, 4.0], scale="mean")
    update, weights, _ = step(balancer, J3, mask=[True, True, False])
    np.testing.assert_allclose(weights, [0.25, 0.75, 0.0], rtol=1e-6)
    np.testing.assert_allclose(update, 0.25 * J3[0] + 0.75 * J3[1], rtol=1e-6)


def test_one_hot_weights_as_a_vmap_axis_are_the_single_task_baselines():
    def single(weights):
        balancer = mtljax.linear(3, weights=weights)
        return balancer.update({"w": jnp.asarray(J3)}, balancer.init({}))[0]["w"]

    np.testing.assert_array_equal(jax.vmap(single)(jnp.eye(3)), J3)


def test_reads_nothing():
    assert not mtljax.linear(3).reads_losses
    assert mtljax.linear(3).needs == "losses"


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match=r"linear: weights has shape \(2,\).*\(3,\)"):
        mtljax.linear(3, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="num_tasks must be a positive integer"):
        mtljax.linear(2.0)
