"""Sharpness: against vertices, limits, closed forms; nothing non-finite is hidden."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

from mtljax import trajectory
from mtljax.trajectory._sharpness import apgd_checkpoints


def run64(rho, size=lab.N, **options):
    with enable_x64(True):
        p, tree = lab.wide(lab.params()), lab.batches(size)
        run = lambda: trajectory.worst_case_sharpness(
            lab.loss, p, tree, rho=rho, **options
        )
        return jax.tree.map(np.asarray, jax.jit(run)())


@pytest.mark.parametrize("rho", [pytest.param(0.01, marks=pytest.mark.deep), 0.2])
def test_it_beats_twenty_thousand_random_vertices_and_stays_in_the_box(rho):
    found = run64(rho)
    with enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(lab.wide(lab.params()))
        batch = lab.wide(lab.data())

        def rise(key):
            signs = jax.random.rademacher(key, flat.shape, flat.dtype)
            moved = unravel(flat + rho * jnp.abs(flat) * signs)
            return lab.loss(moved, batch) - lab.loss(unravel(flat), batch)

        keys = jax.random.split(jax.random.key(0), 20_000)
        rises = jax.jit(lambda k: jax.lax.map(rise, k, batch_size=2000))(keys)
        best = float(rises.max())
    assert found.sharpness > best > 0
    # To second order, no point of the box can be higher than this.
    gradient, curved = lab.per_example_gradients().mean(0), np.abs(lab.hessian())
    size = np.abs(lab.ravel(lab.params()))
    ceiling = rho * size @ np.abs(gradient) + rho**2 / 2 * size @ curved @ size
    assert found.sharpness < 1.2 * ceiling


def test_the_limit_of_a_small_box():
    """ρ⟨|θ|, |∇L^B|⟩, batch by batch."""
    found = run64(1e-6, size=8)
    grads = lab.per_example_gradients().reshape(3, 8, -1).mean(1)
    limit = np.abs(grads) @ np.abs(lab.ravel(lab.params()))
    np.testing.assert_allclose(found.per_batch / 1e-6, limit, rtol=1e-4)
    np.testing.assert_allclose(found.sharpness, found.per_batch.mean(), rtol=1e-12)


def test_a_linear_loss_is_solved_exactly_adaptive_or_not():
    w, x = jnp.array([1.0, -2.0, 0.0]), jnp.array([[1.0, -3.0, 5.0]])
    run = lambda **kw: trajectory.worst_case_sharpness(
        lambda w, x: (w * x).sum(), w, x, rho=0.1, **kw
    )
    np.testing.assert_allclose(run().sharpness, 0.1 * 7, rtol=1e-5)
    # Not adaptive, the zero weight can move too.
    np.testing.assert_allclose(run(adaptive=False).sharpness, 0.9, rtol=1e-5)
    assert (
        trajectory.worst_case_sharpness(
            lambda w, x: (w * x).sum(), w, x, rho=0.0
        ).sharpness
        == 0
    )


def test_a_loss_that_is_not_finite_on_the_way_is_reported():
    loss = lambda w, x: jnp.log(x - w).sum() * -1  # NaN beyond x
    found = trajectory.worst_case_sharpness(
        loss, jnp.array(1.0), jnp.array([[1.05], [9.0]]), rho=0.1
    )
    assert np.isnan(found.per_batch[0])
    assert np.isfinite(found.per_batch[1])
    assert np.isnan(found.sharpness)


def test_the_checkpoints_of_the_cited_work():
    assert [a for a, _ in apgd_checkpoints(20)] == [5, 9, 12, 14, 16, 18, 19]
    at = apgd_checkpoints(100)
    assert [a for a, _ in at][:4] == [22, 41, 57, 70]
    assert all(b - a == length for (a, _), (b, length) in itertools.pairwise(at))


@pytest.mark.deep
def test_sam_is_one_step_along_the_gradient():
    gradient = lab.per_example_gradients().mean(0)
    size = np.abs(lab.ravel(lab.params()))
    with enable_x64(True):
        p, tree = lab.wide(lab.params()), lab.batches(lab.N)
        run = lambda: [
            trajectory.sam_sharpness(lab.loss, p, tree, rho=1e-6, adaptive=a).sharpness
            for a in (False, True)
        ]
        plain, adaptive = map(np.asarray, jax.jit(run)())
    np.testing.assert_allclose(plain / 1e-6, np.linalg.norm(gradient), rtol=1e-4)
    np.testing.assert_allclose(
        adaptive / 1e-6, np.linalg.norm(size * gradient), rtol=1e-4
    )
    flat = trajectory.sam_sharpness(
        lambda w, x: (0 * w * x).sum(), jnp.array(1.0), jnp.ones((1, 1)), rho=1.0
    )
    assert flat.sharpness == 0
    bad = trajectory.sam_sharpness(
        lambda w, x: (x * jnp.sqrt(w)).sum(), jnp.array(-1.0), jnp.ones((1, 1)), rho=1.0
    )
    assert np.isnan(bad.sharpness)


@pytest.mark.deep
def test_the_average_has_its_second_order_value():
    size = lab.ravel(lab.params())
    expected = 0.05**2 / 2 * (size**2 @ np.diag(lab.hessian()))
    p = jax.tree.map(jnp.float32, lab.params())
    run = lambda key: trajectory.average_sharpness(
        lab.loss, p, lab.batches(lab.N), key, rho=0.05, num_draws=400
    )
    keys = jax.random.split(jax.random.key(0), 20)
    found = jax.jit(lambda k: jax.lax.map(run, k))(keys).sharpness
    error = float(found.std(ddof=1)) / 20**0.5
    assert abs(float(found.mean()) - expected) < 4 * error + 0.02 * expected
    assert error < 0.5 * expected


@pytest.mark.deep
def test_costs_and_memory():
    counter = lab.Counter(lab.loss)
    p, tree = jax.tree.map(jnp.float32, lab.params()), lab.batches(8)
    run = lambda: trajectory.worst_case_sharpness(counter, p, tree, rho=0.1)
    assert counter.during(run) == 3 * 21
    run = lambda: trajectory.sam_sharpness(counter, p, tree, rho=0.1)
    assert counter.during(run) == 3 * 2

    def temporary(times):
        more = jax.tree.map(lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), tree)
        function = lambda t: trajectory.worst_case_sharpness(lab.loss, p, t, rho=0.1)
        return jax.jit(function).lower(more).compile().memory_analysis()

    # Two numbers a batch, held twice; a batch has 8 examples of 24 bytes.
    growth = temporary(64).temp_size_in_bytes - temporary(1).temp_size_in_bytes
    assert growth <= 63 * 3 * 2 * 4 * 2


def test_mistakes_are_named(as_users):
    run = lambda **kw: trajectory.worst_case_sharpness(
        lab.loss, lab.params(), lab.batches(8), **kw
    )
    with pytest.raises(ValueError, match=r"rho=-0\.1 must be a finite number"):
        run(rho=-0.1)
    with pytest.raises(ValueError, match="momentum=0 must lie in"):
        run(rho=0.1, momentum=0)
    with pytest.raises(ValueError, match="positive integer, not 0"):
        run(rho=0.1, num_iters=0)
    with pytest.raises(ValueError, match="batches are empty"):
        trajectory.sam_sharpness(lab.loss, lab.params(), jnp.ones((0, 2)), rho=0.1)
