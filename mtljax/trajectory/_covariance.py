"""The covariance of the gradient: its trace, noise scale, m-coherence, stiffness."""

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
    square_norm: Float[Array, ""]  # ‖∇L‖², unbiased: it can be negative
    noise_scale: Float[Array, ""]  # tr Σ / ‖∇L‖², in examples; NaN if that is <= 0
    loss: Float[Array, ""]  # mean over the examples drawn


class PerExample(NamedTuple):
    """What :func:`m_coherence` returns."""

    m_coherence: Float[Array, ""]  # in [0, m]
    diversity: Float[Array, ""]  # its reciprocal
    trace: Float[Array, ""]  # E‖g_x‖² − ‖ḡ‖² over these m examples
    square_norm: Float[Array, ""]  # ‖ḡ‖²


def gradient_moments(loss: Loss, params: Any, batches: Any) -> GradientMoments:
    """First and second moments of the gradients of n batches, in one pass.

    The spread is accumulated around the running mean (Welford), not as a difference of
    two large numbers: it keeps its digits late in training, in float32.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: What to differentiate with respect to: usually the shared parameters.
      batches: Leaves ``[n, B, ...]``.

    Returns:
      The moments. Cost: n gradients of B examples, memory 3 copies of the parameters.

    Raises:
      ValueError: If there is no batch, or lengths differ.

    Examples:
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
    r"""Trace of the per-example gradient covariance, from batch gradients alone.

    .. math:: \mathrm{tr}\,Σ = \frac{G_B - G_L}{A_B/B - A_L/L}, \quad
              A_Z = \frac{N - Z}{N - 1}

    with :math:`L = nB` examples drawn without replacement from N. Both estimates are
    unbiased for the quantities of the whole population (divided by N, not N − 1). The
    squared norm can come out negative, and is returned as it is: the noise scale, its
    ratio, is then NaN. The paper calls the trace "coherence": lower is more coherent.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: What to differentiate with respect to.
      batches: Leaves ``[n, B, ...]``, examples drawn without replacement, n >= 2.
      batch_size: B, examples in a batch.
      population: N, the size of the set they were drawn from; None for an infinite one.

    Returns:
      Trace, squared norm, noise scale and loss. Cost: n gradients of B examples; memory
      3 copies of the parameters whatever n is.

    Raises:
      ValueError: If n < 2, or N is smaller than nB or equal to B.

    Examples:
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])  # all four of a set of four
      >>> found = gradient_covariance_trace(
      ...     lambda w, x: (w * x).mean(), jnp.array(1.0), x, batch_size=2,
      ...     population=4)
      >>> float(found.square_norm), float(found.loss)  # 3 ** 2
      (9.0, 3.0)

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      appendix B; McCandlish et al., `arXiv 1812.06162
      <https://arxiv.org/abs/1812.06162>`_, 2018.
    """
    name = "gradient_covariance_trace"
    trees.check_positive(name, "batch_size", batch_size)
    count = trees.check_length(name, "batches", batches)
    drawn = count * batch_size
    if count < 2:
        raise ValueError(f"{name}: one batch has no spread; give at least 2.")
    if population is not None and population < drawn:
        raise ValueError(
            f"{name}: {count} batches of {batch_size} examples cannot be drawn without "
            f"replacement from population={population}."
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
    """The simple noise scale ``tr Σ / ‖∇L‖²``, in examples.

    A ratio of two unbiased estimates: consistent, not unbiased.

    Args:
      loss: As for :func:`gradient_covariance_trace`.
      params: Likewise.
      batches: Likewise.
      batch_size: Likewise.
      population: Likewise.

    Returns:
      The batch size at which signal and noise of the gradient are of equal length; NaN
      where the squared norm is estimated as zero or less. Cost as there.

    Examples:
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
    """How many of m examples an average one helps: ``m ‖ḡ‖² / E‖g_x‖²``.

    1 where the m gradients are orthogonal, m where they are equal; its reciprocal is
    gradient diversity.

    Args:
      loss: ``loss(params, batch) -> ()``, called with batches of one example.
      params: What to differentiate with respect to.
      examples: Leaves ``[m, ...]``.

    Returns:
      The statistics; NaN where all gradients are zero. Cost: m gradients of one
      example, memory 3 copies of the parameters.

    Raises:
      ValueError: If there is no example, or lengths differ.

    Examples:
      >>> x = jnp.eye(3)
      >>> found = m_coherence(lambda w, x: (x @ w).mean(), jnp.ones(3), x)
      >>> round(float(found.m_coherence), 4), round(float(found.diversity), 4)
      (1.0, 1.0)

    References:
      Chatterjee and Zielinski, `arXiv 2008.01217 <https://arxiv.org/abs/2008.01217>`_,
      2020; Yin et al., `arXiv 1706.05699 <https://arxiv.org/abs/1706.05699>`_, 2017.
    """
    count = trees.check_length("m_coherence", "examples", examples)
    single = jax.tree.map(lambda x: jnp.expand_dims(x, 1), examples)
    moments = gradient_moments(loss, params, single)
    coherence = count * moments.square_mean / moments.mean_square
    return PerExample(coherence, 1 / coherence, moments.spread, moments.square_mean)


class Stiffness(NamedTuple):
    """What :func:`stiffness_matrix` returns; one entry a pair, or a pair of groups."""

    cosine: Float[Array, "a b"]
    sign: Float[Array, "a b"]
    pairs: Float[Array, "a b"]  # how many were averaged; an empty mean is NaN


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
    """Cosine and sign of the inner product of the gradients of two examples.

    A step on the one lowers the loss of the other where it is positive.

    Args:
      loss: ``loss(params, batch) -> ()``, called with batches of one example.
      params: What to differentiate with respect to.
      left: Leaves ``[m, ...]``.
      right: Leaves ``[n, ...]``, often validation examples.
      groups: Labels ``[m]`` and ``[n]``, such as classes: entries are then means over
        the pairs of two groups.
      num_groups: How many labels there are; needed with ``groups``.
      block: Gradients held at once; must divide m, which is the default.

    Returns:
      ``[m, n]``, or ``[num_groups, num_groups]``; the cosine with a zero gradient is 0.
      Cost: m + n · m / block gradients of one example, block + 1 copies in memory.

    Raises:
      ValueError: If ``block`` does not divide m, or num_groups is missing.

    Examples:
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
        raise ValueError(f"{name}: groups need num_groups.")

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
