"""Summaries of a multi-task model: change against baselines, mean rank.

Two conventions are in use, with opposite signs and different averages. Their values
cannot be compared. For the same row of NYUv2 (equal weights, MTAN) they are:

====================  ==============  ================  =====
function              better          mean over         value
====================  ==============  ================  =====
:func:`delta_m`       lower           metrics           +5.59
:func:`delta_p`       higher          tasks, metrics    +0.88
====================  ==============  ================  =====
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from mtljax.balancer import task_vector


def delta_m(
    values: Float[ArrayLike, "*batch metrics"] | Mapping[str, Any],
    baseline: Float[ArrayLike, " metrics"] | Mapping[str, Any],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"] | Mapping[str, Any],
    *,
    groups: Sequence[int | str] | Mapping[str, int | str] | None = None,
) -> Float[Array, "*batch"]:
    r"""Computes the mean relative drop against the baseline, in percent.

    .. math::
      \Delta m = \frac{100}{M} \sum_{k=1}^{M} (-1)^{h_k} \frac{V_k - S_k}{|S_k|}

    Here :math:`h_k` is 1 if a higher value of metric :math:`k` is better, and 0
    otherwise. A lower :math:`\Delta m` is better. By default the mean is over all
    metrics, as in Nash-MTL, FAMO and FS-MTL. Each task then counts as often as it has
    metrics (on NYUv2, 5 of 9 metrics are of the normals). With ``groups`` the result is
    the mean over tasks of the mean over the metrics of each task.

    The sources divide by :math:`S_k`, which is positive in their tables. With the
    absolute value, a lower result is also better for metrics that may be negative, such
    as rewards.

    Every argument may be a dict by metric. If ``baseline`` is a dict, its order is the
    order of the metrics.

    Args:
      values: Metrics of the multi-task model, shape ``[..., M]``, in any units.
      baseline: Metrics of the single-task models, shape ``[M]``, in the same units.
        They must not be zero.
      higher_is_better: Direction of every metric, shape ``[M]``.
      groups: Task of every metric, as an index ``0 .. tasks-1`` or a name.

    Returns:
      The drop in percent, one number per leading index of ``values``.

    Raises:
      ValueError: If lengths differ, if ``groups`` skips a task, or if a baseline is
        zero. A traced zero cannot be detected. The result is then infinite or NaN.

    Examples:
      Cityscapes, MTAN, with two metrics of segmentation and two of depth.

      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import delta_m
      >>> single = jnp.array([74.01, 93.16, 0.0125, 27.77])
      >>> nash = jnp.array([75.41, 93.66, 0.0129, 35.02])
      >>> round(float(delta_m(nash, single, [True, True, False, False])), 2)
      6.72
      >>> delta_m({"err": 0.3, "acc": 0.6}, {"acc": 0.5, "err": 0.4},
      ...         {"acc": True, "err": False}).round(2).item()
      -22.5

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, 2019; Navon et al., `Multi-Task Learning as
      a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, 2022.
    """
    names = list(baseline) if isinstance(baseline, Mapping) else None
    _check_nonzero(baseline)
    values = jnp.asarray(_vector("values", values, names))
    higher_is_better = _vector("higher_is_better", higher_is_better, names)
    if isinstance(groups, Mapping):
        groups = [groups[name] for name in _checked("groups", groups, names)]
    baseline = jnp.asarray(_vector("baseline", baseline, names))
    count = baseline.shape[-1]
    sign = _signs(higher_is_better, count)
    if values.shape[-1:] != (count,):
        raise ValueError(
            f"values has shape {values.shape}; its last axis must be the {count} "
            "metrics of the baseline."
        )
    weights = jnp.array(_metric_weights(groups, count), baseline.dtype)
    change = values - jnp.broadcast_to(baseline, values.shape)
    return 100 * jnp.tensordot(change, sign * weights / jnp.abs(baseline), axes=1)


def delta_p(
    values: Float[ArrayLike, "*batch metrics"] | Mapping[str, Any],
    baseline: Float[ArrayLike, " metrics"] | Mapping[str, Any],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"] | Mapping[str, Any],
    *,
    groups: Sequence[int | str] | Mapping[str, int | str],
) -> Float[Array, "*batch"]:
    """Computes the mean relative gain per task against the baseline, in percent.

    A higher value is better. LibMTL and DB-MTL report this value. It equals
    ``-delta_m(..., groups=groups)``.

    Args:
      values: See :func:`delta_m`.
      baseline: See :func:`delta_m`.
      higher_is_better: See :func:`delta_m`.
      groups: See :func:`delta_m`.

    Returns:
      The gain in percent, one number per leading index of ``values``.

    Raises:
      ValueError: If :func:`delta_m` would raise an error.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import delta_p
      >>> single, multi = jnp.array([50.0, 80.0, 2.0]), jnp.array([55.0, 80.0, 2.2])
      >>> round(float(delta_p(multi, single, [True, True, False], groups=[0, 0, 1])), 2)
      -2.5

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023.
    """
    return -delta_m(values, baseline, higher_is_better, groups=groups)


def mean_rank(
    table: Float[ArrayLike, "methods metrics"] | Mapping[str, Any],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"] | Mapping[str, Any],
) -> Float[Array, " methods"]:
    """Computes the rank of every method (1 is best), averaged over metrics.

    A lower value is better. Tied methods have the mean of their ranks, and a NaN ranks
    last. The value depends on the methods in the table, so report them with it. The
    single-task row is usually excluded.

    Args:
      table: Metrics of every method, shape ``[methods, metrics]``, or a dict by metric
        with entries of shape ``[methods]``.
      higher_is_better: Direction of every metric, shape ``[metrics]``, or a dict.

    Returns:
      Mean ranks in ``[1, methods]``, shape ``[methods]``.

    Raises:
      ValueError: If the directions do not match the columns of the table.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import mean_rank
      >>> accuracy_and_error = jnp.array([[0.9, 0.3], [0.8, 0.1], [0.9, 0.2]])
      >>> mean_rank(accuracy_and_error, [True, False])
      Array([2.25, 2.  , 1.75], dtype=float32)

    References:
      Liu et al., `FAMO <https://arxiv.org/abs/2306.03792>`_, 2023 (MR in its tables).
    """
    names = list(table) if isinstance(table, Mapping) else None
    table = jnp.asarray(_vector("table", table, names))
    higher_is_better = _vector("higher_is_better", higher_is_better, names)
    loss = table * _signs(higher_is_better, table.shape[-1])[None]
    loss = jnp.where(jnp.isnan(loss), jnp.inf, loss)
    better = (loss[None] < loss[:, None]).sum(axis=1)
    tied = (loss[None] == loss[:, None]).sum(axis=1)  # includes the method itself
    return (2 * better + tied + 1).mean(axis=-1) / 2


def _vector(argument: str, values: Any, names: Sequence[str] | None) -> Any:
    """Converts a dict by metric to an array with the metrics on the last axis."""
    if not isinstance(values, Mapping):
        return values
    return task_vector(values, _checked(argument, values, names), axis=-1)


def _checked(
    argument: str, values: Mapping[str, Any], names: Sequence[str] | None
) -> Sequence[str]:
    """Returns the names of the metrics. Raises if those of a dict differ."""
    if names is None or set(values) != set(names):
        known = "no names" if names is None else f"the names {list(names)}"
        raise ValueError(
            f"{argument} is a dict with the names {list(values)}, but the metrics have "
            f"{known}."
        )
    return names


def _signs(higher_is_better, count: int) -> Float[Array, " metrics"]:
    """Returns -1 where a higher value is better, and +1 where a lower one is."""
    higher = jnp.asarray(higher_is_better, dtype=bool)
    if higher.shape != (count,):
        raise ValueError(
            f"higher_is_better has shape {higher.shape}, but one entry for each of the "
            f"{count} metrics is required."
        )
    return jnp.where(higher, -1.0, 1.0)


def _metric_weights(groups: Sequence[Any] | None, count: int) -> list[float]:
    """Returns the weights of the metrics: equal, or equal within equal tasks."""
    groups = range(count) if groups is None else list(groups)
    if all(isinstance(group, str) for group in groups):
        numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        groups = [numbers[name] for name in groups]
    groups = [int(group) for group in groups]
    tasks = set(groups)
    if len(groups) != count or tasks != set(range(len(tasks))):
        raise ValueError(
            f"groups={list(groups)} must name the task of each of the {count} metrics, "
            "counting tasks from 0 without a gap."
        )
    sizes = [sum(g == task for g in groups) for task in range(len(tasks))]
    return [1 / (len(tasks) * sizes[g]) for g in groups]


def _check_nonzero(baseline: ArrayLike | Mapping[str, Any]) -> None:
    entries: Mapping[Any, Any]
    if isinstance(baseline, Mapping):
        entries = baseline
    elif isinstance(baseline, Tracer):
        return
    else:
        with jax.ensure_compile_time_eval():  # constants stay concrete inside jit
            entries = dict(enumerate(jnp.ravel(jnp.asarray(baseline)).tolist()))
    for metric, value in entries.items():
        if not isinstance(value, Tracer) and float(value) == 0:
            raise ValueError(
                f"The baseline of metric {metric!r} is zero, so a relative change is "
                "not defined. Leave the metric out or report it in its own units."
            )
