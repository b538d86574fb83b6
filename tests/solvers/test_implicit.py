"""Derivatives of the solvers against central differences in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64

from mtljax import solvers

TASKS = 4
MASK = np.array([True, True, False, True])


def nonnegative(gramian, linear, radius):
    return solvers.nonnegative_qp(gramian, linear * radius, mask=jnp.asarray(MASK)).x


def min_norm(gramian, linear, radius):
    return solvers.min_norm_point(gramian)[0]


def ball(gramian, linear, radius):
    return solvers.max_min_in_ball(gramian, linear**2, radius)[0]


def wide_ball(gramian, linear, radius):  # reaches the cone where nobody gets worse
    gramian = gramian.at[0].set(-2 * gramian[1]).at[:, 0].set(-2 * gramian[:, 1])
    gramian = gramian.at[0, 0].set(4 * gramian[1, 1])
    return gramian @ solvers.max_min_in_ball(gramian, linear**2, 100 * radius)[0]


def nash(gramian, linear, radius):
    return solvers.solve_bargaining(gramian, 1.0, jnp.asarray(MASK))[0]


def fair(gramian, linear, radius):
    return solvers.solve_bargaining(gramian, 2.0)[0]


EACH = pytest.mark.parametrize(
    "solve",
    [nonnegative, min_norm, ball, wide_ball, nash, fair],
    ids=lambda f: f.__name__,
)


@pytest.fixture(autouse=True)
def float64():
    with enable_x64(True):
        yield


def problem(seed):
    """Point and direction, far from any change of the set of free variables."""
    rng = np.random.default_rng(seed)
    rows, move = rng.normal(size=(2, TASKS, 9))
    rows *= np.array([0.1, 1, 1, 10.0])[:, None]
    gramian = rows @ rows.T
    tangent = move @ rows.T + rows @ move.T
    point = (gramian, rng.normal(size=TASKS) * 0.5, 0.7)
    return point, (tangent, rng.normal(size=TASKS), rng.normal())


def as_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@functools.cache
def compiled(solve):
    def both(point, tangent, cotangent):
        out, pull = jax.vjp(solve, *point)
        forward = jax.jvp(solve, point, tangent)[1]
        reverse = sum(
            jnp.vdot(a, b) for a, b in zip(pull(cotangent), tangent, strict=True)
        )
        return out, forward, reverse

    return jax.jit(solve), jax.jit(both)


@EACH
@pytest.mark.parametrize("seed", range(4))
def test_forward_and_reverse_against_differences(solve, seed):
    point, tangent = problem(seed)
    cotangent = jnp.asarray(np.random.default_rng(seed).normal(size=TASKS))
    plain, both = compiled(solve)
    out, forward, reverse = both(as_jax(point), as_jax(tangent), cotangent)
    step = 1e-6
    sides = [
        np.asarray(
            plain(
                *as_jax([x + s * step * t for x, t in zip(point, tangent, strict=True)])
            )
        )
        for s in (1, -1)
    ]
    expected = (sides[0] - sides[1]) / (2 * step)
    size = np.abs(expected).max()
    assert size > 0
    np.testing.assert_allclose(forward, expected, atol=1e-6 * size)
    np.testing.assert_allclose(
        reverse, cotangent @ expected, atol=1e-6 * size * np.abs(cotangent).sum()
    )
    np.testing.assert_allclose(out, plain(*as_jax(point)), rtol=1e-12, atol=1e-14)


def test_second_derivative():
    point, tangent = as_jax(problem(0))

    @jax.jit
    def slope(t):
        moved = jax.tree.map(lambda x, d: x + t * d, point, tangent)
        return jax.jvp(min_norm, moved, tangent)[1]

    expected = (slope(1e-5) - slope(-1e-5)) / 2e-5
    second = jax.jit(jax.jacfwd(slope))(0.0)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-8)
