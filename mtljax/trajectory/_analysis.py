"""Statistics of trajectories: aggregates, differences and correlations."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mtljax.balancer import check_choice
from mtljax.trajectory import _trees as trees

Rule: TypeAlias = Literal["last", "largest", "at_best"]


class Delta(NamedTuple):
    """Result of :func:`factor_delta`."""

    delta: Float[Array, "..."]  # mean over runs, multi minus single
    significant: Bool[Array, "..."]  # ± 2 sd over runs do not overlap
    sd: Float[Array, "2 ..."]  # of multi and of single; NaN with one run


class SignAgreement(NamedTuple):
    """Counts of tasks that :func:`sign_agreement` returns."""

    agree: int  # both significant, of the same sign
    disagree: int  # both significant, of opposite signs
    insignificant: int  # at least one is not significant


class RankCorrelation(NamedTuple):
    """Result of :func:`rank_correlation`; undefined values are NaN."""

    spearman: Float[Array, ""]
    kendall: Float[Array, ""]  # tau-b
    partial: Float[Array, ""]  # partial Spearman correlation given the covariate
    within: dict[Any, float]  # Spearman within each group
    interval: Float[Array, " 2"]  # percentile bootstrap of spearman
    points: int


def aggregate(
    values: Any, rule: Rule, count: int, *, by: Any = None
) -> Float[Array, "..."]:
    """Reduces each trajectory to one number.

    The paper uses the following means. For sharpness and gradient covariance it
    averages the last 20 checkpoints. For the Fisher trace, which peaks early, it
    averages the 20 largest values. For generalisation it averages the test scores at
    the 10 checkpoints of best validation.

    Args:
      values: Trajectories ``[..., C]``, with NaN for values that were not measured.
      rule: ``"last"``, ``"largest"``, or ``"at_best"`` (at the largest of ``by``).
      count: Number of checkpoints to average. If fewer were measured, all are used.
      by: Validation scores ``[..., C]``, higher is better, for ``"at_best"``.

    Returns:
      Means of shape ``[...]``, NaN for trajectories without a measurement. An infinite
      value makes the mean infinite.

    Raises:
      ValueError: If ``count`` is not positive, or if ``by`` is missing or has another
        shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import aggregate
      >>> values = jnp.array([5.0, 1.0, jnp.nan, 2.0, 3.0])
      >>> float(aggregate(values, "last", 2)), float(aggregate(values, "largest", 2))
      (2.5, 4.0)
      >>> by = jnp.array([0.1, 0.9, 0.95, 0.2, 0.3])
      >>> float(aggregate(values, "at_best", 1, by=by))
      1.0

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      footnote 5.
    """
    check_choice("aggregate", "rule", rule, Rule)
    trees.check_positive("aggregate", "count", count)
    values = jnp.asarray(values)
    if rule == "at_best" and (by is None or jnp.shape(by) != values.shape):
        raise ValueError(
            f"aggregate: rule='at_best' needs by= of shape {values.shape}, not "
            f"{None if by is None else jnp.shape(by)}."
        )
    measured = ~jnp.isnan(values)
    if rule == "last":
        order = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
    else:
        order = values if rule == "largest" else jnp.asarray(by)
    measured &= ~jnp.isnan(order)
    order = jnp.where(measured, order, -jnp.inf)
    ranks = jnp.argsort(jnp.argsort(-order, axis=-1, stable=True), axis=-1)
    taken = measured & (ranks < count)
    number = taken.sum(-1)
    mean = jnp.where(taken, values, 0).sum(-1) / jnp.maximum(number, 1)
    return jnp.where(number > 0, mean, jnp.nan)


def factor_delta(multi: Any, single: Any) -> Delta:
    """Computes multi-task minus single-task aggregates, and their significance.

    For test scores this is transfer. A difference is significant if the ± 2 sd
    intervals over runs do not overlap. This is the rule of the paper. It has little
    power with three runs and is not corrected for the number of tasks.

    Args:
      multi: Aggregates of multi-task runs, shape ``[R, ...]``.
      single: Aggregates of single-task runs, shape ``[R', ...]``.

    Returns:
      :class:`Delta`: Differences of the means, their significance, and the standard
      deviations. If a group has one run, nothing is significant.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import factor_delta
      >>> found = factor_delta(jnp.array([0.8, 0.82]), jnp.array([0.7, 0.71]))
      >>> round(float(found.delta), 3), bool(found.significant)
      (0.105, True)
    """
    groups = [jnp.asarray(g) for g in (multi, single)]
    means = [g.mean(0) for g in groups]
    sds = [
        g.std(0, ddof=1) if len(g) > 1 else jnp.full(g.shape[1:], jnp.nan)
        for g in groups
    ]
    delta = means[0] - means[1]
    return Delta(delta, jnp.abs(delta) > 2 * (sds[0] + sds[1]), jnp.stack(sds))


def sign_agreement(factor: Delta, transfer: Delta, *, lower: bool) -> SignAgreement:
    """Counts the tasks in which the change of a factor could explain the transfer.

    Args:
      factor: Differences of the factor, one entry per task.
      transfer: Differences of the score (higher is better), for the same tasks.
      lower: Whether a lower value of the factor is expected to be better, as for
        sharpness.

    Returns:
      :class:`SignAgreement`: The counts.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import Delta, sign_agreement
      >>> def sure(delta):
      ...     return Delta(jnp.array(delta), jnp.ones(3, bool), jnp.zeros((2, 3)))
      >>> sign_agreement(sure([-1.0, 1.0, 1.0]), sure([1.0, 1.0, -1.0]), lower=True)
      SignAgreement(agree=2, disagree=1, insignificant=0)
    """
    sure = factor.significant & transfer.significant
    same = (jnp.sign(factor.delta) == jnp.sign(transfer.delta)) != lower
    return SignAgreement(
        agree=int((sure & same).sum()),
        disagree=int((sure & ~same).sum()),
        insignificant=int((~sure).sum()),
    )


def percent_change(values: Any, baseline: Any) -> Float[Array, "..."]:
    """Computes ``100 (x − x₀) / |x₀|``; not finite if the baseline is 0.

    Args:
      values: x, any shape.
      baseline: x₀, of a shape that broadcasts with ``values``.

    Returns:
      The changes in percent.

    Examples:
      >>> from mtljax.trajectory import percent_change
      >>> percent_change([1.1, 0.9], 1.0).tolist()
      [10.0, -10.0]
    """
    base = jnp.asarray(baseline)
    return 100 * (jnp.asarray(values) - base) / jnp.abs(base)


def rank_correlation(
    x: Any,
    y: Any,
    *,
    covariate: Any = None,
    groups: Any = None,
    key: PRNGKeyArray | None = None,
    num_bootstrap: int = 1000,
    confidence: float = 0.95,
) -> RankCorrelation:
    """Computes Spearman's and Kendall's rank correlation, also within groups.

    Similarity to the sum decreases with the number of tasks T, and the other variable
    may depend on T too. To hold T fixed, pass it as ``covariate`` and as ``groups``.

    Args:
      x: First variable, shape ``[n]``.
      y: Second variable, shape ``[n]``. Pairs with a NaN are excluded.
      covariate: Variable of shape ``[n]``. Its ranks are regressed out of both ranks.
      groups: Numeric labels, shape ``[n]``. Correlations are also computed within each
        group.
      key: Random key of the bootstrap. Without a key the interval is NaN.
      num_bootstrap: Number of resamples.
      confidence: Confidence of the interval.

    Returns:
      :class:`RankCorrelation`: The coefficients, NaN for fewer than three points or for
      constant values.

    Raises:
      ValueError: If lengths differ.

    Examples:
      >>> from mtljax.trajectory import rank_correlation
      >>> found = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0])
      >>> float(found.spearman), float(found.kendall)
      (0.8, 0.667)
    """
    x, y = (jnp.asarray(v, jnp.result_type(float)) for v in (x, y))
    covariate, groups = (
        None if v is None else jnp.asarray(v) for v in (covariate, groups)
    )
    given = {"y": y, "covariate": covariate, "groups": groups}
    for label, values in given.items():
        if values is not None and values.shape != x.shape:
            raise ValueError(
                f"rank_correlation: {label} has shape {values.shape}, but x has shape "
                f"{x.shape}."
            )
    keep = ~(jnp.isnan(x) | jnp.isnan(y))
    x, y = x[keep], y[keep]
    points = len(x)
    spearman, partial = _pearson(_ranks(x), _ranks(y)), jnp.array(jnp.nan)
    if covariate is not None and points >= 3:
        z = _ranks(covariate[keep])
        xz, yz = _pearson(_ranks(x), z), _pearson(_ranks(y), z)
        rest = (1 - xz**2) * (1 - yz**2)
        # A rank that is a function of the covariate has no remaining variance.
        partial = jnp.where(
            rest > 1e-6,
            (spearman - xz * yz) / jnp.sqrt(jnp.maximum(rest, 1e-6)),
            jnp.nan,
        )
    within = {}
    if groups is not None:
        labels = groups[keep]
        for label in sorted(set(labels.tolist())):
            inside = labels == label
            within[label] = float(_pearson(_ranks(x[inside]), _ranks(y[inside])))
    interval = jnp.full(2, jnp.nan)
    if key is not None and points >= 3:
        draws = jax.random.randint(key, (num_bootstrap, points), 0, points)
        again = jax.vmap(lambda i: _pearson(_ranks(x[i]), _ranks(y[i])))(draws)
        tail = (1 - confidence) / 2
        interval = jnp.nanquantile(again, jnp.array([tail, 1 - tail]))
    return RankCorrelation(spearman, _kendall(x, y), partial, within, interval, points)


def _ranks(values: Array) -> Array:
    """Returns ranks from 1, averaged over ties."""
    below = (values[None, :] < values[:, None]).sum(1)
    same = (values[None, :] == values[:, None]).sum(1)
    return below + (same + 1) / 2


def _pearson(x: Array, y: Array) -> Array:
    if len(x) < 3:
        return jnp.array(jnp.nan)
    x, y = x - x.mean(), y - y.mean()
    scale = jnp.sqrt((x * x).sum() * (y * y).sum())
    return jnp.where(scale > 0, (x * y).sum() / jnp.where(scale > 0, scale, 1), jnp.nan)


def _kendall(x: Array, y: Array) -> Array:
    if len(x) < 3:
        return jnp.array(jnp.nan)
    a, b = (jnp.sign(v[:, None] - v[None, :]) for v in (x, y))
    scale = jnp.sqrt((a * a).sum() * (b * b).sum())
    return jnp.where(scale > 0, (a * b).sum() / jnp.where(scale > 0, scale, 1), jnp.nan)


def check_comparable(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Raises an error unless two trajectories were measured with equal settings.

    Values are not comparable if the radius of the sharpness, the batch size of the
    covariance or the measured examples differ.

    Args:
      left: Settings of one trajectory: ``probe.config()``, or any mapping.
      right: Settings of the other trajectory.

    Raises:
      ValueError: If a setting differs. The message names the first one and its values.

    Examples:
      >>> from mtljax.trajectory import check_comparable
      >>> check_comparable({"rho": 0.001}, {"rho": 0.01})
      Traceback (most recent call last):
        ...
      ValueError: The trajectories differ in 'rho' (0.001 and 0.01): ...
    """
    missing = object()
    for name in sorted({*left, *right}):
        a, b = left.get(name, missing), right.get(name, missing)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            check_comparable(a, b)
        elif a is missing or b is missing or not _same(a, b):
            shown = ["absent" if v is missing else repr(v) for v in (a, b)]
            raise ValueError(
                f"The trajectories differ in {name!r} ({shown[0]} and {shown[1]}): "
                "these measurements cannot be compared."
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return list(a) == list(b)
    return a == b
