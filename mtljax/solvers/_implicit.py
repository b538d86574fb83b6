"""Derivatives of a solution through the equations that it solves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def implicit(
    equations: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    solution: Float[Array, " n"],
) -> Float[Array, " n"]:
    """The solution, unchanged, with the derivatives of a root of ``equations``.

    Whatever array ``equations`` closes over gets derivatives by the implicit function
    theorem, of any order, forward and reverse: one n×n solve, done only where a
    derivative is asked for. The loop that found the solution is not differentiated.
    Scale the equations such that their Jacobian has entries about one; a ridge of a few
    rounding errors keeps the derivatives of degenerate problems finite.
    """

    def tangent_solve(linear, target):
        matrix = jax.jacobian(linear)(jnp.zeros_like(target))
        num = target.shape[0]
        ridge = 2 * num * jnp.finfo(target.dtype).eps
        matrix = matrix + ridge * jnp.eye(num, dtype=target.dtype)
        return jnp.linalg.solve(matrix, target)

    start = jax.lax.stop_gradient(solution)
    return jax.lax.custom_root(equations, start, lambda _, x: x, tangent_solve)
