"""Gradient covariance: brute force, unbiasedness by simulation, small differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

from mtljax import trajectory


def moments_of(grads):
    mean = grads.mean(0)
    return ((grads - mean) ** 2).sum(1).mean(), (mean**2).sum()


def run64(function):
    with enable_x64(True):
        found = jax.jit(function)()
        return jax.tree.map(np.asarray, found)


def test_moments_are_those_of_the_batch_gradients():
    grads = lab.per_example_gradients().reshape(6, 4, -1).mean(1)
    found = run64(
        lambda: trajectory.gradient_moments(
            lab.loss, lab.wide(lab.params()), lab.batches(4)
        )
    )
    spread, square = moments_of(grads)
    np.testing.assert_allclose(found.mean_square, (grads**2).sum(1).mean(), rtol=1e-12)
    np.testing.assert_allclose(found.square_mean, square, rtol=1e-12)
    np.testing.assert_allclose(found.spread, spread, rtol=1e-11)
    np.testing.assert_allclose(lab.ravel(found.mean), grads.mean(0), rtol=1e-10)
    np.testing.assert_allclose(
        found.loss,
        run64(lambda: lab.loss(lab.wide(lab.params()), lab.wide(lab.data()))),
        rtol=1e-12,
    )


def estimates(count=4000, population=lab.N):
    """Of many draws of 12 of 24 examples in batches of 4, on linear gradients."""
    grads = lab.per_example_gradients()

    def one(key):
        # Linear in the parameter: an example's gradient is its row.
        rows = jnp.asarray(grads)[jax.random.permutation(key, lab.N)[:12]]
        drawn = trajectory.gradient_covariance_trace(
            lambda w, g: (g @ w).mean(),
            jnp.zeros(grads.shape[1]),
            rows.reshape(3, 4, -1),
            batch_size=4,
            population=population,
        )
        return drawn.trace, drawn.square_norm

    keys = jax.random.split(jax.random.key(0), count)
    return [np.asarray(x) for x in jax.jit(lambda: jax.lax.map(one, keys))()]


@pytest.mark.deep
def test_the_estimates_are_unbiased_and_not_without_the_correction():
    """Over re-draws, within 4 standard errors; without N the trace is beyond them."""
    trace, square = moments_of(lab.per_example_gradients())
    for values, truth in zip(estimates(), (trace, square), strict=True):
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - truth) < 4 * error
        assert error < 0.02 * truth  # so that the first line can fail
    plain, _ = estimates(population=None)
    assert plain.mean() - trace > 4 * plain.std() / len(plain) ** 0.5


def test_all_examples_drawn_is_exact():
    """L = N: ‖∇L‖² is G_L; with B = 1 the trace is the population's."""
    found = run64(
        lambda: trajectory.gradient_covariance_trace(
            lab.loss,
            lab.wide(lab.params()),
            lab.batches(1),
            batch_size=1,
            population=lab.N,
        )
    )
    trace, square = moments_of(lab.per_example_gradients())
    np.testing.assert_allclose(found.trace, trace, rtol=1e-11)
    np.testing.assert_allclose(found.square_norm, square, rtol=1e-11)
    np.testing.assert_allclose(found.noise_scale, trace / square, rtol=1e-11)


