"""Robustness of a score to perturbations of the weights."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

Loop: TypeAlias = Literal["unrolled", "map", "vmap"]


def weight_noise(params: PyTree, key: PRNGKeyArray, magnitude: ArrayLike) -> PyTree:
    r"""Moves all weights together by a given distance in a random direction.

    The result is :math:`\theta + \gamma u` with u uniform on the unit sphere of all
    floating-point parameters. Other leaves do not change.

    Args:
      params: The parameters.
      key: Random key of u. Every leaf uses its own key.
      magnitude: :math:`\gamma`, in the units of the parameters.

    Returns:
      The moved parameters. Each leaf keeps its dtype.

    Raises:
      ValueError: If there is no floating-point parameter.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.metrics.robustness import weight_noise
      >>> moved = weight_noise(jnp.zeros(100), jax.random.key(0), 2.0)
      >>> round(float(jnp.linalg.norm(moved)), 4)
      2.0
    """
    leaves, treedef = jax.tree.flatten(params)
    noise = []
    for number, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            draw = jax.random.fold_in(key, number)
            noise.append(jax.random.normal(draw, leaf.shape, dtype))
        else:
            noise.append(None)
    squares = [jnp.square(z).sum() for z in noise if z is not None]
    if not squares:
        raise ValueError("weight_noise: params hold no floating-point array.")
    scale = jnp.asarray(magnitude, squares[0].dtype) / jnp.sqrt(sum(squares))
    moved = [
        leaf
        if z is None
        else (leaf.astype(z.dtype) + scale.astype(z.dtype) * z).astype(leaf.dtype)
        for leaf, z in zip(leaves, noise, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)


def weight_noise_robustness(
    score: Callable[[PyTree], PyTree],
    params: PyTree,
    *,
    key: PRNGKeyArray,
    magnitudes: Sequence[float],
    num_draws: int = 10,
    loop: Loop = "unrolled",
) -> PyTree:
    """Evaluates a score at random points on spheres around the weights.

    The score falls more slowly in a wider minimum. FS-MTL samples 10 directions for
    each of the magnitudes 0, 50, …, 950. These are the values of its reference code,
    in the units of a ResNet-18. All magnitudes use the same directions.

    Args:
      score: A function ``score(params)`` that returns arrays, for example the accuracy
        of every task. It closes over the data and over the running averages of batch
        normalisation, which are not estimated again. Compile it for ``"unrolled"``.
      params: The parameters.
      key: Random key of the directions.
      magnitudes: The M distances, see :func:`weight_noise`.
      num_draws: D, the number of directions.
      loop: ``"unrolled"`` calls ``score`` M D times, one call after another. ``"map"``
        loops inside a compiled program. ``"vmap"`` evaluates all points at once.

    Returns:
      The arrays of ``score`` with two leading axes, ``[M, D, ...]``. The cost is M D
      evaluations of ``score``.

    Raises:
      ValueError: If there is no magnitude, no direction or no floating-point parameter.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.metrics.robustness import weight_noise_robustness
      >>> loss = jax.jit(lambda p: jnp.square(p).sum())
      >>> found = weight_noise_robustness(
      ...     loss, jnp.zeros(4), key=jax.random.key(0), magnitudes=[0.0, 3.0])
      >>> found.shape, found.mean(1).tolist()
      ((2, 10), [0.0, 9.0])

    References:
      Phan et al., `arXiv 2211.13723 <https://arxiv.org/abs/2211.13723>`_, 2022.
    """
    if loop not in get_args(Loop):
        listed = ", ".join(map(repr, get_args(Loop)))
        raise ValueError(
            f"weight_noise_robustness: loop={loop!r} is not one of {listed}."
        )
    if num_draws < 1 or not len(magnitudes):
        raise ValueError(
            "weight_noise_robustness needs at least one magnitude and one draw, not "
            f"magnitudes={list(magnitudes)} and num_draws={num_draws}."
        )
    keys = jax.random.split(key, num_draws)
    distances = jnp.asarray(magnitudes, jnp.float32)

    def at(distance, draw):
        return score(weight_noise(params, draw, distance))

    if loop == "unrolled":
        move = jax.jit(weight_noise)
        found = [[score(move(params, k, d)) for k in keys] for d in distances]
        rows = [jax.tree.map(lambda *x: jnp.stack(x), *row) for row in found]
        return jax.tree.map(lambda *x: jnp.stack(x), *rows)
    if loop == "map":

        def over_draws(distance):
            return jax.lax.map(lambda draw: at(distance, draw), keys)

        return jax.lax.map(over_draws, distances)
    return jax.vmap(jax.vmap(at, (None, 0)), (0, None))(distances, keys)
