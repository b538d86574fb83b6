"""GradDrop: which sign wins and how often, unbiasedness, leaks, keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import J2, J3

from mtljax.methods._graddrop import graddrop, graddrop_factors

COUNT = 4000


@functools.cache
def drawer(num_tasks, masked=False, **options):
    mask = jnp.arange(num_tasks) < 2 if masked else None

    @jax.jit
    def draw(keys, matrix):
        def one(key):
            balancer = graddrop(num_tasks, key=key, **options)
            grads = {"w": matrix}
            return balancer.update(grads, balancer.init({}), mask=mask)[0]["w"]

        return jax.vmap(one)(keys)

    return draw


def draws(matrix, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), COUNT)
    draw = drawer(len(matrix), **options)
    return np.asarray(draw(keys, jnp.asarray(matrix, jnp.float32)), np.float64)


def signs(matrix):
    plus, minus = np.maximum(matrix, 0).sum(0), np.maximum(-matrix, 0).sum(0)
    return plus, minus, plus / (plus + minus)


@pytest.mark.parametrize("matrix", [J2, J3])
def test_one_sign_wins_with_the_probability_of_its_share(matrix):
    plus, minus, share = signs(matrix)
    drawn = draws(matrix)
    won = np.isclose(drawn, plus[None], atol=1e-4)
    lost = np.isclose(drawn, -minus[None], atol=1e-4)
    assert (won | lost).all()
    spread = 5 * np.sqrt(share * (1 - share) / COUNT) + 1e-9
    assert (np.abs(won.mean(0) - share) <= spread).all()


@pytest.mark.parametrize("leak", [0.0, 0.5])
@pytest.mark.parametrize("matrix", [J2, J3])
def test_unbiased_for_equal_leaks(matrix, leak):
    plus, minus, share = signs(matrix)
    deviation = (1 - leak) * (plus + minus) * np.sqrt(share * (1 - share))
    error = np.abs(draws(matrix, leak=leak).mean(0) - matrix.sum(0))
    assert (error <= 5 * deviation / np.sqrt(COUNT) + 1e-3).all()


def test_coordinates_are_drawn_independently():
    matrix = np.repeat(np.array([[1.0], [-1.0]]), 2, axis=1)
    first, second = (draws(matrix) > 0).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_leak_per_task():
    leaks = np.array([0.0, 0.25])
    matrix = np.array([[3.0], [-1.0]])
    outcomes = {round(float(x), 4) for x in draws(matrix, leak=(0.0, 0.25))[:, 0]}
    assert outcomes == {3 - 0.25, 0 - 1.0}
    keep = draws(matrix, leak=1.0)
    np.testing.assert_allclose(keep, np.full((COUNT, 1), 2.0))
    factors = graddrop_factors(
        jnp.array(matrix), jnp.zeros(1), jnp.asarray(leaks, jnp.float32)
    )
    np.testing.assert_allclose(factors[:, 0], [1, 0.25])


def test_absent_tasks_have_no_vote():
    matrix = np.vstack([J2, 100 * np.ones((1, 3))])
    drawn = draws(matrix, masked=True)
    plus, minus, _ = signs(J2)
    assert (np.isclose(drawn, plus) | np.isclose(drawn, -minus)).all()
    assert abs((drawn[:, 0] > 0).mean() - 0.6) < 0.05


def test_without_conflict_it_is_the_sum():
    balancer = graddrop(3, key=jax.random.key(0))
    grads = {"w": jnp.abs(jnp.asarray(J3, jnp.float32))}
    update, state = balancer.update(grads, balancer.init({}))
    np.testing.assert_allclose(update["w"], np.abs(J3).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(state.task_weights, np.ones(3))


def test_share_that_gets_through():
    balancer = graddrop(2, key=jax.random.key(0), leak=0.25)
    grads = {"a": jnp.array([[3.0, 2.0], [-1.0, 2.0]]), "b": jnp.array([[1.0], [1.0]])}
    update, state = balancer.update(grads, balancer.init({}))
    if update["a"][0] > 0:
        share = [1.0, (0.25 + 2 + 1) / 4]
    else:
        share = [(0.75 + 2 + 1) / 6, 1.0]
    np.testing.assert_allclose(state.task_weights, share, rtol=1e-5)


def test_leaves_and_steps_draw_from_keys_of_their_own():
    balancer = graddrop(2, key=jax.random.key(0))
    row = jnp.stack([jnp.ones(64), -jnp.ones(64)])
    grads = {"a": row, "b": row}
    first, state = balancer.update(grads, balancer.init({}))
    second, _ = balancer.update(grads, state)
    again, _ = balancer.update(grads, balancer.init({}))
    np.testing.assert_array_equal(first["a"], again["a"])
    for one, other in ((first["a"], first["b"]), (first["a"], second["a"])):
        assert 0.2 < (one == other).mean() < 0.8


def test_scale():
    key, grads = jax.random.key(0), {"w": jnp.asarray(J3, jnp.float32)}
    plain, _ = graddrop(3, key=key).update(grads, graddrop(3, key=key).init({}))
    for scale, factor in (("sum", 1), ("mean", 1 / 3)):
        balancer = graddrop(3, key=key, scale=scale)
        update, _ = balancer.update(grads, balancer.init({}))
        np.testing.assert_allclose(update["w"], factor * plain["w"], rtol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="key"):
        graddrop(2)
    with pytest.raises(
        ValueError,
        match=r"leak must be a finite number at least 0 and at most 1, not 1.5",
    ):
        graddrop(2, key=key, leak=1.5)
    with pytest.raises(ValueError, match=r"leak has shape \(3,\)"):
        graddrop(2, key=key, leak=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="scale='big' is not one of"):
        graddrop(2, key=key, scale="big")
