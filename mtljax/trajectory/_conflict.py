"""Gradient conflict: Gramians per layer, cosines, similarity to the sum."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtljax import metrics, stack
from mtljax.balancer import check_choice, task_vector
from mtljax.gradients import value_and_task_grads
from mtljax.trajectory import _trees as trees
from mtljax.types import Grads, Gramian, Weights

By: TypeAlias = Literal["leaf", "block", "total"]
SimilarityEstimator: TypeAlias = Literal["naive", "split"]


class ConflictMatrix(NamedTuple):
    """Statistics of one Gramian; means over pairs are NaN with a single task."""

    cosine: Gramian  # [T, T]; 0 with a zero gradient
    magnitude_similarity: Gramian  # 2 ‖g_i‖ ‖g_j‖ / (‖g_i‖² + ‖g_j‖²)
    norm: Weights  # ‖g_k‖
    similarity: Weights  # cos(g_k, Σ w_j g_j)
    null: Weights  # the same for orthogonal gradients; 1/√T for equal norms
    conflict_fraction: Float[Array, ""]  # share of pairs with a negative inner product
    mean_cosine: Float[Array, ""]  # over pairs
    pairs: int  # T (T − 1) / 2


class GradientSimilarity(NamedTuple):
    """Result of :func:`gradient_similarity`."""

    similarity: Weights  # [T]
    interval: Float[Array, "tasks 2"]  # of the given confidence
    null: Weights  # similarity of orthogonal gradients with these norms
    cosine: Gramian  # [T, T], by the same estimator
    signal: Weights  # mean squared norm in the estimator; can be negative for "split"
    samples: int  # number of batches, or of pairs of half-batches


def gradient_gram(task_grads: Grads, *, by: By = "total") -> Any:
    """Computes inner products of the task gradients per layer.

    All cosines, norms and similarities follow from them. Store this result instead of
    the gradients.

    Args:
      task_grads: Leaves ``[T, ...]``, from :func:`mtljax.value_and_task_grads`.
      by: ``"leaf"`` returns one matrix per array. ``"block"`` returns one per entry of
        the outermost container, usually a layer. ``"total"`` returns their sum.

    Returns:
      An array of shape ``[T, T]``, or a dictionary of such arrays by path. The dtype
      is at least float32. The cost is T² P multiplications for P parameters.

    Raises:
      ValueError: If the leading axes of the leaves have different lengths.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import gradient_gram
      >>> grads = {"a": jnp.eye(2), "b": jnp.ones((2, 1))}
      >>> gradient_gram(grads).tolist()
      [[2.0, 1.0], [1.0, 2.0]]
      >>> gradient_gram(grads, by="leaf")["b"].tolist()
      [[1.0, 1.0], [1.0, 1.0]]
    """
    check_choice("gradient_gram", "by", by, By)
    tasks = trees.check_length("gradient_gram", "task_grads", task_grads)
    stack.check(task_grads, tasks, "gradient_gram")
    if by == "total":
        return stack.gramian(task_grads)
    found: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(task_grads):
        name = stack.path_name(path if by == "leaf" else path[:1])
        gram = stack.gramian(leaf)
        found[name] = found[name] + gram if name in found else gram
    return found


def conflict_matrix(gramian: Gramian, weights: Weights | None = None) -> ConflictMatrix:
    r"""Computes pairwise and aggregate conflict from a Gramian.

    .. math:: \mathrm{sim}_k = \cos\big(g_k, \textstyle\sum_j w_j g_j\big)

    The sum contains the gradient of task k itself. Orthogonal gradients of equal norm
    therefore have the similarity :math:`1/\sqrt T` and not 0. Compare the similarity
    with ``null``, and do not compare it between different T.

    Args:
      gramian: Inner products of the gradients, shape ``[T, T]``.
      weights: Weights of the sum, by default ones. A task with weight 0 is excluded
        from the sum.

    Returns:
      :class:`ConflictMatrix`: The statistics. No pass is needed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import conflict_matrix
      >>> found = conflict_matrix(jnp.eye(4))
      >>> found.similarity.tolist(), found.null.tolist()
      ([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5])

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      eq. 6. Yu et al., `arXiv 2001.06782 <https://arxiv.org/abs/2001.06782>`_, 2020.
    """
    tasks = gramian.shape[0]
    w = jnp.ones(tasks, gramian.dtype) if weights is None else weights
    similarity, null, _ = _similarities(gramian, w)
    alone = tasks < 2
    return ConflictMatrix(
        cosine=metrics.cosine_matrix(gramian),
        magnitude_similarity=metrics.gradient_magnitude_similarity(gramian),
        norm=jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)),
        similarity=similarity,
        null=null,
        conflict_fraction=jnp.array(jnp.nan) if alone else _conflicts(gramian),
        mean_cosine=jnp.array(jnp.nan) if alone else metrics.mean_cosine(gramian),
        pairs=tasks * (tasks - 1) // 2,
    )


def _conflicts(gramian: Gramian) -> Array:
    return metrics.conflict_rate(gramian)


def _similarities(gramian: Array, w: Array) -> tuple[Array, Array, Array]:
    """Returns similarity, null and cosines; NaN if a squared norm is not positive."""
    squares = jnp.diagonal(gramian)
    lengths = _root(squares)
    toward = jnp.matmul(gramian, w, precision="highest")
    total = _root(jnp.vdot(w, toward, precision="highest"))
    similarity = toward / (lengths * total)
    null = w * lengths / _root(jnp.sum(jnp.square(w) * squares))
    return similarity, null, gramian / (lengths[:, None] * lengths[None, :])


def _root(square: Array) -> Array:
    """Returns √x, or NaN unless x > 0, because the direction is undefined."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), jnp.nan)


