"""What there is to look at: conflicts between the parts, and sharpness itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.gradients import AxisName, Strategy
from mtljax.metrics import conflict_rate
from mtljax.sharpness._passes import first_pass, only, over_tasks
from mtljax.sharpness._perturbation import Ball, Norm, check_radius
from mtljax.sharpness._rows import make_engine
from mtljax.sharpness._sam_grads import SamGrads
from mtljax.types import Gramian, Mask, Weights


class FlatGramians(NamedTuple):
    """All inner products of loss gradients and flat parts, ``[T, T]`` each."""

    loss: Gramian  # <g_i, g_j>
    flat: Gramian  # <h_i, h_j>
    cross: Gramian  # <g_i, h_j>


class FlatConflicts(NamedTuple):
    """Rates in [0, 1] of negative inner products, and lengths."""

    inter_loss: Float[Array, ""]  # pairs of tasks with <g_i, g_j> < 0
    inter_flat: Float[Array, ""]  # pairs of tasks with <h_i, h_j> < 0
    intra: Float[Array, ""]  # tasks with <g_i, h_i> < 0
    loss_norms: Weights  # ‖g_i‖, 0 for absent tasks
    flat_norms: Weights  # ‖h_i‖, likewise: first-order sharpness of the gradient


def flat_gramians(grads: SamGrads) -> FlatGramians:
    """The three Gramians of :func:`sam_task_grads`' result, over shared parameters.

    Args:
      grads: Both parts.

    Returns:
      ``<g_i, g_j>``, ``<h_i, h_j>`` and ``<g_i, h_j>``, at least float32. No passes.

    Raises:
      ValueError: If there is no flat part.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.sharpness import SamGrads, flat_gramians
      >>> grads = SamGrads(jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 2.0]]))
      >>> [m.tolist() for m in flat_gramians(grads)]
      [[[1.0]], [[5.0]], [[-1.0]]]
    """
    if grads.flat is None:
        raise ValueError(
            "flat_gramians: the gradients hold no flat part; call sam_task_grads with "
            "split=True."
        )
    return FlatGramians(
        stack.gramian(grads.loss),
        stack.gramian(grads.flat),
        stack.cross_gramian(grads.loss, grads.flat),
    )


def flat_conflicts(gramians: FlatGramians, mask: Mask | None = None) -> FlatConflicts:
    """How often the parts disagree, between tasks and inside each.

    Averaged over the batches of an epoch these are FS-MTL's conflict rates.

    Args:
      gramians: Of :func:`flat_gramians`, or ``state.gramians`` of
        :func:`value_and_flat_grad`.
      mask: Tasks present ``[T]``; all by default.

    Returns:
      Rates, 0 where there is no pair or task, and the lengths ``[T]`` of both parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.sharpness import SamGrads, flat_conflicts, flat_gramians
      >>> g = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
      >>> h = jnp.array([[-0.5, 0.0], [-1.0, 0.0]])
      >>> found = flat_conflicts(flat_gramians(SamGrads(g, h)))
      >>> [float(x) for x in found[:3]]
      [1.0, 0.0, 0.5]

    References:
      Phan et al., `arXiv 2211.13723 <https://arxiv.org/abs/2211.13723>`_, 2022.
    """
    inside = jnp.diagonal(gramians.cross)
    present = jnp.ones(inside.shape[0], bool) if mask is None else jnp.asarray(mask)

    def norms(gramian):
        squares = jnp.where(present, jnp.diagonal(gramian), 0)
        return jnp.sqrt(jnp.maximum(squares, 0))

    conflicts = (present & (inside < 0)).sum().astype(inside.dtype)
    return FlatConflicts(
        conflict_rate(gramians.loss, present),
        conflict_rate(gramians.flat, present),
        conflicts / jnp.maximum(present.sum(), 1).astype(inside.dtype),
        norms(gramians.loss),
        norms(gramians.flat),
    )


def surrogate_sharpness(
    task_losses: Callable[..., Any],
    radii: Sequence[float],
    *,
    adaptive: bool = False,
    norm: Norm = "separate",
    has_aux: bool = False,
    labels: Any = None,
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
) -> Callable[..., Any]:
    """How much each loss rises in the direction of its own gradient.

    ``gap[r, i] = L_i(θ + ε_i, φ_i + δ_i) − L_i(θ, φ_i)`` with radius r: to first order
    ``r (‖∇_θ L_i‖ + ‖∇_φ L_i‖)``, and a lower bound of the worst-case sharpness.

    Args:
      task_losses: As for :func:`sam_task_grads`. Pass the losses of evaluation mode to
        measure a trained network: running averages then normalise everywhere.
      radii: The R radii.
      adaptive: Distances relative to the weights, as in ASAM.
      norm: ``"separate"`` or ``"joint"``, see :class:`Ball`.
      has_aux: ``task_losses`` returns ``(losses, aux)``; aux is dropped.
      labels: Marks parameters ``"shared"`` or ``"own"``.
      strategy: How the tasks run.
      axis_name: The mapped axis, see :func:`sam_task_grads`.

    Returns:
      ``function(params, *args, mask=None, **kwargs) -> (losses[T], gaps[R, T])``; gaps
      of absent tasks are 0. Cost: 1 + R T forward and T backward passes.

    Raises:
      ValueError: If there is no radius, or one is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.sharpness import surrogate_sharpness
      >>> def task_losses(params):
      ...     return jnp.stack([params**2, 3 * params])
      >>> losses, gaps = surrogate_sharpness(task_losses, [0.1, 1.0])(jnp.array(1.0))
      >>> gaps.tolist()
      [[0.21, 0.3], [3.0, 3.0]]
    """
    name = "surrogate_sharpness"
    radii = list(radii)
    if not radii:
        raise ValueError(f"{name}: radii is empty; give at least one.")
    for value in radii:
        check_radius(name, "a radius", value)
    engines = [
        make_engine(
            name,
            Ball(value, adaptive=adaptive, norm=norm),
            "local",
            has_aux=has_aux,
            labels=labels,
            strategy=strategy,
            axis_name=axis_name,
        )
        for value in radii
    ]

    def function(params, *args, mask=None, **kwargs):
        passes = first_pass(
            lambda p: task_losses(p, *args, **kwargs),
            params,
            engines[0].options,
            mask=mask,
            name=name,
        )

        def single(row, task):
            del task
            directions = passes.gradients(row)

            def rise(ball):
                eps, delta, moved = passes.climb(directions, ball)
                found = passes.losses_at(*passes.moved(eps, delta))
                return jnp.where(moved, only(found - passes.losses, row), 0)

            return jnp.stack([rise(engine.ball) for engine in engines]), []

        gaps, _ = over_tasks(single, jax.vmap(single), passes, [])
        return passes.losses, gaps.T

    return function
