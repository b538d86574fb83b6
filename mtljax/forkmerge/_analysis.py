"""Diagnostics of negative transfer: gains, discrepancy and maps."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mtljax import stack
from mtljax.balancer import check_choice
from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._checks import Direction, Numbers
from mtljax.forkmerge._merge import Rules, merge_leaves
from mtljax.forkmerge._search import Evaluation, simplex_points, validate
from mtljax.types import Losses


class NegativeTransfer(NamedTuple):
    """Result of :func:`negative_transfer` for a target and an auxiliary task."""

    weak: Bool[Array, "... weights"]  # the gain is negative at this weight
    strong: Bool[Array, "..."]  # the gain is negative at every positive weight
    best_gain: Float[Array, "..."]  # maximum over the positive weights
    best_weight: Float[Array, "..."]  # weight of the maximum


class TernaryMap(NamedTuple):
    """Result of :func:`ternary_map` at n mixtures of three models."""

    weights: Float[Array, "n corners"]
    points: Float[Array, "n xy"]  # in a triangle of side one
    scores: Float[Array, " n"]


class OneStepTransfer(NamedTuple):
    """Result of :func:`one_step_transfer` on one batch."""

    cosine: Float[Array, ""]  # between the target and the auxiliary gradient
    gains: Float[Array, " weights"]


def transfer_gain(
    scores: Numbers, baseline: Numbers, *, direction: Direction = "max"
) -> Array:
    """Computes the transfer gain, ``TG = P(joint training) − P(target alone)`` (Eq. 2).

    Args:
      scores: Performance of joint training, any shape.
      baseline: Performance of single-task training, a scalar or of the same shape.
      direction: ``"max"`` or ``"min"``. For errors, use ``"min"``, which changes the
        sign so that a positive gain is good.

    Returns:
      The gains, in the unit of the score.

    Examples:
      >>> from mtljax.forkmerge import transfer_gain
      >>> transfer_gain([0.7, 0.5], 0.6).tolist()
      [0.1, -0.1]
    """
    sign = checks.sign_of("transfer_gain", direction)
    return sign * (jnp.asarray(scores) - jnp.asarray(baseline))


def negative_transfer(gains: Numbers, weights: Numbers) -> NegativeTransfer:
    """Detects weak and strong negative transfer over a grid of auxiliary weights.

    Weak negative transfer at λ means ``TG(λ) < 0``, but another λ may have a positive
    gain. Strong negative transfer means ``max_{λ>0} TG(λ) < 0``.

    Args:
      gains: Transfer gains ``[..., L]``, one for every λ.
      weights: λ of shape ``[L]``. An entry of zero, the baseline, is ignored.

    Returns:
      :class:`NegativeTransfer`: Flags, and the best gain with its weight.

    Raises:
      ValueError: If lengths differ, if a weight is negative, or if none is positive.

    Examples:
      >>> from mtljax.forkmerge import negative_transfer
      >>> found = negative_transfer([0.0, 0.2, -0.1], [0.0, 0.5, 1.0])
      >>> found.weak.tolist(), bool(found.strong), float(found.best_weight)
      ([False, False, True], False, 0.5)
    """
    found, grid = jnp.asarray(gains), jnp.asarray(weights)
    if grid.ndim != 1 or found.shape[-1:] != grid.shape:
        raise ValueError(
            f"negative_transfer: gains of shape {found.shape} need one weight per "
            f"entry of their last axis, not {grid.shape}."
        )
    values = grid.tolist()
    if min(values, default=0) < 0 or max(values, default=0) <= 0:
        raise ValueError(
            f"negative_transfer: weights={values} must not be negative, and one must "
            "be positive."
        )
    positive = (grid > 0).reshape((1,) * (found.ndim - 1) + (-1,))
    counted = jnp.where(positive, found, -jnp.inf)
    best = counted.max(-1)
    return NegativeTransfer(
        weak=positive & (found < 0),
        strong=best < 0,
        best_gain=best,
        best_weight=grid[counted.argmax(-1)],
    )


def confidence_score_discrepancy(
    logits: Float[Array, "... classes"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, ""]:
    """Computes the confidence score discrepancy, ``1 − E_x max_y p(y | x)`` (Eq. 4).

    Use a model trained on the mixture D of target and auxiliary data, and test examples
    of the target. The value measures the distance between D and the test distribution.

    Args:
      logits: Inputs of the softmax, ``[..., classes]``.
      mask: Examples to include, ``[...]``. By default all are included.

    Returns:
      A number in ``[0, 1 − 1/classes]``, or NaN without an example.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import confidence_score_discrepancy
      >>> round(float(confidence_score_discrepancy(jnp.zeros((3, 4)))), 6)
      0.75
    """
    wide = logits.astype(stack.wide_dtype(logits.dtype))
    confidence = jax.nn.softmax(wide).max(-1)
    if mask is None:
        return 1 - confidence.mean()
    return 1 - jnp.where(mask, confidence, 0).sum() / mask.sum()


def mixture_probability(weight: ArrayLike) -> Array:
    """Computes the share of auxiliary examples, ``λ / (1 + λ)``, in the mixture.

    By Eq. 3, training on this interpolated distribution minimises, in expectation,
    ``L_tgt + λ L_aux`` up to a factor.

    Args:
      weight: λ ≥ 0, any shape.

    Returns:
      The share, with the shape of ``weight``.

    Examples:
      >>> from mtljax.forkmerge import mixture_probability
      >>> float(mixture_probability(1.0)), float(mixture_probability(0.25))
      (0.5, 0.2)
    """
    weight = jnp.asarray(weight)
    return weight / (1 + weight)


def ternary_map(
    corners: Any,
    score: Callable[..., Any],
    validation: Any = None,
    *,
    levels: int = 10,
    evaluation: Evaluation = "map",
) -> TernaryMap:
    """Scores mixtures of three models over a triangle (Fig. 6 of the paper).

    Args:
      corners: Three states, leaves ``[3, ...]``. They should come from one fork.
      score: ``score(state)``, or ``score(state, validation)``.
      validation: Arrays, not empty.
      levels: L. The weights of the ``(L + 1)(L + 2) / 2`` mixtures are multiples of
        1/L.
      evaluation: ``"map"`` or ``"vmap"``, see :class:`Search`.

    Returns:
      :class:`TernaryMap`: Weights ``[n, 3]``, points ``[n, 2]`` and scores ``[n]``. The
      three corners come first, at (0, 0), (1, 0) and (1/2, √3/2).

    Raises:
      ValueError: If there are not three models, or if the validation set is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import ternary_map
      >>> found = ternary_map(jnp.array([0.0, 1.0, 2.0]), lambda w: w, levels=2)
      >>> found.scores.tolist()
      [0.0, 1.0, 2.0, 1.5, 1.0, 0.5]
    """
    name = "ternary_map"
    check_choice(name, "evaluation", evaluation, Evaluation)
    checks.positive(name, "levels", levels)
    count = checks.count_branches(name, corners)
    if count != 3:
        raise ValueError(f"{name}: a triangle has 3 corners, not {count}.")
    args = checks.score_args(name, validation)
    weights = jnp.array(simplex_points(3, levels))
    triangle = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])

    def one(row):
        mixed = merge_leaves(name, corners, row, Rules())
        return validate(score, mixed, args)

    scores = jax.vmap(one)(weights) if evaluation == "vmap" else lax.map(one, weights)
    return TernaryMap(weights, jnp.matmul(weights, triangle), scores)


def one_step_transfer(
    losses: Callable[[Any], Losses],
    score: Callable[..., Any],
    params: Any,
    weights: Numbers,
    *,
    learning_rate: float = 0.01,
    validation: Any = None,
    direction: Direction = "max",
) -> OneStepTransfer:
    """Measures gradient cosine and transfer gain of one step for auxiliary weights.

    This is the protocol of Fig. 2. From θ trained on the target,
    ``θ(λ) = θ − η (g_tgt + λ g_aux)`` and ``TG(λ) = P̂(θ(λ)) − P̂(θ(0))``. Over many
    batches it shows that conflict does not imply negative transfer.

    Args:
      losses: ``losses(params) -> [target, auxiliary]`` on one batch.
      score: P̂, ``score(params)`` or ``score(params, validation)``.
      params: θ.
      weights: λ of shape ``[L]``. The paper uses {0, 1/16, 1/8, 1/4, 1/2, 1}.
      learning_rate: η.
      validation: Arrays, not empty.
      direction: ``"max"`` if a large score is good, ``"min"`` if a small one is.

    Returns:
      :class:`OneStepTransfer`: The cosine (0 for a zero gradient) and the gains,
      shape ``[L]``. The cost is two gradients and L + 1 validation passes.

    Raises:
      ValueError: If ``losses`` does not return two losses, or if the validation set is
        empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import one_step_transfer
      >>> losses = lambda w: jnp.stack([(w - 1) ** 2, (w - 2) ** 2])
      >>> found = one_step_transfer(losses, lambda w: -jnp.abs(w - 1), jnp.array(0.0),
      ...                           [0.0, 1.0], learning_rate=0.1)
      >>> float(found.cosine), found.gains.tolist()
      (1.0, [0.0, 0.4])
    """
    sign = checks.sign_of("one_step_transfer", direction)
    args = checks.score_args("one_step_transfer", validation)
    found, back = jax.vjp(losses, params)
    if jnp.shape(found) != (2,):
        raise ValueError(
            "one_step_transfer: losses must return the target's and the auxiliary "
            f"loss, shape (2,), not {jnp.shape(found)}."
        )
    target, auxiliary = (back(row)[0] for row in jnp.eye(2, dtype=found.dtype))

    def dot(a, b):
        parts = jax.tree.map(jnp.vdot, a, b)
        return sum(jax.tree.leaves(parts), jnp.zeros((), found.dtype))

    length = jnp.sqrt(dot(target, target) * dot(auxiliary, auxiliary))
    product = dot(target, auxiliary)
    cosine = jnp.where(length > 0, product / jnp.where(length > 0, length, 1), 0)

    def at(weight):
        moved = jax.tree.map(
            lambda p, t, a: (p - learning_rate * (t + weight * a)).astype(p.dtype),
            params,
            target,
            auxiliary,
        )
        return sign * validate(score, moved, args)

    grid = jnp.asarray(weights, found.dtype)
    return OneStepTransfer(cosine, lax.map(at, grid) - at(jnp.zeros((), grid.dtype)))