def gradient_similarity(
    task_losses: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    *,
    estimator: SimilarityEstimator = "naive",
    weights: Weights | Mapping[str, Any] | None = None,
    confidence: float = 0.95,
) -> GradientSimilarity:
    r"""Measures the similarity of each task gradient to the sum, over many batches.

    ``"naive"`` is the mean of :math:`\cos(g_k^B, \sum_j w_j g_j^B)`, as in the paper.
    The mean reduces the variance of this value, but not its bias. Noise shrinks cosines
    between tasks by :math:`\sqrt{(1 + b_i/B)(1 + b_j/B)}`, with the noise scale b. The
    sum also contains the noise of the task itself. It biases :math:`\mathrm{sim}_k`
    towards :math:`\sqrt{\mathrm{tr}Σ_k / \sum_j \mathrm{tr}Σ_j}`.

    ``"split"`` multiplies only gradients of independent half-batches, and divides after
    averaging:

    .. math:: \frac{\sum_j w_j E⟨g_k^a, g_j^b⟩}
       {\sqrt{E⟨g_k^a, g_k^b⟩ \, \sum_{ij} w_i w_j E⟨g_i^a, g_j^b⟩}}

    This estimates the similarity of the noiseless gradients. It is consistent. With
    large noise its interval is wide, or the value is NaN because the estimate of a
    squared norm is negative. Check ``signal`` and the interval. Intervals describe the
    mean over batches, without the bias. They are normal intervals for ``"naive"`` and
    jackknife intervals over pairs for ``"split"``.

    Args:
      task_losses: A function ``task_losses(params, batch)`` that returns the losses,
        shape ``[T]``, or a dict by task. The result has the order of the dict.
      params: The shared parameters.
      batches: Leaves ``[n, ...]``. For ``"split"``, consecutive pairs are the halves a
        and b. Therefore n must be even, and each entry has half the batch size.
      estimator: ``"naive"`` or ``"split"``, see above.
      weights: Weights of the sum, shape ``[T]`` or a dict by task, by default ones.
        For a weighted step use those of the balancer.
      confidence: Confidence of the interval, between 0 and 1.

    Returns:
      :class:`GradientSimilarity`: Similarities with intervals and null values, and
      pairwise cosines. With one task, similarity and null are 1. The cost is n T
      gradients. The memory is T copies of the parameters (2 T for ``"split"``).

    Raises:
      ValueError: If n is too small or odd for ``"split"``, or if ``confidence`` is not
        in (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import gradient_similarity
      >>> losses = lambda w, x: jnp.stack([(x[:, 0] @ w), (x[:, 1] @ w)])
      >>> x = jnp.broadcast_to(jnp.eye(2), (4, 2, 2))  # two orthogonal gradients
      >>> found = gradient_similarity(losses, jnp.ones(2), x)
      >>> found.similarity.tolist(), found.null.tolist()
      ([0.707, 0.707], [0.707, 0.707])

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024.
    """
    name = "gradient_similarity"
    check_choice(name, "estimator", estimator, SimilarityEstimator)
    if not 0 < confidence < 1:
        raise ValueError(f"{name}: confidence={confidence} must lie between 0 and 1.")
    count = trees.check_length(name, "batches", batches)
    split = estimator == "split"
    if split and (count % 2 or count < 4):
        raise ValueError(
            f"{name}: estimator='split' pairs half-batches, and needs an even number "
            f"of at least 4, not {count}."
        )
    values_and_rows = value_and_task_grads(task_losses)
    names: tuple[str, ...] | None = None

    def rows(batch):
        nonlocal names
        losses, found = values_and_rows(params, batch)
        names = tuple(losses) if isinstance(losses, Mapping) else None
        return found

    def gram(batch):
        return stack.gramian(rows(batch))

    def cross(pair):
        halves = [jax.tree.map(lambda x, i=i: x[i], pair) for i in (0, 1)]
        product = stack.cross_gramian(*map(rows, halves))
        return (product + product.T) / 2

    if split:
        pairs = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), batches)
        grams = jax.lax.map(cross, pairs)
    else:
        grams = jax.lax.map(gram, batches)
    samples, tasks = grams.shape[0], grams.shape[-1]
    w = jnp.ones(tasks, grams.dtype)
    if weights is not None:
        w = task_vector(weights, names)
    reach = jax.scipy.special.ndtri((1 + confidence) / 2)
    if split:
        total = grams.sum(0)
        similarity, null, cosine = _similarities(total / samples, w)
        # The jackknife of a ratio of means deletes one pair and divides again.
        without = jax.vmap(lambda g: _similarities((total - g) / (samples - 1), w)[0])
        apart = without(grams) - similarity[None]
        error = jnp.sqrt((samples - 1) * jnp.square(apart).mean(0))
    else:
        each, nulls, cosines = jax.vmap(lambda g: _similarities(g, w))(grams)
        similarity, null, cosine = each.mean(0), nulls.mean(0), cosines.mean(0)
        spread = each.std(0, ddof=1) if samples > 1 else jnp.full(tasks, jnp.nan)
        error = spread / samples**0.5
    return GradientSimilarity(
        similarity=similarity,
        interval=jnp.stack([similarity - reach * error, similarity + reach * error], 1),
        null=null,
        cosine=cosine,
        signal=jnp.diagonal(grams.mean(0)),
        samples=samples,
    )
