"""DB-MTL: golden values, the recurrence in float64, its bias, both code paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods.stepping import make, random_pairs, step, steps
from zoo import J3, LOSSES3

from mtljax.methods._db_mtl import db_mtl

RNG = np.random.default_rng(0)
ALL = np.ones(3, bool)
# With J3 as the gradients of the log losses.
GOLDEN = np.array([2.359959, 3.274267, -0.618301, 5.870829])


@functools.cache
def jitted(**options):
    balancer = db_mtl(3, **options)
    return balancer, jax.jit(balancer.update)


def tree(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return {"a": matrix[:, :2].reshape(3, 2, 1), "b": [matrix[:, 2:]]}


def run(matrices, masks=None, losses=None, **options):
    balancer, update = jitted(**options)
    state = balancer.init(jax.tree.map(lambda g: g[0], tree(J3)))
    losses = [LOSSES3] * len(matrices) if losses is None else losses
    masks = [ALL] * len(matrices) if masks is None else masks
    for matrix, mask, loss in zip(matrices, masks, losses, strict=True):
        out, state = update(
            tree(matrix),
            state,
            losses=jnp.asarray(loss, jnp.float32),
            mask=jnp.asarray(mask),
        )
        yield np.concatenate([np.ravel(x) for x in jax.tree.leaves(out)]), state


def balance(rows):
    norms = np.linalg.norm(rows, axis=1)
    return norms.max() * (rows / norms[:, None]).sum(0)


def test_golden_without_memory():
    got = step(make(db_mtl, 3, beta=0.0), J3, losses=np.ones(3))
    np.testing.assert_allclose(got.update, GOLDEN, atol=1e-5)
    np.testing.assert_allclose(got.weights @ J3, GOLDEN, atol=1e-5)
    got = step(make(db_mtl, 3, beta=0.0), J3)
    expected = balance(J3 / LOSSES3[:, None])
    np.testing.assert_allclose(got.update, expected, rtol=1e-5)
    assert make(db_mtl, 3, beta=0.0).needs == "gramian"
    assert make(db_mtl, 3).needs == "grads"


def test_two_tasks_bisect_their_angle():
    pairs = random_pairs()  # losses are one
    unit = pairs / np.linalg.norm(pairs, axis=-1, keepdims=True)
    longest = np.linalg.norm(pairs, axis=-1).max(1)[:, None]
    got = steps(make(db_mtl, 2, beta=0.0), pairs)
    np.testing.assert_allclose(got.update / longest, unit.sum(1), atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_recurrence(sigma):
    matrices = RNG.normal(size=(6, 3, 4))
    losses = RNG.uniform(0.5, 2, size=(6, 3))
    average = np.zeros((3, 4))
    for k, (update, state) in enumerate(
        run(matrices, losses=losses, beta_sigma=sigma), 1
    ):
        fresh = matrices[k - 1] / losses[k - 1][:, None]
        average = fresh + 0.9 / k**sigma * (average - fresh)
        np.testing.assert_allclose(update, balance(average), rtol=1e-4, atol=1e-5)
        norms = np.linalg.norm(average, axis=1)
        weights = norms.max() / norms / losses[k - 1]
        np.testing.assert_allclose(state.task_weights, weights, rtol=1e-4)


def test_the_first_step_is_short_unless_corrected():
    ((update, _),) = run([J3], losses=[np.ones(3)])
    np.testing.assert_allclose(update, 0.1 * GOLDEN, atol=1e-5)
    for sigma in (0.0, 0.5):
        options = {"bias_correction": True, "beta_sigma": sigma}
        steps_ = run([J3] * 5, losses=np.ones((5, 3)), **options)
        for update, _ in steps_:  # constant gradients: nothing to remember
            np.testing.assert_allclose(update, GOLDEN, rtol=1e-4, atol=1e-5)


def test_the_bias_goes_away():
    *_, (update, _) = run([J3] * 60, losses=np.ones((60, 3)), beta_sigma=0.0)
    np.testing.assert_allclose(update, (1 - 0.9**60) * GOLDEN, rtol=1e-4, atol=1e-5)


def test_an_absent_task_keeps_its_average_and_its_count():
    masks = [ALL, np.array([True, False, True]), ALL]
    matrices = RNG.normal(size=(3, 3, 4))
    runs = list(run(matrices, masks, bias_correction=True))
    states = [s for _, s in runs]
    for before, after in zip(
        jax.tree.leaves(states[0].tracked),
        jax.tree.leaves(states[1].tracked),
        strict=True,
    ):
        np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(states[2].steps, [3, 2, 3])
    assert states[1].task_weights[1] == 0
    average, remainder = np.zeros((3, 4)), np.ones(3)
    counts = np.zeros(3)
    for (update, _), matrix, mask in zip(runs, matrices, masks, strict=True):
        counts += mask
        kept = 0.9 / np.maximum(counts, 1) ** 0.5
        fresh = matrix / LOSSES3[:, None]
        new = fresh + kept[:, None] * (average - fresh)
        average = np.where(mask[:, None], new, average)
        remainder = np.where(mask, remainder * kept, remainder)
        corrected = (average / (1 - remainder)[:, None])[mask]
        np.testing.assert_allclose(update, balance(corrected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("scale", "total"), [("sum", 3), ("mean", 1)])
def test_scale(beta, scale, total):
    ((plain, native),) = run([J3], beta=beta)
    ((update, state),) = run([J3], beta=beta, scale=scale)
    np.testing.assert_allclose(state.task_weights.sum(), total, rtol=1e-5)
    factor = total / native.task_weights.sum()
    np.testing.assert_allclose(update, factor * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for options, message in [
        (
            {"beta": 1.0},
            r"beta must be a finite number at least 0 and below 1, not 1.0",
        ),
        (
            {"beta": -0.1},
            r"beta must be a finite number at least 0 and below 1, not -0.1",
        ),
        (
            {"beta_sigma": -0.1},
            "beta_sigma must be a finite number at least 0, not -0.1",
        ),
        ({"scale": "big"}, "scale='big' is not one of"),
    ]:
        with pytest.raises(ValueError, match=f"db_mtl: {message}"):
            db_mtl(2, **options)
    grads, balancer = {"w": jnp.eye(2)}, db_mtl(2)
    with pytest.raises(ValueError, match=r"db_mtl: gradient .*shared_params"):
        balancer.update(grads, balancer.init({}), losses=jnp.ones(2))
