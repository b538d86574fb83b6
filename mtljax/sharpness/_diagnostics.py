"""Diagnostics: conflicts between loss and flat gradients, and sharpness."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.gradients import AxisName, Strategy
from mtljax.gradients.linearized import VectorLosses
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
    """Rates in [0, 1] of negative inner products, and norms of both parts."""

    inter_loss: Float[Array, ""]  # pairs of tasks with <g_i, g_j> < 0
    inter_flat: Float[Array, ""]  # pairs of tasks with <h_i, h_j> < 0
    intra: Float[Array, ""]  # tasks with <g_i, h_i> < 0
    loss_norms: Weights  # ‖g_i‖, 0 for absent tasks
    flat_norms: Weights  # ‖h_i‖, 0 for absent tasks: first-order sharpness


def flat_gramians(grads: SamGrads) -> FlatGramians:
    """Computes the three Gramians of the result of :func:`sam_task_grads`.

    The inner products are over the shared parameters.

    Args:
      grads: Loss gradients and flat parts.

    Returns:
      :class:`FlatGramians`: The products ``<g_i, g_j>``, ``<h_i, h_j>`` and
      ``<g_i, h_j>``, shape ``[T, T]`` each, at least float32. No pass is needed.

    Raises:
      ValueError: If ``grads`` has no flat part.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.sharpness import SamGrads, flat_gramians
      >>> grads = SamGrads(jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 2.0]]))
      >>> [m.tolist() for m in flat_gramians(grads)]
      [[[1.0]], [[5.0]], [[-1.0]]]
    """
    if grads.flat is None:
        raise ValueError(
            "flat_gramians: the gradients have no flat part; call sam_task_grads with "
            "split=True."
        )
    return FlatGramians(
        stack.gramian(grads.loss),
        stack.gramian(grads.flat),
        stack.cross_gramian(grads.loss, grads.flat),
    )


def flat_conflicts(gramians: FlatGramians, mask: Mask | None = None) -> FlatConflicts:
    """Computes how often the parts conflict, between tasks and within each task.

    The averages over the batches of an epoch are the conflict rates of FS-MTL.

    Args:
      gramians: The result of :func:`flat_gramians`, or ``state.gramians`` of
        :func:`value_and_flat_grad`.
      mask: Boolean array ``[T]`` that marks the present tasks. By default all are.

    Returns:
      :class:`FlatConflicts`: The rates, which are 0 if no pair or no task is present,
      and the norms of both parts, shape ``[T]``.

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
    """Returns a function that measures the rise of each loss along its gradient.

    For the radius r the rise is ``gap[r, i] = L_i(θ + ε_i, φ_i + δ_i) − L_i(θ, φ_i)``.
    To first order it is ``r (‖∇_θ L_i‖ + ‖∇_φ L_i‖)``. It is a lower bound of the
    worst-case sharpness.

    Args:
      task_losses: See :func:`sam_task_grads`. To measure a trained network, pass its
        losses in evaluation mode, which normalise with running averages.
      radii: The R radii.
      adaptive: Whether distances are relative to the weights, as in ASAM.
      norm: ``"separate"`` or ``"joint"``, see :class:`Ball`.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``. The auxiliary output
        is discarded.
      labels: Marks parameters ``"shared"`` or ``"own"``.
      strategy: How the tasks are run.
      axis_name: The mapped axis, see :func:`sam_task_grads`.

    Returns:
      A function ``f(params, *args, mask=None, **kwargs)``. It returns
      ``(losses, gaps)`` of shapes ``[T]`` and ``[R, T]``. The losses are a dictionary
      if ``task_losses`` returns one. The gaps of absent tasks are 0. The cost
      is 1 + R T forward and T backward passes.

    Raises:
      ValueError: If ``radii`` is empty, or if a radius is negative or not finite.

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
        raise ValueError(f"{name}: radii is empty; pass at least one radius.")
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
        call = VectorLosses(task_losses, args, kwargs)
        passes = first_pass(
            call,
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
        return call.named(passes.losses), gaps.T

    return function
