"""The status before any solve is of the types of one after."""

import chex
import jax
import jax.numpy as jnp

from mtljax import solvers


def test_types_agree():
    for solve in (solvers.min_norm_point, solvers.solve_bargaining):
        _, status = jax.eval_shape(solve, jnp.eye(2))
        chex.assert_trees_all_equal_shapes_and_dtypes(status, solvers.unsolved())
    assert solvers.unsolved().converged
