"""How much task gradients disagree, from their Gramian.

Every function takes ``gramian[i, j] = <g_i, g_j>`` and an optional ``mask`` of the
tasks that are present; absent tasks are ignored. All are jit-able and finite for zero
gradients.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def cosine_matrix(
    gramian: Float[ArrayLike, "tasks tasks"],
    mask: Bool[ArrayLike, " tasks"] | None = None,
) -> Float[Array, "tasks tasks"]:
    """Cosine of the angle between every two task gradients.

    Args:
      gramian: Inner products of the task gradients.
      mask: Tasks present; all by default.

    Returns:
      Cosines in ``[-1, 1]``; 0 in the row and column of a zero gradient and of an
      absent task, the diagonal included.

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
    """Mean cosine over all pairs of different tasks.

    Args:
      gramian: Inner products of the task gradients.
      mask: Tasks present; all by default.

    Returns:
      A number in ``[-1, 1]``; 0 with fewer than two tasks.

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
    """Share of task pairs whose gradients have a negative inner product.

    With two tasks, its mean over the batches of an epoch is FS-MTL's gradient conflict.

    Args:
      gramian: Inner products of the task gradients.
      mask: Tasks present; all by default.

    Returns:
      A number in ``[0, 1]``; 0 with fewer than two tasks. A zero gradient conflicts
      with none, and its pairs count.

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
    r"""How equal the lengths of every two task gradients are.

    .. math:: \Phi(g_i, g_j) = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2}

    Args:
      gramian: Inner products of the task gradients.
      mask: Tasks present; all by default.

    Returns:
      Numbers in ``[0, 1]``, 1 for equal lengths, which two zero gradients have; 0 in
      the row and column of an absent task.

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
    positive = squares > 0  # the slope of sqrt at zero is infinite
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def _pair_mean(
    matrix: Float[Array, "tasks tasks"], present: Bool[Array, " tasks"]
) -> Float[Array, ""]:
    """Mean over pairs ``i < j`` of present tasks; 0 if there is none."""
    pairs = jnp.triu(_both(present), k=1)
    count = jnp.maximum(pairs.sum(), 1).astype(matrix.dtype)
    return jnp.where(pairs, matrix, 0).sum() / count
