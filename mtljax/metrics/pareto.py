"""Quality of a set of trade-offs. Every objective is minimised."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def hypervolume(
    points: Float[ArrayLike, "points objectives"],
    reference: Float[ArrayLike, " objectives"],
) -> Float[Array, ""]:
    """Volume that the points dominate, up to the reference; higher is better.

    Exact, for minimisation, in two objectives (a sweep, ``N log N``) and three (one
    sweep a slab, ``N^2``). Points that do not dominate the reference, or hold a NaN,
    add nothing; dominated points need not be removed. Jit-able and differentiable.
    Negate objectives that are maximised, and the reference with them.

    Args:
      points: Objective values of the solutions.
      reference: A point worse than all solutions of interest.

    Returns:
      The volume, in the product of the objectives' units.

    Raises:
      ValueError: Neither two nor three objectives.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import hypervolume
      >>> points = jnp.array([[1.0, 3.0], [2.0, 1.0], [3.0, 3.0]])
      >>> hypervolume(points, jnp.array([4.0, 4.0]))  # 2 * 3 + 1 * 1
      Array(7., dtype=float32)

    References:
      Zitzler and Thiele, Multiobjective evolutionary algorithms: a comparative case
      study and the strength Pareto approach, 1999.
    """
    points, reference = jnp.asarray(points), jnp.asarray(reference)
    objectives = points.shape[-1]
    if objectives not in (2, 3) or reference.shape != (objectives,):
        raise ValueError(
            "hypervolume takes points [N, M] and a reference [M] with M of 2 or 3; got "
            f"shapes {points.shape} and {reference.shape}."
        )
    inside = (points < reference[None]).all(axis=-1, keepdims=True)  # False with a NaN
    points = jnp.where(inside, points, reference[None])
    points = points[jnp.argsort(points[:, 0])]
    if objectives == 2:
        return _area(points, reference)
    return _volume(points, reference)


def non_dominated(points: Float[ArrayLike, "points objectives"]) -> Bool[Array, " n"]:
    """Which points no other point dominates (Pareto front), for minimisation.

    A point dominates another if it is nowhere worse and somewhere better; equal points
    do not dominate each other. Any number of objectives.

    Args:
      points: Objective values of the solutions.

    Returns:
      True for the points of the front; False for a point with a NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import non_dominated
      >>> non_dominated(jnp.array([[1.0, 3.0], [2.0, 1.0], [3.0, 3.0]]))
      Array([ True,  True, False], dtype=bool)
    """
    points = jnp.asarray(points)
    nowhere_worse = (points[:, None] <= points[None]).all(axis=-1)
    somewhere_better = (points[:, None] < points[None]).any(axis=-1)
    dominated = (nowhere_worse & somewhere_better).any(axis=0)
    return ~dominated & ~jnp.isnan(points).any(axis=-1)


def _area(
    points: Float[Array, "points 2"], reference: Float[Array, " 2"]
) -> Float[Array, ""]:
    """Area for points sorted by the first objective, none beyond the reference."""
    right = jnp.append(points[1:, 0], reference[0])
    lowest = jax.lax.cummin(points[:, 1])
    return jnp.sum((right - points[:, 0]) * (reference[1] - lowest))


def _volume(
    points: Float[Array, "points 3"], reference: Float[Array, " 3"]
) -> Float[Array, ""]:
    """Slabs between successive third objectives, each the area of the points below."""
    floors = jnp.sort(points[:, 2])
    heights = jnp.diff(jnp.append(floors, reference[2]))

    def area(floor):
        below = points[:, 2:] <= floor
        # A point above the slab moves to the reference in y only: x stays sorted.
        second = jnp.where(below, points[:, 1:2], reference[1])
        flat = jnp.concatenate([points[:, :1], second], axis=1)
        return _area(flat, reference[:2])

    return jnp.sum(heights * jax.lax.map(area, floors))
