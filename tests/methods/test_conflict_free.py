"""ConFIG: golden values, equal angles, lengths, and what has no such direction."""

import numpy as np
import pytest
import scipy.stats
from methods.stepping import make, padded, random_pairs, step, steps
from zoo import J2, J3

import mtljax

THREE = np.array([2.561753, 2.584295, 1.381274, 2.314835])


def test_golden():
    got = step(make(mtljax.conflict_free, 3), J3)
    np.testing.assert_allclose(got.update, THREE, atol=1e-5)
    assert got.state.solver.converged
    matrix, mask = padded(J2)
    got = step(make(mtljax.conflict_free, 3), matrix, mask=mask)
    np.testing.assert_allclose(got.update, [0.158809, 2.070607, 2.070607, 0], atol=1e-5)
    got = step(make(mtljax.conflict_free, 3, scale="mean"), J3)
    np.testing.assert_allclose(got.update, THREE / 3, atol=1e-5)


def test_two_tasks_closed_form():
    """``O(g1, g2) + O(g2, g1)``, unit vectors, at the length of the projections."""
    pairs = random_pairs()
    a, b = pairs.astype(np.float64).swapaxes(0, 1)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def without(x, y):
        return unit(
            x - (x * y).sum(1, keepdims=True) / (y * y).sum(1, keepdims=True) * y
        )

    direction = unit(without(a, b) + without(b, a))
    expected = ((a + b) * direction).sum(1, keepdims=True) * direction
    got = steps(make(mtljax.conflict_free, 2), pairs)
    scale = np.linalg.norm(a, axis=1) + np.linalg.norm(b, axis=1)
    assert (np.linalg.norm(got.update - expected, axis=1) < 1e-4 * scale).all()


@pytest.mark.parametrize(
    ("length", "function"),
    [
        ("min", np.min),
        ("max", np.max),
        ("mean", np.mean),
        ("harmonic", scipy.stats.hmean),
        ("geometric", scipy.stats.gmean),
    ],
)
def test_lengths(length, function):
    expected = function(np.linalg.norm(J3, axis=1))
    balancer = make(mtljax.conflict_free, 3, length=length)
    update = step(balancer, J3).update
    direction = THREE / np.linalg.norm(THREE)
    np.testing.assert_allclose(update, expected * direction, atol=1e-5)
    equal = step(balancer, np.repeat(J3[:1], 3, 0)).update
    np.testing.assert_allclose(equal, J3[0], atol=1e-5)  # the scale of the mean


def test_cosines_are_to_each_other_as_the_preference():
    units = J3 / np.linalg.norm(J3, axis=1, keepdims=True)
    for p in ((1.0, 1.0, 1.0), (1.0, 2.0, 0.5)):
        update = step(make(mtljax.conflict_free, 3, preference=p), J3).update
        cosines = units @ update
        np.testing.assert_allclose(cosines / cosines[0], p, rtol=1e-4)
        again = tuple(7 * x for x in p)
        other = step(make(mtljax.conflict_free, 3, preference=again), J3).update
        np.testing.assert_allclose(other, update, rtol=1e-5)


def test_dependent_gradients():
    opposed = step(make(mtljax.conflict_free, 3), np.vstack([J3[0], -J3[0], 0 * J3[0]]))
    np.testing.assert_array_equal(opposed.update, np.zeros(4))
    assert not opposed.state.solver.converged
    copies = np.vstack([J3[0], J3[0], J3[1]])  # dependent, and still solvable
    update, _, state = step(make(mtljax.conflict_free, 3), copies)
    assert state.solver.converged
    cosines = copies @ update / np.linalg.norm(copies, axis=1)
    np.testing.assert_allclose(cosines, np.full(3, cosines[0]), rtol=1e-4)
    lost = np.vstack([J3[0], -2 * J3[0], J3[1]])
    update, _, state = step(make(mtljax.conflict_free, 3), lost)
    assert not state.solver.converged
    units = lost / np.linalg.norm(lost, axis=1, keepdims=True)
    best = np.linalg.pinv(units) @ np.ones(3)
    best /= np.linalg.norm(best)
    np.testing.assert_allclose(update, lost.sum(0) @ best * best, atol=1e-4)


def test_a_zero_gradient_is_left_out():
    matrix = np.vstack([J2, np.zeros((1, 3))])
    got = step(make(mtljax.conflict_free, 3), matrix)
    np.testing.assert_allclose(got.update, [0.158809, 2.070607, 2.070607], atol=1e-5)
    got = step(make(mtljax.conflict_free, 3, length="min"), matrix)
    np.testing.assert_allclose(np.linalg.norm(got.update), np.sqrt(18), rtol=1e-5)


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match="length='sum' is not one of 'projection'"):
        mtljax.conflict_free(2, length="sum")
    with pytest.raises(ValueError, match=r"conflict_free: preference has shape \(1,\)"):
        mtljax.conflict_free(2, preference=[1.0])
