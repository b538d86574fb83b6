"""Preferences: restricted to the present tasks, whatever the absent ones hold."""

import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64

from mtljax.methods._preference import (
    constant_preference,
    present_preference,
    task_vector,
)

MASK = jnp.array([True, False, True])


def test_equal_by_default():
    got = present_preference("x", None, None, MASK, jnp.float32)
    np.testing.assert_allclose(got, [0.5, 0, 0.5])


def test_given_replaces_constant_and_both_are_normalised():
    constant, given = jnp.array([1.0, 5.0, 3.0]), jnp.array([2.0, 5.0, 2.0])
    got = present_preference("x", constant, None, MASK, jnp.float32)
    np.testing.assert_allclose(got, [0.25, 0, 0.75])
    got = present_preference("x", constant, given, MASK, jnp.float32)
    np.testing.assert_allclose(got, [0.5, 0, 0.5])


def test_no_present_task_preferred():
    got = present_preference("x", jnp.array([0.0, 1.0, 0.0]), None, MASK, jnp.float32)
    np.testing.assert_array_equal(got, np.zeros(3))


def test_a_negative_entry_of_a_step_gives_nan():
    given = jnp.array([1.0, 5.0, -1.0])
    got = present_preference("x", None, given, MASK, jnp.float32)
    assert np.isnan(got[0])


def test_constants_keep_their_digits():
    with enable_x64():
        constant = constant_preference("x", 3, [1 / 3, 0, 1])
        got = present_preference("x", constant, None, MASK, jnp.float64)
        np.testing.assert_allclose(got, [0.25, 0, 0.75], rtol=1e-15)


def test_one_number_for_all_tasks():
    np.testing.assert_array_equal(task_vector("x", "ideal", 3, 0.5), np.full(3, 0.5))


@pytest.mark.usefixtures("as_users")
def test_errors():
    with pytest.raises(ValueError, match=r"x: preference has shape \(\)"):
        constant_preference("x", 3, 1.0)
    with pytest.raises(ValueError, match=r"not all zero, not \[0.0, 0.0\]"):
        constant_preference("x", 2, [0.0, 0.0])
    with pytest.raises(ValueError, match=r"x: ideal has shape \(2,\)"):
        task_vector("x", "ideal", 3, [1.0, 2.0])
