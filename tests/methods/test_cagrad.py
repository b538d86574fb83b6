"""CAGrad: golden values, the scalar two-task problem, both ends of c, the kink."""

import numpy as np
import pytest
import scipy.optimize
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3

import mtljax

PAIR, PAIR_MASK = padded(J2)


@pytest.mark.parametrize(
    ("c", "two", "three"),
    [
        (0.4, [0.663299, 0.5], [0.743785, 0.553019, 0.333333]),
        (0.5, [0.704124, 0.5], [0.842271, 0.620728, 0.333333]),
        (0.9, [1.107346, 0.738231], [1.231012, 0.887987, 0.333333]),
    ],
)
def test_golden_weights(c, two, three):
    got = step(make(mtljax.cagrad, 3, c=c), J3)
    np.testing.assert_allclose(got.weights, three, atol=1e-5)
    assert got.state.solver.converged
    got = step(make(mtljax.cagrad, 3, c=c), PAIR, mask=PAIR_MASK)
    np.testing.assert_allclose(got.weights, [*two, 0], atol=1e-5)
    assert got.state.solver.converged


TWO = np.array([0.346803, 1.163299, 1.163299])
THREE = np.array([0.934551, 1.248605, -0.113648, 2.077118])


@pytest.mark.parametrize(
    ("options", "two", "three"),
    [
        ({}, TWO, THREE),
        ({"rescale": "1+c^2"}, [0.298968, 1.002844, 1.002844], THREE / 1.16),
        ({"rescale": "1+c"}, TWO / 1.4, THREE / 1.4),
        ({"scale": "sum"}, TWO * 2, THREE * 3),
    ],
)
def test_golden_updates(options, two, three):
    balancer = make(mtljax.cagrad, 3, c=0.4, **options)
    np.testing.assert_allclose(step(balancer, J3).update, three, atol=1e-5)
    got = step(balancer, PAIR, mask=PAIR_MASK)
    np.testing.assert_allclose(got.update, [*two, 0], atol=1e-5)


def test_default_is_the_papers():
    got = step(mtljax.cagrad(2), J2)
    np.testing.assert_allclose(got.update, TWO, atol=1e-5)


def papers_update(pair, c):
    """min over w in [0, 1] of the paper's dual, in float64."""
    g0 = pair.mean(0)
    radius = c * np.linalg.norm(g0)

    def mix(w):
        return w * pair[0] + (1 - w) * pair[1]

    def dual(w):
        return mix(w) @ g0 + radius * np.linalg.norm(mix(w))

    inside = scipy.optimize.minimize_scalar(
        dual, bounds=(0, 1), method="bounded", options={"xatol": 1e-12}
    ).x
    best = min((0.0, 1.0, inside), key=dual)
    return g0 + radius * mix(best) / np.linalg.norm(mix(best))


def test_two_tasks_against_the_scalar_problem():
    pairs = random_pairs(60)
    expected = np.array([papers_update(p.astype(np.float64), 0.4) for p in pairs])
    got = steps(make(mtljax.cagrad, 2), pairs)
    scale = np.linalg.norm(pairs.mean(1), axis=1, keepdims=True)
    np.testing.assert_allclose(got.update / scale, expected / scale, atol=1e-4)


def test_c_zero_is_the_mean():
    update, weights, _ = step(make(mtljax.cagrad, 3, c=0.0), J3)
    np.testing.assert_allclose(weights, np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(update, J3.mean(0), rtol=1e-5)


def test_the_update_is_on_the_sphere_around_the_mean():
    mean = J3.mean(0)
    update, _, _ = step(make(mtljax.cagrad, 3, c=0.9), J3)
    distance = np.linalg.norm(update - mean)
    np.testing.assert_allclose(distance, 0.9 * np.linalg.norm(mean), rtol=1e-5)


def test_large_c_turns_to_mgda():
    shortest = np.array([0.777778, 0.62963, 0.407407, 0.592593])  # golden of MGDA
    update, _, _ = step(make(mtljax.cagrad, 3, c=1e4), J3)
    np.testing.assert_allclose(
        update / np.linalg.norm(update),
        shortest / np.linalg.norm(shortest),
        atol=1e-3,
    )


def test_opposed_tasks_get_the_projection_on_the_cone_instead_of_0_over_0():
    matrix = np.array([[1.0, 1.0], [-3.0, -3.0], [0.5, -1.0]])
    # No task gets worse on x + y = 0, 0.5 x - y >= 0: the ray along (1, -1).
    mean = matrix.mean(0)
    ray = np.array([1.0, -1.0]) / np.sqrt(2)
    update, weights, _ = step(make(mtljax.cagrad, 3, c=1.5), matrix)
    np.testing.assert_allclose(update, max(mean @ ray, 0) * ray, atol=1e-4)
    assert np.isfinite(weights).all()


@pytest.mark.usefixtures("as_users")
def test_errors():
    for c in (-0.1, float("nan")):
        with pytest.raises(
            ValueError, match=f"c must be a finite number at least 0, not {c}"
        ):
            mtljax.cagrad(2, c=c)
    with pytest.raises(ValueError, match=r"rescale='c' is not one of 'none', '1\+c'"):
        mtljax.cagrad(2, rescale="c")
