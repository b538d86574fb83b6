"""Loss gradients and flat parts of every task (FS-MTL), as users ask for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mtljax import placement, stack
from mtljax.gradients import AxisName, Strategy
from mtljax.placement import Backward
from mtljax.sharpness._passes import Passes, first_pass
from mtljax.sharpness._perturbation import Ball, Perturb
from mtljax.sharpness._rows import Rows, check_key, make_engine


class SamGrads(NamedTuple):
    """Gradients of every task, in two parts.

    Attributes:
      loss: ``g_i``, stacked ``[T, ...]`` like the result of
        :func:`mtljax.value_and_task_grads`; own leaves are ``optax.MaskedNode()``.
      flat: ``h_i = g_i^SAM − g_i``, likewise, at least float32. None where the two
        were not told apart; ``loss`` is then ``g_i^SAM``.
    """

    loss: Any
    flat: Any


def _placed(passes: Passes, values: Any, label: str) -> Any:
    """Gradients with the shardings that the user asked for; shared ones are stacked."""
    found = passes.first
    if found.options.shardings is None:
        return values
    wanted = jax.tree.leaves(found.options.shardings)
    wanted = [wanted[i] for i in found.leaves.numbers(label)]
    return placement.constrain(values, wanted, stacked=label == "shared")


def own_tree(passes: Passes, own: Any) -> Any:
    """Gradients of own leaves, zeros for frozen ones and holes for shared ones."""
    leaves = passes.first.leaves
    holes = [optax.MaskedNode()] * len(passes.shared)
    frozen = [jnp.zeros_like(x) for x in leaves.of("frozen")]
    return leaves.tree(holes, _placed(passes, own, "own"), frozen)


def as_trees(passes: Passes, rows: Rows) -> tuple[SamGrads, Any]:
    """Rows of absent tasks cleared, leaves back in trees like the parameters."""
    found = passes.first

    def tree(rows):
        if found.region.mask is not None:
            rows = stack.select(rows, found.region.mask)
        return found.leaves.shared_tree(_placed(passes, rows, "shared"))

    flat = None if rows.flat is None else tree(rows.flat)
    return SamGrads(tree(rows.loss), flat), own_tree(passes, rows.own)


def merge_own(update: Any, own_grads: Any) -> Any:
    """Puts the gradients of own parameters into the holes of a shared update.

    Args:
      update: Shaped like the parameters with ``optax.MaskedNode()`` for own ones:
        what a balancer made of shared gradients.
      own_grads: The opposite: gradients of own parameters, holes for shared ones.

    Returns:
      A tree like the parameters, for one optimiser.

    Examples:
      >>> import optax
      >>> hole = optax.MaskedNode()
      >>> merge_own({"trunk": 1.0, "head": hole}, {"trunk": hole, "head": 2.0})
      {'head': 2.0, 'trunk': 1.0}
    """

    def is_hole(node):
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(
        lambda shared, own: own if is_hole(shared) else shared,
        update,
        own_grads,
        is_leaf=is_hole,
    )


def sam_task_grads(
    task_losses: Callable[..., Any],
    *,
    rho: ArrayLike | Ball,
    perturb: Perturb = "local",
    split: bool = True,
    labels: Any = None,
    has_aux: bool = False,
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
    grad_shardings: Any = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Per-task gradients and their flat parts, as FS-MTL takes them apart.

    With ``g_i = ∇_θ L_i`` of the shared parameters θ and ``q_i = ∇_φ L_i`` of the own
    ones φ_i::

        ε_i = ρ g_i/‖g_i‖            δ_i = ρ_own q_i/‖q_i‖
        g_i^SAM, q_i^SAM = ∇ L_i(θ + ε_i, φ_i + δ_i)        on the same batch
        h_i = g_i^SAM − g_i          to first order ρ ∇‖g_i‖

    The update of the paper is ``A(g_1..g_T) + A(h_1..h_T)`` for θ (see
    :func:`flat_split`) and ``q_i^SAM`` for φ_i.

    Args:
      task_losses: ``task_losses(params, *args, **kwargs) -> losses[T]`` (or
        ``(losses[T], aux)``). Both passes get the same arguments: give dropout its key
        as one of them, or h is noise. Running averages of batch normalisation belong
        in ``aux``, which is that of the first pass; the batch's own statistics
        normalise in both.
      rho: ρ ≥ 0, radius of the ball around the shared and around the own parameters,
        or a :class:`Ball` for the rarer options. May be a traced scalar. A plain 0
        costs no second pass and gives ``flat = 0`` exactly.
      perturb: ``"local"``: ``ε_i`` for every task, the paper's. ``"global"``: one ε
        along the mean gradient for all tasks (each head still follows its own loss;
        with a joint norm the heads join in, and it is SAM of the mean loss).
        ``"samo"``, or :class:`Samo` with its options: a mixture of both.
      split: With False only the SAM gradients are kept, ``SamGrads(g^SAM, None)``:
        enough for ``flat_split(balancer, "direct")``, and cheaper where ε needs no
        ``g_i`` (``"global"``, ``"samo"``).
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``, see
        :func:`mtljax.value_and_task_grads`. An own leaf must serve one task only
        (:func:`mtljax.check_labels`); a frozen one is not perturbed.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      strategy: How the tasks run, see :func:`mtljax.value_and_task_grads`; both passes
        of a task run together. All give the same numbers up to rounding. Gradients of
        own parameters are summed, not stacked, except those of the first pass of
        ``"vmap"``.
      axis_name: The mapped axis, see :func:`mtljax.value_and_task_grads`. Losses and
        gradients are averaged over it in both passes, and every ε is made from the
        averaged gradient: the numbers are those of the whole batch on one device.
        (Perturbations from each device's own gradient are another algorithm,
        "m-sharpness", which this is not.)
      grad_shardings: Shardings of the gradients, see
        :func:`mtljax.value_and_task_grads`.
      backward: See :func:`mtljax.value_and_task_grads`.

    Returns:
      ``function(params, *args, mask=None, sam_key=None, sam_active=None, **kwargs) ->
      (losses[T], SamGrads(loss, flat), own_grads)`` (``(losses, aux)`` first with
      ``has_aux``). ``own_grads`` is shaped like the parameters with ``MaskedNode`` for
      shared ones, ready for :func:`merge_own`. ``mask`` ``[T]`` marks the tasks
      present; an absent one has zero rows, moves no head and is not perturbed
      (its loss may be NaN, its derivative not). ``sam_key`` seeds z (``"samo"``).
      ``sam_active``, a traced flag, leaves the second pass out at run time by
      ``lax.cond``; under ``vmap`` over the flag both sides run.

      Cost in passes over the network: ``"local"`` 1 + T forward, 2 T backward;
      ``"global"`` 2 forward, 1 + 2 T backward (1 + T without ``split``); ``"samo"``
      adds 1 backward and 1 forward-mode pass to ``"local"`` (2 T forward ones for
      ``"spsa"``), and without ``split`` saves T backward. Memory: 2 T times the shared
      parameters.

    Raises:
      ValueError: If a radius is negative or not finite, an option is unknown or
        in conflict with another, labels are wrong, or the losses are not a vector.

    Examples:
      On a quadratic ``h = H ε``; here ``H_1 = diag(2, 0)``, ``ε_1 = (0.1, 0)``.

      >>> import jax.numpy as jnp
      >>> def task_losses(params):
      ...     return jnp.stack([params["w"][0] ** 2, params["w"] @ jnp.ones(2)])
      >>> grad_fn = sam_task_grads(task_losses, rho=0.1)
      >>> losses, grads, _ = grad_fn({"w": jnp.array([1.0, 3.0])})
      >>> grads.loss["w"].tolist(), grads.flat["w"].tolist()
      ([[2.0, 0.0], [1.0, 1.0]], [[0.2, 0.0], [0.0, 0.0]])

    References:
      Phan et al., `Beyond Losses Reweighting: Empowering Multi-Task Learning via the
      Generalization Perspective <https://arxiv.org/abs/2211.13723>`_, 2022 (FS-MTL);
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020; Kwon et al., `ASAM
      <https://arxiv.org/abs/2102.11600>`_, 2021; SAMO,
      `2507.07883 <https://arxiv.org/abs/2507.07883>`_, 2025.
    """
    name = "sam_task_grads"
    engine = make_engine(
        name,
        rho,
        perturb,
        labels=labels,
        has_aux=has_aux,
        strategy=strategy,
        axis_name=axis_name,
        grad_shardings=grad_shardings,
        backward=backward,
    )

    def function(params, *args, mask=None, sam_key=None, sam_active=None, **kwargs):
        check_key(name, engine, sam_key, "pass sam_key=jax.random.key(...)")
        passes = first_pass(
            lambda p: task_losses(p, *args, **kwargs),
            params,
            engine.options,
            mask=mask,
            name=name,
        )
        rows = engine.rows(passes, sam_key, sam_active, split=split)
        grads, own = as_trees(passes, rows)
        losses = passes.losses
        return ((losses, passes.first.aux) if has_aux else losses), grads, own

    return function
