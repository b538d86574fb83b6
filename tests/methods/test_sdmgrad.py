"""SDMGrad: golden values, both ends of λ, optimality, the authors' loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from methods.stepping import make, random_pairs, step, steps
from zoo import J2, J3

from mtljax import stack
from mtljax.methods._sdmgrad import sdmgrad

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("matrix", "shares", "update"),
    [
        (J2, [0.63, 0.37], [0, 1, 1]),
        (J3, [0.603704, 0.396296, 0], [0.700855, 0.680912, 0.22792, 0.849003]),
    ],
)
def test_golden(matrix, shares, update):
    got = step(make(sdmgrad, len(matrix)), matrix)
    np.testing.assert_allclose(got.state.shares, shares, atol=1e-5)
    np.testing.assert_allclose(got.update, update, atol=1e-5)
    np.testing.assert_allclose(got.weights @ matrix, update, atol=1e-5)
    assert got.state.solver.converged


def test_both_ends_of_lamda():
    got = step(make(sdmgrad, 3, lamda=0.0), J3)
    np.testing.assert_allclose(got.weights, [0.592593, 0.407407, 0], atol=1e-5)
    got = step(make(sdmgrad, 3, lamda=1e6), J3)
    np.testing.assert_allclose(got.update, J3.mean(0), atol=1e-4)


def test_two_tasks_closed_form():
    lamda, pairs = 0.3, random_pairs()
    g, h = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64)
    fixed = h + lamda * (g + h) / 2
    first = -((g - h) * fixed).sum(1) / ((g - h) ** 2).sum(1)
    first = np.clip(first, 0, 1)[:, None]
    expected = (first * (g - h) + fixed) / (1 + lamda)
    got = steps(make(sdmgrad, 2), pairs)
    scale = np.abs(pairs).max((1, 2))[:, None]
    np.testing.assert_allclose(got.update / scale, expected / scale, atol=1e-4)


def nearest_psd(matrix):
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ np.diag(np.maximum(values, 0)) @ vectors.T


@jax.jit
def with_cross(state, cross, mask):
    grads = {"w": jnp.asarray(J3, jnp.float32)}
    return make(sdmgrad, 3).update(grads, state, cross_gramian=cross, mask=mask)


def test_cross_gramian_is_solved_for_its_nearest_semidefinite_matrix():
    """Against a general solver on the problem as it is written, in float64."""
    state, uniform = make(sdmgrad, 3).init({}), np.full(3, 1 / 3)
    indefinite = 0
    for _ in range(6):
        one, two = RNG.normal(size=(2, 3, 8)).astype(np.float32)
        cross = stack.cross_gramian({"w": jnp.asarray(one)}, {"w": jnp.asarray(two)})
        update, new = with_cross(state, cross, jnp.ones(3, bool))
        matrix = nearest_psd(one.astype(np.float64) @ two.astype(np.float64).T)
        indefinite += np.linalg.eigvalsh((cross + cross.T) / 2)[0] < -0.1

        def objective(w, matrix=matrix):
            mixed = w + 0.3 * uniform
            return mixed @ matrix @ mixed

        best = scipy.optimize.minimize(
            objective,
            uniform,
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14},
        )
        got = np.asarray(new.shares, np.float64)
        np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
        assert objective(got) <= best.fun + 1e-5
        weights = (got + 0.3 * uniform) / 1.3
        np.testing.assert_allclose(new.task_weights, weights, rtol=1e-5)
        np.testing.assert_allclose(update["w"], weights @ J3, atol=1e-5)
    assert indefinite


def test_cross_gramian_of_the_batch_itself_is_none():
    state = make(sdmgrad, 3).init({})
    cross = jnp.asarray(J3 @ J3.T, jnp.float32)
    update, _ = with_cross(state, cross, jnp.ones(3, bool))
    expected = [0.700855, 0.680912, 0.22792, 0.849003]
    np.testing.assert_allclose(update["w"], expected, atol=1e-4)
    broken = cross.at[2].set(jnp.nan).at[:, 2].set(jnp.nan)
    update, new = with_cross(state, broken, jnp.array([True, True, False]))
    alone = step(make(sdmgrad, 2), J3[:2]).update
    np.testing.assert_allclose(update["w"], alone, atol=1e-5)
    update, new = with_cross(state, broken, jnp.ones(3, bool))
    assert np.isnan(update["w"]).all()
    np.testing.assert_array_equal(new.shares, state.shares)


def project(vector):
    descending = np.sort(vector)[::-1]
    excess = np.cumsum(descending) - 1
    size = np.arange(1, len(vector) + 1)
    last = np.nonzero(descending * size > excess)[0][-1]
    return np.maximum(vector - excess[last] / (last + 1), 0)


def reference(shares, matrix, lamda, rate, count=20):
    """The authors' loop, in float64."""
    size = np.sqrt(np.maximum(np.diag(matrix), 0)).mean() ** 2
    velocity, uniform = 0.0, np.full(len(shares), 1 / len(shares))
    for _ in range(count):
        slope = matrix / size @ (shares + lamda * uniform)
        velocity = 0.5 * velocity + slope
        shares = project(shares - rate * velocity)
    return shares


def test_reference_ends_on_a_vertex():
    """Golden values of the loop that does not converge."""
    slow = make(sdmgrad, 3, inner="reference", learning_rate=5.0)
    np.testing.assert_allclose(
        step(slow, J3).state.shares, [0.179, 0.821, 0], atol=1e-3
    )
    fast = make(sdmgrad, 3, inner="reference")
    got = step(fast, J3)
    np.testing.assert_allclose(got.state.shares, [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(got.weights, [1 / 13, 11 / 13, 1 / 13], atol=1e-6)
    pair = step(make(sdmgrad, 2, inner="reference"), J2)
    np.testing.assert_allclose(pair.state.shares, [0, 1], atol=1e-6)


def test_reference_is_warm_started():
    balancer, state = (
        make(sdmgrad, 3, inner="reference", steps=3, learning_rate=0.3),
        None,
    )
    shares = np.full(3, 1 / 3)
    for _ in range(4):
        matrix = RNG.normal(size=(3, 4))
        got = step(balancer, matrix, state=state)
        state = got.state
        shares = reference(shares, matrix @ matrix.T, 0.3, 0.3, 3)
        np.testing.assert_allclose(state.shares, shares, atol=1e-5)


def test_reference_converges_to_the_exact_solution_with_a_small_step():
    balancer = make(sdmgrad, 3, inner="reference", learning_rate=0.5, steps=200)
    got = step(balancer, J3)
    np.testing.assert_allclose(got.state.shares, [0.603704, 0.396296, 0], atol=1e-4)


@pytest.mark.usefixtures("as_users")
def test_errors():
    for options, message in [
        ({"lamda": -0.1}, "lamda must be a finite number at least 0, not -0.1"),
        ({"inner": "sgd"}, "inner='sgd' is not one of 'exact', 'reference'"),
        (
            {"learning_rate": 0.0},
            "learning_rate must be a finite number above 0, not 0.0",
        ),
        (
            {"momentum": 1.0},
            r"momentum must be a finite number at least 0 and below 1, not 1.0",
        ),
        ({"steps": 0}, "steps must be positive, not 0"),
    ]:
        with pytest.raises(ValueError, match=f"sdmgrad: {message}"):
            sdmgrad(2, **options)
    balancer, grads = sdmgrad(2), {"w": jnp.eye(2)}
    with pytest.raises(ValueError, match=r"sdmgrad: cross_gramian has shape \(2, 1\)"):
        balancer.update(grads, balancer.init(grads), cross_gramian=jnp.ones((2, 1)))