def test_a_negative_squared_norm_is_returned_and_has_no_noise_scale():
    rows = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
    found = trajectory.gradient_covariance_trace(
        lambda w, x: (w * x).mean(), jnp.array(1.0), rows, batch_size=1, population=None
    )
    np.testing.assert_allclose(found.trace, 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(found.square_norm, -1 / 3, rtol=1e-6)
    assert np.isnan(found.noise_scale)


def test_a_small_spread_survives_in_float32():
    """Gradients 1000 ± 0.01: G_B − G_L in float32 would have no digit left."""
    noise = 0.01 * np.random.default_rng(0).normal(size=(16, 1))
    rows = jnp.asarray(1000 + noise, jnp.float32)
    found = trajectory.gradient_moments(
        lambda w, x: (w * x).mean(), jnp.array(1.0), rows
    )
    truth = np.asarray(rows, np.float64).var()
    naive = float(found.mean_square) - float(found.square_mean)
    assert abs(float(found.spread) / truth - 1) < 0.02
    assert abs(naive / truth - 1) > 0.5


def test_m_coherence_and_diversity():
    grads = lab.per_example_gradients()
    found = run64(
        lambda: trajectory.m_coherence(
            lab.loss, lab.wide(lab.params()), lab.wide(lab.data())
        )
    )
    coherence = lab.N * (grads.mean(0) ** 2).sum() / (grads**2).sum(1).mean()
    np.testing.assert_allclose(found.m_coherence, coherence, rtol=1e-11)
    np.testing.assert_allclose(
        found.diversity, (grads**2).sum() / (grads.sum(0) ** 2).sum(), rtol=1e-11
    )
    same = trajectory.m_coherence(
        lambda w, x: (x * w).mean(), jnp.array(1.0), jnp.ones((7, 1))
    )
    np.testing.assert_allclose(same.m_coherence, 7, rtol=1e-5)


@pytest.mark.deep
def test_stiffness_by_pairs_and_by_groups():
    grads = lab.per_example_gradients()
    unit = grads / np.linalg.norm(grads, axis=1, keepdims=True)
    cosine = unit @ unit.T
    y = lab.data()["y"]

    def run(**options):
        with enable_x64(True):
            p, d = lab.wide(lab.params()), lab.wide(lab.data())
            right = jax.tree.map(lambda x: x[:9], d)
            function = lambda: trajectory.stiffness_matrix(
                lab.loss, p, d, right, **options
            )
            return jax.tree.map(np.asarray, jax.jit(function)())

    found = run(block=8)
    np.testing.assert_allclose(found.cosine, cosine[:, :9], atol=1e-12)
    np.testing.assert_array_equal(found.sign, np.sign(cosine[:, :9]))
    labels = jnp.asarray(y), jnp.asarray(y[:9])
    grouped = run(groups=labels, num_groups=lab.CLASSES)
    for i in range(lab.CLASSES):
        for j in range(lab.CLASSES):
            block = cosine[y == i][:, :9][:, y[:9] == j]
            assert grouped.pairs[i, j] == block.size
            expected = block.mean() if block.size else np.nan
            np.testing.assert_allclose(grouped.cosine[i, j], expected, atol=1e-12)


@pytest.mark.deep
def test_cost_and_memory():
    """n gradients of B; temporary memory does not grow with the number of batches."""
    counter = lab.Counter(lab.loss)
    p = jax.tree.map(jnp.float32, lab.params())

    def run(tree):
        return trajectory.gradient_covariance_trace(
            counter, p, tree, batch_size=4, population=None
        )

    assert counter.during(lambda: run(lab.batches(4))) == 6

    def temporary(times):
        tree = jax.tree.map(
            lambda x: jnp.tile(x, (times,) + (1,) * (x.ndim - 1)), lab.batches(4)
        )
        function = lambda tree: trajectory.gradient_covariance_trace(
            lab.loss, p, tree, batch_size=4, population=None
        )
        compiled = jax.jit(function).lower(tree).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Two scalars a batch are kept; an example takes 24 bytes, its gradient 156.
    assert temporary(64) - temporary(1) <= 63 * 6 * 2 * 4 * 2


def test_mistakes_are_named(as_users):
    run = lambda tree, **kw: trajectory.gradient_covariance_trace(
        lab.loss, lab.params(), tree, **kw
    )
    with pytest.raises(ValueError, match="one batch has no spread"):
        run(lab.batches(24), batch_size=24, population=24)
    with pytest.raises(ValueError, match="population=20"):
        run(lab.batches(4), batch_size=4, population=20)
    with pytest.raises(ValueError, match="different lengths"):
        run({"x": np.ones((3, 2)), "y": np.ones((4, 2))}, batch_size=2, population=None)
    with pytest.raises(ValueError, match="block=7 must divide the 24"):
        trajectory.stiffness_matrix(
            lab.loss, lab.params(), lab.data(), lab.data(), block=7
        )
