"""Regression metrics over all elements of two arrays of the same shape.

The boolean array ``mask`` excludes elements (padding, invalid pixels). If no element
remains, a mean is NaN. Use ``jax.vmap`` to compute one number per output.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def rmse(
    predictions: Float[ArrayLike, "*shape"],
    targets: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Computes the root of the mean squared error, in the units of the targets.

    Args:
      predictions: Predictions of the model, any shape.
      targets: True values, of the same shape.
      mask: Elements to include, of the same shape. By default all are included.

    Returns:
      A number of at least zero.

    Raises:
      ValueError: If the shapes of predictions and targets differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import rmse
      >>> rmse(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
      Array(1.4142135, dtype=float32)
    """
    return jnp.sqrt(_mean(jnp.square(_error(predictions, targets)), mask))


def mae(
    predictions: Float[ArrayLike, "*shape"],
    targets: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Computes the mean absolute error, in the units of the targets.

    Args:
      predictions: Predictions of the model, any shape.
      targets: True values, of the same shape.
      mask: Elements to include, of the same shape. By default all are included.

    Returns:
      A number of at least zero.

    Raises:
      ValueError: If the shapes of predictions and targets differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import mae
      >>> mae(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
      Array(1., dtype=float32)
    """
    return _mean(jnp.abs(_error(predictions, targets)), mask)


def relative_error(
    predictions: Float[ArrayLike, "*shape"],
    targets: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Computes the mean of ``|prediction - target| / |target|``, a fraction.

    Elements whose target is zero are excluded, because zero means "not measured" in
    depth maps.

    Args:
      predictions: Predictions of the model, any shape.
      targets: True values, of the same shape.
      mask: Elements to include, of the same shape. By default all are included.

    Returns:
      A number of at least zero, or NaN if every target is zero.

    Raises:
      ValueError: If the shapes of predictions and targets differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import relative_error
      >>> relative_error(jnp.array([1.0, 3.0, 5.0]), jnp.array([2.0, 4.0, 0.0]))
      Array(0.375, dtype=float32)

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019 (relative depth error).
    """
    targets = jnp.asarray(targets)
    valid = targets != 0
    relative = jnp.abs(_error(predictions, targets) / jnp.where(valid, targets, 1))
    return _mean(relative, valid if mask is None else valid & jnp.asarray(mask))


def r2(
    predictions: Float[ArrayLike, "*shape"],
    targets: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Computes the coefficient of determination R².

    The value is ``1 - squared error / variance of the targets``.

    Args:
      predictions: Predictions of the model, any shape.
      targets: True values, of the same shape.
      mask: Elements to include, of the same shape. By default all are included.

    Returns:
      A number of at most 1. The constant prediction of the mean gives 0. R² is not
      defined for constant targets. The result is then 1 if every prediction is exact,
      and 0 otherwise, as in scikit-learn.

    Raises:
      ValueError: If the shapes of predictions and targets differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import r2
      >>> r2(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 2.0, 3.0]))
      Array(0.5, dtype=float32)
    """
    targets = jnp.asarray(targets)
    error = _mean(jnp.square(_error(predictions, targets)), mask)
    variance = _mean(jnp.square(targets - _mean(targets, mask)), mask)
    return _one_minus_ratio(error, variance)


def explained_variance(
    predictions: Float[ArrayLike, "*shape"],
    targets: Float[ArrayLike, "*shape"],
    mask: Bool[ArrayLike, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Computes the explained variance, which is :func:`r2` without the bias.

    The value is ``1 - variance of the error / variance of the targets``.

    Args:
      predictions: Predictions of the model, any shape.
      targets: True values, of the same shape.
      mask: Elements to include, of the same shape. By default all are included.

    Returns:
      A number of at most 1. For constant targets it is 1 if the error is constant, and
      0 otherwise.

    Raises:
      ValueError: If the shapes of predictions and targets differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import explained_variance
      >>> explained_variance(jnp.array([2.0, 3.0, 4.0]), jnp.array([1.0, 2.0, 3.0]))
      Array(1., dtype=float32)
    """
    targets = jnp.asarray(targets)
    error = _error(predictions, targets)
    unexplained = _mean(jnp.square(error - _mean(error, mask)), mask)
    variance = _mean(jnp.square(targets - _mean(targets, mask)), mask)
    return _one_minus_ratio(unexplained, variance)


def _error(predictions: ArrayLike, targets: ArrayLike) -> Array:
    predictions, targets = jnp.asarray(predictions), jnp.asarray(targets)
    if predictions.shape != targets.shape:  # they might broadcast without an error
        raise ValueError(
            f"predictions has shape {predictions.shape} and targets has shape "
            f"{targets.shape}; they must be equal."
        )
    return predictions - targets


def _mean(values: Array, mask: ArrayLike | None) -> Float[Array, ""]:
    return jnp.mean(values, where=None if mask is None else jnp.asarray(mask))


def _one_minus_ratio(error: Array, variance: Array) -> Float[Array, ""]:
    ratio = error / jnp.where(variance == 0, 1, variance)
    constant = jnp.where(error == 0, 1.0, jnp.where(jnp.isnan(error), error, 0.0))
    return jnp.where(variance == 0, constant, 1 - ratio)
