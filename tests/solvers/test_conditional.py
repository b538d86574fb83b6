"""Weights on the simplex under masks."""

import jax
import jax.numpy as jnp
import numpy as np

from mtljax.solvers._conditional import on_present

ALL, SOME = jnp.ones(4, bool), jnp.array([True, False, True, True])


def halve_the_first(weights):
    return weights.at[0].multiply(0.5) / (1 - 0.5 * weights[0])


def test_all_present_is_the_step():
    weights = jnp.array([0.4, 0.3, 0.2, 0.1])
    new, kept = on_present(weights, ALL, halve_the_first)
    np.testing.assert_allclose(new, np.array([0.2, 0.3, 0.2, 0.1]) / 0.8, rtol=1e-6)
    np.testing.assert_allclose(kept, new, rtol=1e-6)


def test_absent_entries_stay_and_the_others_share_what_they_had():
    weights = jnp.array([0.4, 0.3, 0.2, 0.1])
    new, kept = on_present(weights, SOME, halve_the_first)
    np.testing.assert_allclose(new, np.array([0.2, 0, 0.2, 0.1]) / 0.5, rtol=1e-6)
    np.testing.assert_allclose(kept, [0.28, 0.3, 0.28, 0.14], rtol=1e-6)


def test_an_absent_task_does_not_show():
    big, small = jnp.full(4, 0.25), jnp.full(3, 1 / 3)
    for _ in range(4):
        new, big = on_present(big, SOME, halve_the_first)
        alone, small = on_present(small, jnp.ones(3, bool), halve_the_first)
        np.testing.assert_allclose(new[jnp.array([0, 2, 3])], alone, rtol=1e-5)


def test_present_tasks_without_mass_start_from_equal_shares():
    weights = jnp.array([0.0, 1.0, 0.0, 0.0])
    new, kept = on_present(weights, SOME, lambda w: w)
    np.testing.assert_allclose(new, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(kept, [0.25, 1, 0.25, 0.25], rtol=1e-6)


def test_nobody_present():
    weights = jnp.array([0.4, 0.3, 0.2, 0.1])
    new, kept = jax.jit(lambda w, m: on_present(w, m, lambda s: s))(
        weights, jnp.zeros(4, bool)
    )
    np.testing.assert_array_equal(new, np.zeros(4))
    np.testing.assert_array_equal(kept, weights)
