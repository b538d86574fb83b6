"""From measured trajectories to statements: aggregates, differences, correlations."""

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
    """What :func:`factor_delta` returns."""

    delta: Float[Array, "..."]  # mean over runs, multi minus single
    significant: Bool[Array, "..."]  # ± 2 sd over runs do not overlap
    sd: Float[Array, "2 ..."]  # of multi and of single; NaN with one run


class SignAgreement(NamedTuple):
    """Counts of tasks, by :func:`sign_agreement`."""

    agree: int  # both significant, of the same sign
    disagree: int  # both significant, of opposite signs
    insignificant: int  # at least one is not


class RankCorrelation(NamedTuple):
    """What :func:`rank_correlation` returns; NaN where it is not defined."""

    spearman: Float[Array, ""]
    kendall: Float[Array, ""]  # tau-b
    partial: Float[Array, ""]  # Spearman with the covariate partialled out
    within: dict[Any, float]  # Spearman inside each group
    interval: Float[Array, " 2"]  # percentile bootstrap of spearman
    points: int


def aggregate(
    values: Any, rule: Rule, count: int, *, by: Any = None
) -> Float[Array, "..."]:
    """One number a trajectory.

    The paper takes the mean of the last 20 checkpoints of sharpness and of gradient
    covariance, of the 20 largest values of the Fisher trace (its early peak), and, for
    generalisation, of the test scores at the 10 checkpoints of best validation.

    Args:
      values: ``[..., T]``; NaN where not measured.
      rule: ``"last"``, ``"largest"``, or ``"at_best"`` (at the largest of ``by``).
      count: How many checkpoints; all that were measured, if they are fewer.
      by: Validation scores ``[..., T]``, higher is better, for ``"at_best"``.

    Returns:
      Means ``[...]``; NaN where nothing was measured. A value that is infinite makes
      the mean infinite.

    Raises:
      ValueError: If count is not positive, or ``by`` is missing or of another shape.

    Examples:
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
    """Multi-task minus single-task aggregates, and whether seeds could explain it.

    With test scores this is transfer. Significant where the ± 2 sd intervals over runs
    do not overlap: the paper's rule, of little power with three runs, and not corrected
    for the number of tasks.

    Args:
      multi: Aggregates ``[R, ...]``.
      single: Aggregates ``[R', ...]``.

    Returns:
      Differences of the means. With one run on a side nothing is significant.

    Examples:
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
    """In how many tasks a factor moved the way that would explain transfer.

    Args:
      factor: Of the factor, one entry a task.
      transfer: Of the score (higher is better), for the same tasks.
      lower: Whether less of the factor is supposed to be better, as of sharpness.

    Returns:
      Counts.

    Examples:
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
    """``100 (x − x₀) / |x₀|``; not finite where the baseline is 0.

    Examples:
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
    """Spearman's and Kendall's correlation, with the number of tasks held fixed.

    Similarity to the sum falls with the number of tasks K by itself, and so may what it
    is compared with: give K as ``covariate`` and as ``groups``.

    Args:
      x: ``[n]``.
      y: ``[n]``. Pairs with a NaN are left out.
      covariate: ``[n]``, whose ranks are regressed out of both ranks.
      groups: ``[n]`` numeric labels, inside which correlations are computed as well.
      key: For the bootstrap; without one the interval is NaN.
      num_bootstrap: Resamples.
      confidence: Of the interval.

    Returns:
      The coefficients; NaN for fewer than three points, or constant ones.

    Raises:
      ValueError: If lengths differ.

    Examples:
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
                f"rank_correlation: {label} has shape {values.shape}, x {x.shape}."
            )
    keep = ~(jnp.isnan(x) | jnp.isnan(y))
    x, y = x[keep], y[keep]
    points = len(x)
    spearman, partial = _pearson(_ranks(x), _ranks(y)), jnp.array(jnp.nan)
    if covariate is not None and points >= 3:
        z = _ranks(covariate[keep])
        xz, yz = _pearson(_ranks(x), z), _pearson(_ranks(y), z)
        rest = (1 - xz**2) * (1 - yz**2)
        # A rank that is a function of the covariate leaves nothing to correlate.
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
    """Ranks from 1, ties averaged."""
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
    """Raises unless two trajectories were measured in the same way.

    Sharpness at another radius, covariance at another batch size or a probe set of
    other examples are other quantities.

    Args:
      left: How the one was measured: ``probe.config()``, or any mapping.
      right: How the other was.

    Raises:
      ValueError: Naming the first difference and both values.

    Examples:
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
