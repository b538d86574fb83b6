"""Implicit differentiation of the solution of a system of equations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def implicit(
    equations: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    solution: Float[Array, " n"],
) -> Float[Array, " n"]:
    """Returns the solution with the derivatives of a root of ``equations``.

    The arrays over which ``equations`` closes have derivatives of any order, in forward
    and reverse mode, by the implicit function theorem. A derivative costs one n×n
    solve. The loop that found the solution is not differentiated. Scale the equations
    such that the entries of their Jacobian are about one. A ridge of a few rounding
    errors keeps the derivatives of degenerate problems finite.

    Args:
      equations: Function of x, shape ``[n]``, that is zero at the solution.
      solution: The root, shape ``[n]``.

    Returns:
      The solution with unchanged values, shape ``[n]``.
    """

    def tangent_solve(linear, target):
        matrix = jax.jacobian(linear)(jnp.zeros_like(target))
        num = target.shape[0]
        ridge = 2 * num * jnp.finfo(target.dtype).eps
        matrix = matrix + ridge * jnp.eye(num, dtype=target.dtype)
        return jnp.linalg.solve(matrix, target)

    start = jax.lax.stop_gradient(solution)
    return jax.lax.custom_root(equations, start, lambda _, x: x, tangent_solve)
