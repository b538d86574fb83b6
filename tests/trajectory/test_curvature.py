"""Hessian and GGN products, traces, Lanczos: against the full matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

from mtljax import trajectory

SIZE = len(lab.ravel(lab.params()))


def columns(product):
    """The matrix of a linear map, one compiled program."""
    with enable_x64(True):
        eye = jax.vmap(jax.flatten_util.ravel_pytree(lab.wide(lab.params()))[1])(
            jnp.eye(SIZE)
        )
        rows = jax.jit(lambda e: jax.lax.map(product(), e))(eye)
        flat = [np.asarray(x).reshape(SIZE, -1) for x in jax.tree.leaves(rows)]
    return np.concatenate(flat, 1)


def hessian_product(size=8):
    return trajectory.hvp(lab.loss, lab.wide(lab.params()), lab.batches(size))


def test_hessian_products_over_batches_are_the_hessian():
    np.testing.assert_allclose(columns(hessian_product), lab.hessian(), atol=1e-13)


def test_gauss_newton_products_are_its_matrix():
    def product():
        tree = lab.batches(8)
        return trajectory.ggn_vp(
            lab.model, lab.cross_entropy, lab.wide(lab.params()), (tree["x"], tree["y"])
        )

    found = columns(product)
    np.testing.assert_allclose(found, lab.ggn(), atol=1e-13)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_lanczos_reaches_both_ends_and_its_bounds_hold():
    """20 iterations give the ends to 1e-6, and every bound is a bound."""
    truth = np.linalg.eigvalsh(lab.hessian())
    with enable_x64(True):
        p, key = lab.wide(lab.params()), jax.random.key(0)

        def run():
            few = trajectory.lanczos(hessian_product(), p, key, num_iters=6)
            many = trajectory.hessian_top_eigenvalues(
                hessian_product(), p, key, k=2, num_iters=24
            )
            return few, many

        few, many = jax.tree.map(np.asarray, jax.jit(run)())
    np.testing.assert_allclose(many.top[0], truth[-1], rtol=1e-6)
    np.testing.assert_allclose(many.bottom[0], truth[0], rtol=1e-6)
    np.testing.assert_allclose(many.top[1], truth[-2], rtol=1e-3)
    distance = np.abs(few.values[:, None] - truth[None]).min(1)
    assert (distance <= few.bounds + 1e-12).all()
    assert few.bounds.max() > 1e-3  # six iterations are not enough: bounds say so
    np.testing.assert_allclose(few.weights.sum(), 1, rtol=1e-12)


def test_an_exhausted_subspace_adds_no_zero():
    """All eigenvalues -3 but one: a plain recursion would pad the list with zeros."""
    scale = jnp.full(8, -3.0).at[2].set(-5.0)
    found = trajectory.lanczos(
        lambda v: scale * v, scale, jax.random.key(1), num_iters=8
    )
    np.testing.assert_allclose(np.sort(found.values), np.sort(scale), rtol=1e-5)


@pytest.mark.deep
def test_float32_is_good_to_single_precision():
    p = jax.tree.map(jnp.float32, lab.params())
    product = trajectory.hvp(lab.loss, p, lab.batches(8))
    run = lambda: trajectory.hessian_top_eigenvalues(
        product, p, jax.random.key(0), num_iters=24
    )
    found = jax.jit(run)()
    truth = np.linalg.eigvalsh(lab.hessian())
    np.testing.assert_allclose(found.top[0], truth[-1], rtol=1e-5)
    np.testing.assert_allclose(found.bottom[0], truth[0], rtol=1e-4, atol=1e-6)


@pytest.mark.deep
def test_hutchinson_is_unbiased_and_its_error_is_the_known_one():
    matrix = lab.hessian()
    variance = 2 * ((matrix**2).sum() - (np.diag(matrix) ** 2).sum())
    dense = jnp.asarray(matrix, jnp.float32)
    run = lambda: trajectory.hessian_trace(
        lambda v: dense @ v, jnp.zeros(SIZE), jax.random.key(0), num_probes=2000
    )
    found = jax.jit(run)()
    assert abs(float(found.trace) - np.trace(matrix)) < 4 * float(found.standard_error)
    expected = (variance / 2000) ** 0.5
    np.testing.assert_allclose(found.standard_error, expected, rtol=0.1)
    alone = trajectory.hessian_trace(
        lambda v: v, jnp.zeros(3), jax.random.key(0), num_probes=1
    )
    assert float(alone.trace) == 3
    assert np.isnan(alone.standard_error)


@pytest.mark.deep
def test_the_density_has_the_moments_of_the_spectrum():
    truth = np.linalg.eigvalsh(lab.hessian())
    dense = jnp.asarray(lab.hessian(), jnp.float32)
    run = lambda: trajectory.spectral_density(
        lambda v: dense @ v, jnp.zeros(SIZE), jax.random.key(0), num_starts=200
    )
    found = jax.jit(run)()
    np.testing.assert_allclose(jnp.trapezoid(found.density, found.grid), 1, rtol=1e-2)
    for power in (1, 2):
        each = (found.weights * found.nodes**power).sum(1)
        error = float(each.std()) / 200**0.5
        assert abs(float(each.mean()) - (truth**power).mean()) < 4 * error
        assert error < 0.2 * (truth**power).mean()


@pytest.mark.deep
def test_costs_and_memory():
    counter = lab.Counter(lab.loss)
    p = jax.tree.map(jnp.float32, lab.params())
    key = jax.random.key(0)
    product = trajectory.hvp(counter, p, lab.batches(8))
    run = lambda: trajectory.lanczos(product, p, key, num_iters=4)
    assert counter.during(run) == 4 * 3
    run = lambda: trajectory.hessian_trace(product, p, key, num_probes=5)
    assert counter.during(run) == 5 * 3

    def temporary(times):
        tree = jax.tree.map(
            lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), lab.batches(8)
        )
        function = lambda t: trajectory.hvp(lab.loss, p, t)(p)
        return jax.jit(function).lower(tree).compile().memory_analysis()

    assert temporary(64).temp_size_in_bytes == temporary(2).temp_size_in_bytes


def test_mistakes_are_named(as_users):
    run = lambda **kw: trajectory.lanczos(
        lambda v: v, jnp.zeros(3), jax.random.key(0), **kw
    )
    with pytest.raises(ValueError, match="num_iters=4 exceeds the 3 parameters"):
        run(num_iters=4)
    with pytest.raises(ValueError, match="k=5 exceeds num_iters=2"):
        trajectory.hessian_top_eigenvalues(
            lambda v: v, jnp.zeros(3), jax.random.key(0), k=5, num_iters=2
        )
    with pytest.raises(ValueError, match="'n' has dtype int32"):
        trajectory.hvp(lab.loss, {"n": jnp.int32(3)}, lab.batches(8))
