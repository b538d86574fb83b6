"""Distances between runs, paths between them, and slices of the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.trajectory import _trees as trees
from mtljax.trajectory._sharpness import random_tree

Loss = Callable[[Any, Any], Any]


class LinearPath(NamedTuple):
    """Result of :func:`linear_mode_connectivity`."""

    alphas: Float[Array, " points"]
    losses: Float[Array, "points ..."]  # at (1 − α) a + α b; last axis: tasks, if any
    barrier: Float[Array, "..."]  # maximum over α of the excess over the chord


def parameter_distance(a: Any, b: Any, start: Any = None) -> Float[Array, ""]:
    """Computes the Euclidean distance between two sets of parameters.

    Args:
      a: Parameters.
      b: Parameters of the same shapes.
      start: Common initialisation. If given, the distance is divided by the mean norm
        of the two displacements from it.

    Returns:
      The distance, a scalar. It is NaN relative to displacements of 0. No pass is
      needed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import parameter_distance
      >>> float(parameter_distance(jnp.array([3.0, 0.0]), jnp.array([0.0, 4.0])))
      5.0
    """
    apart = jnp.sqrt(trees.square_norm(trees.difference(a, b)))
    if start is None:
        return apart
    moved = [jnp.sqrt(trees.square_norm(trees.difference(x, start))) for x in (a, b)]
    return apart / ((moved[0] + moved[1]) / 2)


def displacement_cosine(a: Any, b: Any, start: Any) -> Float[Array, ""]:
    """Computes the cosine between the displacements of two runs from a common start.

    Args:
      a: Parameters of a run.
      b: Parameters of another run.
      start: Common initialisation of both runs.

    Returns:
      A number in ``[-1, 1]``, or NaN if a run did not move. No pass is needed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import displacement_cosine
      >>> zero = jnp.zeros(2)
      >>> found = displacement_cosine(
      ...     jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]), zero)
      >>> round(float(found), 4)
      0.7071
    """
    left, right = (trees.difference(x, start) for x in (a, b))
    norms = trees.square_norm(left) * trees.square_norm(right)
    return trees.dot(left, right) / jnp.sqrt(norms)


def linear_mode_connectivity(
    loss: Loss,
    a: Any,
    b: Any,
    batches: Any,
    *,
    num_points: int = 11,
    prepare: Callable[[Any], Any] | None = None,
) -> LinearPath:
    """Computes the loss on the straight line between two runs, and its barrier.

    The barrier is ``max_α L((1 − α) a + α b) − [(1 − α) L(a) + α L(b)]``, at least 0.
    It is 0 if the loss on the line is convex, and positive if it rises above the chord.

    Args:
      loss: ``loss(params, batch)``, a mean over the batch: a scalar, or ``[T]``.
      a: Parameters.
      b: Parameters of the same shapes.
      batches: Leaves ``[n, B, ...]``.
      num_points: Number of points on the line, including both ends.
      prepare: ``prepare(params)`` returns the argument of ``loss`` for the parameters
        at a point. With batch normalisation, recompute the running averages there,
        because those of the ends are wrong between the ends.

    Returns:
      :class:`LinearPath`: Positions, losses and barrier. The cost is num_points · n
      forward passes. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If ``num_points`` is below 3, or if there is no batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import linear_mode_connectivity
      >>> loss = lambda w, x: jnp.square(w**2 - x).mean()  # minima at -1 and 1
      >>> path = linear_mode_connectivity(
      ...     loss, jnp.array(-1.0), jnp.array(1.0), jnp.ones((1, 1)), num_points=3)
      >>> path.losses.tolist(), float(path.barrier)
      ([0.0, 1.0, 0.0], 1.0)

    References:
      Frankle et al., `arXiv 1912.05671 <https://arxiv.org/abs/1912.05671>`_, 2019.
      Mirzadeh et al., `arXiv 2010.04495 <https://arxiv.org/abs/2010.04495>`_, 2020,
      for several tasks.
    """
    name = "linear_mode_connectivity"
    trees.check_positive(name, "num_points", num_points)
    if num_points < 3:
        raise ValueError(f"{name}: num_points={num_points} must be at least 3.")
    count = trees.check_length(name, "batches", batches)
    direction = trees.difference(b, a)

    def at(alpha):
        params = trees.shifted(a, direction, alpha)
        ready = params if prepare is None else prepare(params)
        return trees.mean_over(lambda batch: loss(ready, batch), batches, count)

    alphas = jnp.linspace(0.0, 1.0, num_points)
    losses = jax.lax.map(at, alphas)
    share = alphas.reshape((-1,) + (1,) * (losses.ndim - 1)).astype(losses.dtype)
    chord = (1 - share) * losses[:1] + share * losses[-1:]
    # The ends are on the chord, so their excess is 0 and not a rounding error.
    excess = jnp.where((share == 0) | (share == 1), 0, losses - chord)
    return LinearPath(alphas, losses, excess.max(0))


def filter_normalized(direction: Any, params: Any) -> Any:
    """Scales every filter of a direction to the norm of the same filter in ``params``.

    A filter contains the weights of one output, along all axes but the last. Vectors
    and scalars, such as biases and norm parameters, become 0.

    Args:
      direction: A tree with the structure of ``params``.
      params: The weights.

    Returns:
      The direction, at least float32. A zero filter remains zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import filter_normalized
      >>> w = jnp.array([[3.0, 1.0], [4.0, 0.0]])  # two filters of norms 5 and 1
      >>> filter_normalized(jnp.ones((2, 2)), w)[0].tolist()
      [3.536, 0.707]

    References:
      Li et al., `arXiv 1712.09913 <https://arxiv.org/abs/1712.09913>`_, 2017.
    """

    def scale(d, p):
        d, p = trees.wide(d), trees.wide(p)
        if d.ndim < 2:
            return jnp.zeros_like(d)
        axes = tuple(range(d.ndim - 1))
        length, wanted = (
            jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (d, p)
        )
        return d * jnp.where(length > 0, wanted / jnp.where(length > 0, length, 1), 0)

    return jax.tree.map(scale, direction, params)


def random_direction(key: PRNGKeyArray, params: Any) -> Any:
    """Samples a filter-normalised Gaussian direction.

    Args:
      key: Random key.
      params: The weights, whose filter norms the direction has.

    Returns:
      A tree with the structure of ``params``, at least float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import random_direction
      >>> w = jnp.array([[3.0], [4.0]])
      >>> direction = random_direction(jax.random.key(0), w)
      >>> round(float(jnp.linalg.norm(direction)), 4)
      5.0
    """
    return filter_normalized(random_tree(key, params), params)


def loss_slice(
    loss: Loss,
    params: Any,
    directions: tuple[Any, ...],
    batches: Any,
    *,
    radius: float = 1.0,
    num_points: int = 25,
) -> tuple[Float[Array, " points"], Array]:
    """Computes the loss along one direction, or on the plane of two directions.

    Args:
      loss: ``loss(params, batch)``, a mean over the batch: a scalar, or ``[T]``.
      params: The centre.
      directions: One or two trees with the structure of ``params``, for example from
        :func:`random_direction` or towards another run.
      batches: Leaves ``[n, B, ...]``.
      radius: Coefficients range from −radius to radius.
      num_points: A, the number of points in each direction. It must be odd, so that
        the centre is a point.

    Returns:
      A pair of coefficients ``[A]`` and losses ``[A, ...]`` or ``[A, A, ...]``. The
      first axis is along the first direction. The cost is A or A² times n forward
      passes. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If the number of directions is not one or two, or if ``num_points`` is
        even.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import loss_slice
      >>> loss = lambda w, x: (x * w**2).sum()
      >>> at, values = loss_slice(
      ...     loss, jnp.array(1.0), (jnp.array(1.0),), jnp.ones((1, 1)), num_points=3)
      >>> at.tolist(), values.tolist()
      ([-1.0, 0.0, 1.0], [0.0, 1.0, 4.0])

    References:
      Li et al., `arXiv 1712.09913 <https://arxiv.org/abs/1712.09913>`_, 2017.
    """
    name = "loss_slice"
    trees.check_positive(name, "num_points", num_points)
    if len(directions) not in (1, 2):
        raise ValueError(f"{name}: {len(directions)} directions; give one or two.")
    if num_points % 2 == 0:
        raise ValueError(f"{name}: num_points={num_points} must be odd.")
    count = trees.check_length(name, "batches", batches)
    grid = jnp.linspace(-radius, radius, num_points)

    def mean_loss(point):
        return trees.mean_over(lambda batch: loss(point, batch), batches, count)

    def along(centre, rest):
        def at(coefficient):
            point = trees.shifted(centre, rest[0], coefficient)
            return along(point, rest[1:]) if rest[1:] else mean_loss(point)

        return jax.lax.map(at, grid)

    return grid, along(params, directions)
