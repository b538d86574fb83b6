"""Measures of the conflict between task gradients.

Every function takes ``gramian[i, j] = <g_i, g_j>``, shape ``[T, T]``, and an optional
boolean ``mask`` of shape ``[T]`` that marks the present tasks. Absent tasks are
ignored. All functions can be compiled and are finite for zero gradients.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def cosine_matrix(
    gramian: Float[ArrayLike, "tasks tasks"],
    mask: Bool[ArrayLike, " tasks"] | None = None,
) -> Float[Array, "tasks tasks"]:
    """Computes the cosine of the angle between every two task gradients.

    Args:
      gramian: Inner products of the task gradients, shape ``[T, T]``.
      mask: Present tasks, shape ``[T]``. By default all are present.

    Returns:
      Cosines in ``[-1, 1]``, shape ``[T, T]``. The row and the column of a zero
      gradient or an absent task are 0, including the diagonal.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import cosine_matrix
      >>> cosine_matrix(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
      Array([[ 1. , -0.5],
             [-0.5,  1. ]], dtype=float32)
    """
    gramian = jnp.asarray(gramian)
    norms = _norms(gramian)
    nonzero = norms > 0
    safe = jnp.where(nonzero, norms, 1)
    cosines = jnp.clip(gramian / safe[:, None] / safe[None, :], -1, 1)
    return jnp.where(_both(nonzero) & _both(_present(gramian, mask)), cosines, 0)


def mean_cosine(
    gramian: Float[ArrayLike, "tasks tasks"],
    mask: Bool[ArrayLike, " tasks"] | None = None,
) -> Float[Array, ""]:
    """Computes the mean cosine over all pairs of different tasks.

    Args:
      gramian: Inner products of the task gradients, shape ``[T, T]``.
      mask: Present tasks, shape ``[T]``. By default all are present.

    Returns:
      A number in ``[-1, 1]``, or 0 with fewer than two tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import mean_cosine
      >>> mean_cosine(jnp.array([[4.0, -1.0], [-1.0, 1.0]]))
      Array(-0.5, dtype=float32)
    """
    gramian = jnp.asarray(gramian)
    return _pair_mean(cosine_matrix(gramian, mask), _present(gramian, mask))


def conflict_rate(
    gramian: Float[ArrayLike, "tasks tasks"],
    mask: Bool[ArrayLike, " tasks"] | None = None,
) -> Float[Array, ""]:
    """Computes the share of task pairs with a negative inner product.

    With two tasks, its mean over the batches of an epoch is the gradient conflict of
    FS-MTL.

    Args:
      gramian: Inner products of the task gradients, shape ``[T, T]``.
      mask: Present tasks, shape ``[T]``. By default all are present.

    Returns:
      A number in ``[0, 1]``, or 0 with fewer than two tasks. A zero gradient conflicts
      with no task, but its pairs are counted.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import conflict_rate
      >>> grads = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]])
      >>> round(float(conflict_rate(grads @ grads.T)), 3)
      0.333

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020, definition 1.
    """
    gramian = jnp.asarray(gramian)
    conflicts = (gramian < 0).astype(gramian.dtype)
    return _pair_mean(conflicts, _present(gramian, mask))


def gradient_magnitude_similarity(
    gramian: Float[ArrayLike, "tasks tasks"],
    mask: Bool[ArrayLike, " tasks"] | None = None,
) -> Float[Array, "tasks tasks"]:
    r"""Computes the similarity of the norms of every two task gradients.

    .. math:: \Phi(g_i, g_j) = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}

    Args:
      gramian: Inner products of the task gradients, shape ``[T, T]``.
      mask: Present tasks, shape ``[T]``. By default all are present.

    Returns:
      Numbers in ``[0, 1]``, shape ``[T, T]``. Equal norms give 1, including two zero
      gradients. The row and the column of an absent task are 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import gradient_magnitude_similarity
      >>> gradient_magnitude_similarity(jnp.diag(jnp.array([4.0, 4.0])))
      Array([[1., 1.],
             [1., 1.]], dtype=float32)

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, 2020, definition 2.
    """
    gramian = jnp.asarray(gramian)
    norms = _norms(gramian)
    short = jnp.minimum(norms[:, None], norms[None, :])
    long = jnp.maximum(norms[:, None], norms[None, :])
    ratio = jnp.where(long > 0, short / jnp.where(long > 0, long, 1), 1)
    similarity = 2 * ratio / (1 + jnp.square(ratio))
    return jnp.where(_both(_present(gramian, mask)), similarity, 0)


def _present(gramian: Array, mask) -> Bool[Array, " tasks"]:
    tasks = gramian.shape[0]
    return jnp.ones(tasks, bool) if mask is None else jnp.asarray(mask)


def _both(flags: Bool[Array, " tasks"]) -> Bool[Array, "tasks tasks"]:
    return flags[:, None] & flags[None, :]


def _norms(gramian: Float[Array, "tasks tasks"]) -> Float[Array, " tasks"]:
    squares = jnp.diagonal(gramian)
    positive = squares > 0  # the derivative of sqrt at zero is infinite
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _pair_mean(
    matrix: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, ""]:
    """Averages over pairs ``i < j`` of present tasks; returns 0 without a pair."""
    pairs = jnp.triu(_both(present), k=1)
    count = jnp.maximum(pairs.sum(), 1).astype(matrix.dtype)
    return jnp.where(pairs, matrix, 0).sum() / count
