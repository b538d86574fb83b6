"""Quality of a set of trade-offs between objectives that are minimised."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def hypervolume(
    points: Float[ArrayLike, "points objectives"],
    reference: Float[ArrayLike, " objectives"],
) -> Float[Array, ""]:
    """Computes the volume that the points dominate, bounded by the reference.

    A higher value is better. The computation is exact for two objectives (a sweep,
    ``N log N``) and for three (one sweep per slab, ``N^2``). All objectives are
    minimised. Negate objectives that are maximised, and their reference. Points that do
    not dominate the reference, or that contain a NaN, add nothing. Dominated points
    need not be removed. The function can be compiled and differentiated.

    Args:
      points: Objective values of N solutions, shape ``[N, M]`` with M of 2 or 3.
      reference: A point that is worse than all solutions of interest, shape ``[M]``.

    Returns:
      The volume, in the product of the units of the objectives.

    Raises:
      ValueError: If the number of objectives is not two or three, or if the shapes do
        not match.

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
            "hypervolume: points must have shape [N, M] and the reference shape [M] "
            f"with M of 2 or 3, not {points.shape} and {reference.shape}."
        )
    # The comparison is False for a NaN.
    inside = (points < reference[None]).all(axis=-1, keepdims=True)
    points = jnp.where(inside, points, reference[None])
    points = points[jnp.argsort(points[:, 0])]
    if objectives == 2:
        return _area(points, reference)
    return _volume(points, reference)


def non_dominated(points: Float[ArrayLike, "points objectives"]) -> Bool[Array, " n"]:
    """Marks the points that no other point dominates (the Pareto front).

    All objectives are minimised. A point dominates another if it is not worse in any
    objective and better in at least one. Equal points do not dominate each other. Any
    number of objectives is supported.

    Args:
      points: Objective values of N solutions, shape ``[N, M]``.

    Returns:
      A boolean array of shape ``[N]``, True for the points of the front. It is False
      for a point with a NaN.

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
    """Returns the area for points sorted by the first objective, in the reference."""
    right = jnp.append(points[1:, 0], reference[0])
    lowest = jax.lax.cummin(points[:, 1])
    return jnp.sum((right - points[:, 0]) * (reference[1] - lowest))


def _volume(
    points: Float[Array, "points 3"], reference: Float[Array, " 3"]
) -> Float[Array, ""]:
    """Returns the volume as a sum of slabs between successive third objectives."""
    floors = jnp.sort(points[:, 2])
    heights = jnp.diff(jnp.append(floors, reference[2]))

    def area(floor):
        below = points[:, 2:] <= floor
        # Only the second coordinate of a point above the slab moves to the reference,
        # so that the first coordinate stays sorted.
        second = jnp.where(below, points[:, 1:2], reference[1])
        flat = jnp.concatenate([points[:, :1], second], axis=1)
        return _area(flat, reference[:2])

    return jnp.sum(heights * jax.lax.map(area, floors))
