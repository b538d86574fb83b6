"""One number for a multi-task model: change against single-task baselines, mean rank.

Two conventions with opposite signs and different averages are in use; their numbers
cannot be compared. On the same NYUv2 row (equal weights, MTAN):

====================  ==============  ================  =====
function              better          mean over         value
====================  ==============  ================  =====
:func:`delta_m`       lower           metrics           +5.59
:func:`delta_p`       higher          tasks, metrics    +0.88
====================  ==============  ================  =====
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float


def delta_m(
    values: Float[ArrayLike, "*batch metrics"],
    baseline: Float[ArrayLike, " metrics"],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"],
    *,
    groups: Sequence[int] | None = None,
) -> Float[Array, "*batch"]:
    r"""Mean relative drop against the baseline, in percent; lower is better.

    .. math::
      \Delta m = \frac{100}{M} \sum_{k=1}^{M} (-1)^{h_k} \frac{V_k - S_k}{|S_k|}

    where :math:`h_k` is 1 if metric :math:`k` is better when higher. The default, one
    mean over all metrics, is what Nash-MTL, FAMO and FS-MTL print; it counts a task
    as often as it has metrics (on NYUv2 normals are 5 of 9). With ``groups`` it is the
    mean over tasks of the mean over each task's metrics.

    The sources divide by :math:`S_k`, which is positive in their tables; the absolute
    value keeps "better" negative for metrics such as rewards that may be negative.

    Args:
      values: Metrics of the multi-task model, in any units, with any leading axes.
      baseline: Metrics of the single-task models, in the same units; none is zero.
      higher_is_better: Direction of every metric.
      groups: Index of the task that every metric belongs to, ``0 .. tasks-1``.

    Returns:
      Percent, one number per leading index of ``values``.

    Raises:
      ValueError: Lengths differ, ``groups`` skips a task, or a baseline is zero. A zero
        that is traced cannot be seen; the result is then infinite or NaN.

    Examples:
      Cityscapes, MTAN: two metrics of segmentation, two of depth.

      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import delta_m
      >>> single = jnp.array([74.01, 93.16, 0.0125, 27.77])
      >>> nash = jnp.array([75.41, 93.66, 0.0129, 35.02])
      >>> round(float(delta_m(nash, single, [True, True, False, False])), 2)
      6.72

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, 2019; Navon et al., `Multi-Task Learning as
      a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, 2022.
    """
    _check_nonzero(baseline)
    values, baseline = jnp.asarray(values), jnp.asarray(baseline)
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
    values: Float[ArrayLike, "*batch metrics"],
    baseline: Float[ArrayLike, " metrics"],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"],
    *,
    groups: Sequence[int],
) -> Float[Array, "*batch"]:
    """Mean relative gain per task against the baseline, in percent; higher is better.

    What LibMTL and DB-MTL print: ``-delta_m(..., groups=groups)``.

    Args:
      values: See :func:`delta_m`.
      baseline: See :func:`delta_m`.
      higher_is_better: See :func:`delta_m`.
      groups: Index of the task that every metric belongs to, ``0 .. tasks-1``.

    Returns:
      Percent, one number per leading index of ``values``.

    Raises:
      ValueError: As :func:`delta_m`.

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
    table: Float[ArrayLike, "methods metrics"],
    higher_is_better: Sequence[bool] | Bool[ArrayLike, " metrics"],
) -> Float[Array, " methods"]:
    """Rank of every method (1 is best), averaged over metrics; lower is better.

    Tied methods share the mean of their ranks. A NaN ranks last. The value depends on
    which methods are in the table, so report them with it; the single-task row is
    usually left out.

    Args:
      table: Metrics of every method.
      higher_is_better: Direction of every metric.

    Returns:
      Mean ranks, in ``[1, methods]``.

    Raises:
      ValueError: The directions do not match the table's columns.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.metrics import mean_rank
      >>> accuracy_and_error = jnp.array([[0.9, 0.3], [0.8, 0.1], [0.9, 0.2]])
      >>> mean_rank(accuracy_and_error, [True, False])
      Array([2.25, 2.  , 1.75], dtype=float32)

    References:
      Liu et al., `FAMO <https://arxiv.org/abs/2306.03792>`_, 2023 (its tables' MR).
    """
    table = jnp.asarray(table)
    loss = table * _signs(higher_is_better, table.shape[-1])[None]
    loss = jnp.where(jnp.isnan(loss), jnp.inf, loss)
    better = (loss[None] < loss[:, None]).sum(axis=1)
    tied = (loss[None] == loss[:, None]).sum(axis=1)  # counts the method itself
    return (2 * better + tied + 1).mean(axis=-1) / 2


def _signs(higher_is_better, count: int) -> Float[Array, " metrics"]:
    """-1 where higher is better, +1 where lower is."""
    higher = jnp.asarray(higher_is_better, dtype=bool)
    if higher.shape != (count,):
        raise ValueError(
            f"higher_is_better has shape {higher.shape}; it needs one entry for each "
            f"of the {count} metrics."
        )
    return jnp.where(higher, -1.0, 1.0)


def _metric_weights(groups: Sequence[int] | None, count: int) -> list[float]:
    """Weight of every metric in the mean: equal, or equal inside equal tasks."""
    groups = range(count) if groups is None else [int(g) for g in groups]
    tasks = set(groups)
    if len(groups) != count or tasks != set(range(len(tasks))):
        raise ValueError(
            f"groups={list(groups)} must name the task of each of the {count} metrics, "
            "counting tasks from 0 without a gap."
        )
    sizes = [sum(g == task for g in groups) for task in range(len(tasks))]
    return [1 / (len(tasks) * sizes[g]) for g in groups]


def _check_nonzero(baseline: ArrayLike) -> None:
    if isinstance(baseline, Tracer):
        return
    with jax.ensure_compile_time_eval():  # inside jit, constants stay concrete
        values = jnp.ravel(jnp.asarray(baseline)).tolist()
    zeros = [i for i, value in enumerate(values) if value == 0]
    if zeros:
        raise ValueError(
            f"The baseline of metric {zeros[0]} is zero, so a relative change is not "
            "defined; leave the metric out or report it in its own units."
        )
