"""Classification metrics: accuracy, calibration and uncertainty.

Logits are unnormalised log probabilities ``[..., classes]``. Log probabilities are also
valid logits, for example of the mean prediction of an ensemble. Labels are integers
``[...]``. The boolean array ``mask`` excludes examples (padding, ignored pixels). If no
example remains, a mean is NaN.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer


def accuracy(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    mask: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Computes the share of examples whose largest logit belongs to the label.

    Args:
      logits: Unnormalised log probabilities, shape ``[..., classes]``.
      labels: True classes, integers of shape ``[...]``.
      mask: Examples to include, shape ``[...]``. By default all are included.

    Returns:
      A number in ``[0, 1]``. The first of tied logits is the prediction.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import accuracy
      >>> accuracy(jnp.array([[2.0, 1.0], [0.0, 3.0]]), jnp.array([0, 0]))
      Array(0.5, dtype=float32)
    """
    correct = jnp.asarray(logits).argmax(axis=-1) == jnp.asarray(labels, int)
    return jnp.mean(correct.astype(jnp.float32), where=_where(mask))


def ece(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    mask: Bool[ArrayLike, "*batch"] | None = None,
    *,
    num_bins: int = 10,
) -> Float[Array, ""]:
    r"""Computes the expected calibration error from confidence and accuracy.

    .. math:: \sum_b \frac{n_b}{N} |\mathrm{acc}_b - \mathrm{conf}_b|

    The sum is over bins of equal width, closed on the right: ``(0, 0.1], (0.1, 0.2],
    ...``. The confidence is the largest softmax probability.

    Args:
      logits: Unnormalised log probabilities, shape ``[..., classes]``.
      labels: True classes, integers of shape ``[...]``.
      mask: Examples to include, shape ``[...]``. By default all are included.
      num_bins: Number of bins of ``[0, 1]``.

    Returns:
      A number in ``[0, 1]``. The value 0 means perfect calibration.

    Raises:
      ValueError: If ``num_bins`` is less than one.

    Examples:
      Two of three predictions are correct at a confidence of 0.8.

      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import ece
      >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]]))
      >>> round(float(ece(logits, jnp.array([0, 0, 0]))), 4)
      0.1333

    References:
      Guo et al., `On Calibration of Modern Neural Networks
      <https://arxiv.org/abs/1706.04599>`_, 2017.
    """
    if num_bins < 1:
        raise ValueError(f"ece: num_bins must be at least one, not {num_bins}.")
    probabilities = jax.nn.softmax(jnp.asarray(logits), axis=-1).reshape(
        -1, jnp.shape(logits)[-1]
    )
    confidence = probabilities.max(axis=-1)
    correct = probabilities.argmax(axis=-1) == jnp.ravel(jnp.asarray(labels, int))
    counts = jnp.ones_like(confidence) if mask is None else jnp.ravel(mask)
    counts = counts.astype(confidence.dtype)
    inner_edges = jnp.linspace(0, 1, num_bins + 1, dtype=confidence.dtype)[1:-1]
    bins = jnp.searchsorted(inner_edges, confidence, side="left")
    gap = jnp.where(counts > 0, correct.astype(confidence.dtype) - confidence, 0)
    gaps = jnp.zeros(num_bins, confidence.dtype).at[bins].add(gap)
    return jnp.abs(gaps).sum() / counts.sum()


def brier(
    logits: Float[ArrayLike, "*batch classes"],
    labels: Integer[ArrayLike, "*batch"],
    mask: Bool[ArrayLike, "*batch"] | None = None,
) -> Float[Array, ""]:
    r"""Computes the Brier score, a squared distance to the one-hot label.

    The score is the mean over examples of :math:`\sum_k (p_k - 1[k = y])^2` for the
    softmax probabilities p. It is the sum, and not the mean, over classes.

    Args:
      logits: Unnormalised log probabilities, shape ``[..., classes]``.
      labels: True classes, integers of shape ``[...]``.
      mask: Examples to include, shape ``[...]``. By default all are included.

    Returns:
      A number in ``[0, 2]``. Lower is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import brier
      >>> logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
      >>> round(float(brier(logits, jnp.array([0]))), 4)
      0.14

    References:
      Brier, Verification of forecasts expressed in terms of probability, 1950.
    """
    probabilities = jax.nn.softmax(jnp.asarray(logits), axis=-1)
    onehot = jax.nn.one_hot(
        jnp.asarray(labels), probabilities.shape[-1], dtype=probabilities.dtype
    )
    scores = jnp.square(probabilities - onehot).sum(axis=-1)
    return jnp.mean(scores, where=_where(mask))


def predictive_entropy(
    logits: Float[ArrayLike, "*batch classes"],
) -> Float[Array, "*batch"]:
    r"""Computes the entropy of every prediction, :math:`-\sum_k p_k \log p_k`, in nats.

    Args:
      logits: Unnormalised log probabilities, shape ``[..., classes]``. An entry of
        ``-inf`` is a probability of zero.

    Returns:
      Numbers in ``[0, log(classes)]``, one per example, shape ``[...]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import predictive_entropy
      >>> predictive_entropy(jnp.zeros((1, 4)))  # log 4
      Array([1.3862944], dtype=float32)
    """
    log_p = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)
    finite = jnp.where(jnp.isneginf(log_p), 0, log_p)  # 0 log 0 = 0
    return -(jnp.exp(log_p) * finite).sum(axis=-1)


def _where(mask):
    return None if mask is None else jnp.asarray(mask)
