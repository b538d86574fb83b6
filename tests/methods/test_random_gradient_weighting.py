"""Random gradient weighting: RLW's weights, but not on the heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import step
from zoo import J3

import mtljax
from mtljax.methods._random_gradient_weighting import random_gradient_weighting

KEY = jax.random.key(0)


def test_every_step_draws_anew_and_a_key_repeats():
    balancer = random_gradient_weighting(3, key=KEY)
    first = step(balancer, J3)
    second = step(balancer, J3, state=first.state)
    assert np.abs(first.weights - second.weights).max() > 1e-3
    np.testing.assert_array_equal(step(balancer, J3).weights, first.weights)
    np.testing.assert_allclose(second.update, second.weights @ J3, rtol=1e-5)
    np.testing.assert_allclose(second.weights.sum(), 1, rtol=1e-6)


def test_unbiased():
    def draw(key):
        balancer = random_gradient_weighting(3, key=key)
        return balancer.update({"w": jnp.eye(3)}, balancer.init({}))[0]["w"]

    weights = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(5), 4000))
    np.testing.assert_allclose(weights.mean(0), np.full(3, 1 / 3), atol=0.02)
    np.testing.assert_allclose(np.log(weights[:, 0] / weights[:, 1]).var(), 2, rtol=0.1)


def test_heads_keep_their_own_gradient_where_rlw_weights_them():
    def task_losses(params):
        pairs = zip((1.0, 3.0), params["heads"], strict=True)
        return jnp.stack([(params["trunk"] @ h - y) ** 2 for y, h in pairs])

    params = {
        "trunk": jnp.array([1.0, 2.0]),
        "heads": [jnp.array([0.5, 1.0]), jnp.array([-1.0, 0.3])],
    }
    labels = {"trunk": "shared", "heads": "own"}
    _, plain = mtljax.value_and_task_grads(task_losses)(params)

    def weighted(balancer, **options):
        function = mtljax.value_and_balanced_grad(task_losses, balancer, **options)
        _, grad, state = jax.jit(function)(params, balancer.init(params))
        return grad, state.task_weights

    rgw, w = weighted(random_gradient_weighting(2, key=KEY), labels=labels)
    np.testing.assert_allclose(rgw["trunk"], w @ plain["trunk"], rtol=1e-5)
    for task, head in enumerate(rgw["heads"]):
        np.testing.assert_allclose(head, plain["heads"][task][task], rtol=1e-5)
    rlw = mtljax.random_loss_weighting(2, key=KEY)
    rlw, w = weighted(rlw, labels=labels, heads="weighted")
    np.testing.assert_allclose(rlw["trunk"], w @ plain["trunk"], rtol=1e-5)
    for task, head in enumerate(rlw["heads"]):
        np.testing.assert_allclose(
            head, w[task] * plain["heads"][task][task], rtol=1e-5
        )


def test_a_key_is_required():
    with pytest.raises(TypeError, match="key"):
        random_gradient_weighting(3)
