"""Gradient covariance: its trace, noise scale, m-coherence and stiffness."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtljax.trajectory import _trees as trees

Loss = Callable[[Any, Any], Any]


class GradientMoments(NamedTuple):
    """Moments of the gradients of n batches."""

    loss: Float[Array, ""]  # mean of the batch losses
    mean_square: Float[Array, ""]  # G_B = mean ‖g_b‖²
    square_mean: Float[Array, ""]  # G_L = ‖mean g_b‖²
    spread: Float[Array, ""]  # G_B − G_L = mean ‖g_b − mean‖², never negative
    mean: Any  # the gradient of all examples, a tree like params


class GradientCovariance(NamedTuple):
    """Estimates of :func:`gradient_covariance_trace`."""

    trace: Float[Array, ""]  # tr Σ, per example
    square_norm: Float[Array, ""]  # ‖∇L‖², unbiased, so it can be negative
    noise_scale: Float[Array, ""]  # tr Σ / ‖∇L‖², in examples; NaN if ‖∇L‖² <= 0
    loss: Float[Array, ""]  # mean over the sampled examples


class PerExample(NamedTuple):
    """Result of :func:`m_coherence`."""

    m_coherence: Float[Array, ""]  # in [0, m]
    diversity: Float[Array, ""]  # its reciprocal
    trace: Float[Array, ""]  # E‖g_x‖² − ‖ḡ‖² over these m examples
    square_norm: Float[Array, ""]  # ‖ḡ‖²


def gradient_moments(loss: Loss, params: Any, batches: Any) -> GradientMoments:
    """Computes first and second moments of the gradients of n batches in one pass.

    The spread is accumulated around the running mean (Welford's algorithm). It is not a
    difference of two large numbers, so it remains accurate late in training in float32.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: Parameters to differentiate with respect to, usually the shared ones.
      batches: Leaves ``[n, B, ...]``.

    Returns:
      :class:`GradientMoments`: The moments. The cost is n gradients of B examples. The
      memory is 3 copies of the parameters.

    Raises:
      ValueError: If there is no batch, or if lengths differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import gradient_moments
      >>> found = gradient_moments(
      ...     lambda w, x: 0.5 * (w - x).mean() ** 2, jnp.array(0.0),
      ...     jnp.array([[1.0], [3.0]]))
      >>> [float(x) for x in found]
      [2.5, 5.0, 4.0, 1.0, -2.0]
    """
    count = trees.check_length("gradient_moments", "batches", batches)
    trees.check_params("gradient_moments", params)
    zeros = jax.tree.map(jnp.zeros_like, trees.widen(params))

    def body(carry, numbered):
        mean, spread = carry
        index, batch = numbered
        value, grad = jax.value_and_grad(loss)(params, batch)
        weight = 1 / (index + 1).astype(trees.wide(value).dtype)
        delta = trees.difference(grad, mean)
        mean = jax.tree.map(lambda m, d: m + weight.astype(m.dtype) * d, mean, delta)
        spread += trees.square_norm(delta) * (1 - weight)
        return (mean, spread), (trees.wide(value), trees.square_norm(grad))

    start = (zeros, jnp.zeros_like(trees.square_norm(zeros)))
    (mean, spread), (losses, squares) = jax.lax.scan(
        body, start, (jnp.arange(count), batches)
    )
    return GradientMoments(
        loss=losses.mean(),
        mean_square=squares.mean(),
        square_mean=trees.square_norm(mean),
        spread=spread / count,
        mean=mean,
    )


def gradient_covariance_trace(
    loss: Loss, params: Any, batches: Any, *, batch_size: int, population: int | None
) -> GradientCovariance:
    r"""Estimates the trace of the per-example gradient covariance from batch gradients.

    .. math:: \mathrm{tr}\,Σ = \frac{G_B - G_L}{A_B/B - A_L/L}, \quad
              A_Z = \frac{N - Z}{N - 1}

    Here :math:`G_B` is the mean squared norm of the n batch gradients, and :math:`G_L`
    is the squared norm of their mean. The :math:`L = nB` examples are sampled without
    replacement from N. The estimates of the trace and of the squared norm of the
    gradient are unbiased for the whole population (divided by N, and not by N − 1).
    The estimate of the squared norm can be negative and is returned unchanged. The
    noise scale, a ratio with this denominator, is then NaN. The paper calls the trace
    "coherence". A lower value means more coherent gradients.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: Parameters to differentiate with respect to.
      batches: Leaves ``[n, B, ...]`` with n >= 2 and examples that are sampled without
        replacement.
      batch_size: B, the number of examples per batch.
      population: N, the size of the set of the examples; None for an infinite set.

    Returns:
      :class:`GradientCovariance`: Trace, squared norm, noise scale and loss. The cost
      is n gradients of B examples. The memory is 3 copies of the parameters for any n.

    Raises:
      ValueError: If n < 2, or if N is smaller than nB.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import gradient_covariance_trace
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])  # all four of a set of four
      >>> found = gradient_covariance_trace(
      ...     lambda w, x: (w * x).mean(), jnp.array(1.0), x, batch_size=2,
      ...     population=4)
      >>> float(found.square_norm), float(found.loss)  # 3 ** 2
      (9.0, 3.0)

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      appendix B. McCandlish et al., `arXiv 1812.06162
      <https://arxiv.org/abs/1812.06162>`_, 2018.
    """
    name = "gradient_covariance_trace"
    trees.check_positive(name, "batch_size", batch_size)
    count = trees.check_length(name, "batches", batches)
    drawn = count * batch_size
    if count < 2:
        raise ValueError(f"{name}: one batch has no spread; pass at least 2 batches.")
    if population is not None and population < drawn:
        raise ValueError(
            f"{name}: {count} batches of {batch_size} examples cannot be sampled "
            f"without replacement from population={population}."
        )

    def correction(size: int) -> float:
        return 1.0 if population is None else (population - size) / (population - 1)

    moments = gradient_moments(loss, params, batches)
    of_batch = correction(batch_size) / batch_size
    of_all = correction(drawn) / drawn  # zero if all examples were drawn
    trace = moments.spread / (of_batch - of_all)
    square = moments.square_mean - trace * of_all
    positive = square > 0
    scale = jnp.where(positive, trace / jnp.where(positive, square, 1), jnp.nan)
    return GradientCovariance(trace, square, scale, moments.loss)


def gradient_noise_scale(
    loss: Loss, params: Any, batches: Any, *, batch_size: int, population: int | None
) -> Float[Array, ""]:
    """Estimates the simple noise scale ``tr Σ / ‖∇L‖²``, in examples.

    The ratio of two unbiased estimates is consistent, but not unbiased.

    Args:
      loss: See :func:`gradient_covariance_trace`.
      params: See :func:`gradient_covariance_trace`.
      batches: See :func:`gradient_covariance_trace`.
      batch_size: See :func:`gradient_covariance_trace`.
      population: See :func:`gradient_covariance_trace`.

    Returns:
      The batch size at which signal and noise of the gradient have equal norms. It is
      NaN if the estimate of the squared norm is not positive. The cost is that of
      :func:`gradient_covariance_trace`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import gradient_noise_scale
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> scale = gradient_noise_scale(
      ...     lambda w, x: (w * x).mean(), jnp.array(1.0), x, batch_size=2,
      ...     population=4)
      >>> round(float(scale), 3)
      0.75

    References:
      McCandlish et al., `arXiv 1812.06162 <https://arxiv.org/abs/1812.06162>`_, 2018.
    """
    return gradient_covariance_trace(
        loss, params, batches, batch_size=batch_size, population=population
    ).noise_scale


def m_coherence(loss: Loss, params: Any, examples: Any) -> PerExample:
    """Computes the m-coherence of m examples, ``m ‖ḡ‖² / E‖g_x‖²``.

    The value estimates how many of the m examples benefit from a step on one of them.
    It is 1 if the m gradients are orthogonal, and m if they are equal. Its reciprocal
    is the gradient diversity.

    Args:
      loss: ``loss(params, batch) -> ()``, called with batches of one example.
      params: Parameters to differentiate with respect to.
      examples: Leaves ``[m, ...]``.

    Returns:
      :class:`PerExample`: The statistics, NaN if all gradients are zero. The cost is m
      gradients of one example. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If there is no example, or if lengths differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import m_coherence
      >>> x = jnp.eye(3)
      >>> found = m_coherence(lambda w, x: (x @ w).mean(), jnp.ones(3), x)
      >>> round(float(found.m_coherence), 4), round(float(found.diversity), 4)
      (1.0, 1.0)

    References:
      Chatterjee and Zielinski, `arXiv 2008.01217 <https://arxiv.org/abs/2008.01217>`_,
      2020. Yin et al., `arXiv 1706.05699 <https://arxiv.org/abs/1706.05699>`_, 2017.
    """
    count = trees.check_length("m_coherence", "examples", examples)
    single = jax.tree.map(lambda x: jnp.expand_dims(x, 1), examples)
    moments = gradient_moments(loss, params, single)
    coherence = count * moments.square_mean / moments.mean_square
    return PerExample(coherence, 1 / coherence, moments.spread, moments.square_mean)


class Stiffness(NamedTuple):
    """Result of :func:`stiffness_matrix`, one entry per pair or pair of groups."""

    cosine: Float[Array, "a b"]
    sign: Float[Array, "a b"]
    pairs: Float[Array, "a b"]  # number of averaged pairs; an empty mean is NaN


def stiffness_matrix(
    loss: Loss,
    params: Any,
    left: Any,
    right: Any,
    *,
    groups: tuple[Int[Array, " m"], Int[Array, " n"]] | None = None,
    num_groups: int | None = None,
    block: int | None = None,
) -> Stiffness:
    """Computes cosine and sign of the inner products of gradients of two examples.

    If the inner product is positive, a step on one example lowers the loss of the
    other.

    Args:
      loss: ``loss(params, batch) -> ()``, called with batches of one example.
      params: Parameters to differentiate with respect to.
      left: Leaves ``[m, ...]``.
      right: Leaves ``[n, ...]``, often validation examples.
      groups: Labels ``[m]`` and ``[n]``, such as classes. Entries of the result are
        then means over the pairs of two groups.
      num_groups: Number of different labels, required with ``groups``.
      block: Number of gradients that are stored at once. It must divide m, which is
        the default.

    Returns:
      :class:`Stiffness`: Arrays of shape ``[m, n]``, or ``[num_groups, num_groups]``
      with ``groups``. The cosine with a zero gradient is 0. The cost is
      m + n · m / block gradients of one example. The memory is block + 1 copies of the
      parameters.

    Raises:
      ValueError: If ``block`` does not divide m, or if ``num_groups`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import stiffness_matrix
      >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> loss = lambda w, x: (x @ w).mean()
      >>> stiffness_matrix(loss, jnp.ones(2), x, -x).cosine
      Array([[-1.,  0.],
             [ 0., -1.]], dtype=float32)

    References:
      Fort et al., `arXiv 1901.09491 <https://arxiv.org/abs/1901.09491>`_, 2019.
    """
    name = "stiffness_matrix"
    rows = trees.check_length(name, "left", left)
    trees.check_length(name, "right", right)
    block = rows if block is None else block
    trees.check_positive(name, "block", block)
    if rows % block:
        raise ValueError(f"{name}: block={block} must divide the {rows} examples.")
    if groups is not None and num_groups is None:
        raise ValueError(f"{name}: groups need num_groups. Pass the number of labels.")

    def gradient(example):
        batch = jax.tree.map(lambda x: x[None], example)
        return trees.widen(jax.grad(loss)(params, batch))

    def strip(examples):
        held = jax.vmap(gradient)(examples)
        lengths = jnp.sqrt(jax.vmap(trees.square_norm)(held))

        def against(example):
            grad = gradient(example)
            length = lengths * jnp.sqrt(trees.square_norm(grad))
            products = jax.vmap(lambda g: trees.dot(g, grad))(held)
            nonzero = length > 0
            cosine = jnp.where(nonzero, products / jnp.where(nonzero, length, 1), 0)
            return cosine, jnp.sign(products)

        return jax.lax.map(against, right)

    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), left)
    cosine, sign = (
        jnp.moveaxis(x, 1, 0).reshape(x.shape[1], rows).T
        for x in jax.lax.map(strip, blocks)
    )
    if groups is None or num_groups is None:
        return Stiffness(cosine, sign, jnp.ones_like(cosine))
    a, b = (jax.nn.one_hot(g, num_groups, dtype=cosine.dtype) for g in groups)
    pairs = a.sum(0)[:, None] * b.sum(0)[None, :]
    return Stiffness(a.T @ cosine @ b / pairs, a.T @ sign @ b / pairs, pairs)
