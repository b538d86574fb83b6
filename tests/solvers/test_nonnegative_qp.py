"""The non-negative quadratic program against Lawson and Hanson in float64."""

import functools

import jax
import numpy as np
import pytest
from solvers import problems

from mtljax import solvers


@functools.cache
def solver():
    def solve(quadratic, linear, mask, start):
        return solvers.nonnegative_qp(quadratic, linear, mask=mask, start=start)

    return jax.jit(jax.vmap(solve))


def run(quadratics, linears, masks=None, starts=None):
    full = np.ones(linears.shape, bool)
    masks = full if masks is None else masks
    starts = linears < 0 if starts is None else starts
    solution = solver()(quadratics, linears, masks, starts)
    return jax.tree.map(np.asarray, solution)


def make(tasks, count=100):
    quadratics = problems.gramians(tasks, count)
    rng = np.random.default_rng(tasks)
    root = np.sqrt(np.diagonal(quadratics, axis1=1, axis2=2))
    linears = (rng.normal(size=(count, tasks)) - 0.5) * root
    return quadratics, linears.astype(np.float32)


def violation(quadratic, linear, x):
    """Complementarity in float64, relative to the terms that are added up."""
    quadratic, linear, x = (np.asarray(v, np.float64) for v in (quadratic, linear, x))
    slope = quadratic @ x + linear
    terms = np.abs(quadratic) @ np.abs(x) + np.abs(linear)
    wrong = np.where(x > 0, np.abs(slope), np.maximum(-slope, 0))
    return (wrong / terms).max()


@pytest.mark.parametrize("tasks", problems.SIZES)
def test_against_nnls(tasks):
    quadratics, linears = make(tasks)
    solution = run(quadratics, linears)
    assert solution.status.converged.all()
    assert (solution.x >= 0).all()
    for q, c, x in zip(quadratics, linears, solution.x, strict=True):
        assert violation(q, c, x) < 1e-5
        q, c, x = (v.astype(np.float64) for v in (q, c, x))  # noqa: PLW2901
        root = np.sqrt(np.diagonal(q))
        unit = q / root[:, None] / root[None, :]
        expected = problems.nonnegative_qp(unit, c / root)
        # In the norm of Q, the solution is as good as the rounding of Q allows.
        error = x * root - expected
        size = expected @ unit @ expected
        assert error @ unit @ error <= 1e-8 * max(size, 1e-3 * (c / root) @ (c / root))


def test_free_is_the_support():
    solution = run(*make(11))
    np.testing.assert_array_equal(solution.free, solution.x > 0)


def test_any_warm_start_leads_to_the_same_point_and_a_right_one_at_once():
    quadratics, linears = make(11)
    cold = run(quadratics, linears)
    wild = np.random.default_rng(0).random(linears.shape) < 0.5
    for starts in (wild, np.ones_like(wild), np.zeros_like(wild)):
        warm = run(quadratics, linears, starts=starts)
        scale = np.abs(cold.x).max(1, keepdims=True) + 1e-30
        np.testing.assert_allclose(warm.x / scale, cold.x / scale, atol=1e-4)
    again = run(quadratics, linears, starts=cold.free)
    # Nothing is left to exchange: the fewest iterations there are, for all of them.
    assert np.ptp(again.status.iterations) == 0
    assert (again.status.iterations <= cold.status.iterations).all()
    assert again.status.iterations.max() < cold.status.iterations.max()


def test_masked_variables_do_not_exist():
    quadratics, linears = make(11)
    masks = np.broadcast_to(np.arange(11) % 4 != 1, linears.shape)
    kept = np.flatnonzero(masks[0])
    masked = run(quadratics, linears, masks=masks)
    small = run(quadratics[:, kept][:, :, kept], linears[:, kept])
    assert (masked.x[~masks] == 0).all()
    scale = np.abs(small.x).max(1, keepdims=True) + 1e-30
    np.testing.assert_allclose(masked.x[:, kept] / scale, small.x / scale, atol=1e-4)


def test_singular_problems_stay_finite_and_optimal_where_an_optimum_exists():
    rows = np.random.default_rng(0).normal(size=(100, 11, 3))
    quadratics = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    # q in the range of Q: bounded below.
    linears = np.einsum("bij,bj->bi", quadratics, rows[:, :, 0]).astype(np.float32)
    solution = run(quadratics, linears)
    assert np.isfinite(solution.x).all()
    found = [violation(*p) for p in zip(quadratics, linears, solution.x, strict=True)]
    assert np.max(found) < 1e-4
    # No optimum: finite, and large in the direction in which the objective falls.
    linears = np.where(np.arange(11) == 0, -1, 1)[None].repeat(100, 0)
    x = run(np.zeros_like(quadratics), linears.astype(np.float32)).x
    assert np.isfinite(x).all()
    assert (x[:, 0] > 1e5).all()
    assert (x[:, 1:] == 0).all()


def test_nothing_to_do():
    quadratics, linears = make(11)
    solution = run(quadratics, np.zeros_like(linears))
    np.testing.assert_array_equal(solution.x, np.zeros_like(linears))
    assert (solution.status.residual == 0).all()
    empty = run(quadratics, linears, masks=np.zeros(linears.shape, bool))
    np.testing.assert_array_equal(empty.x, np.zeros_like(linears))
