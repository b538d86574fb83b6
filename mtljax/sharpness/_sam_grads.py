"""Loss gradients and flat parts of every task (FS-MTL)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mtljax import placement, stack
from mtljax.gradients import AxisName, Strategy
from mtljax.gradients.linearized import VectorLosses
from mtljax.placement import Backward
from mtljax.sharpness._passes import Passes, first_pass
from mtljax.sharpness._perturbation import Ball, Perturb
from mtljax.sharpness._rows import Rows, check_key, make_engine


class SamGrads(NamedTuple):
    """Gradients of every task, split into a loss part and a flat part.

    Attributes:
      loss: ``g_i``, stacked ``[T, ...]`` like the result of
        :func:`mtljax.value_and_task_grads`. Own leaves are ``optax.MaskedNode()``.
      flat: ``h_i = g_i^SAM − g_i`` with the same structure, at least float32. It is
        None if the two parts were not separated. In this case ``loss`` is ``g_i^SAM``.
    """

    loss: Any
    flat: Any


def _placed(passes: Passes, values: Any, label: str) -> Any:
    """Applies the shardings that the user passed; shared gradients are stacked."""
    found = passes.first
    if found.options.shardings is None:
        return values
    wanted = jax.tree.leaves(found.options.shardings)
    wanted = [wanted[i] for i in found.leaves.numbers(label)]
    return placement.constrain(values, wanted, stacked=label == "shared")


def own_tree(passes: Passes, own: Any) -> Any:
    """Returns gradients of own leaves, zeros for frozen and holes for shared ones."""
    leaves = passes.first.leaves
    holes = [optax.MaskedNode()] * len(passes.shared)
    frozen = [jnp.zeros_like(x) for x in leaves.of("frozen")]
    return leaves.tree(holes, _placed(passes, own, "own"), frozen)


def as_trees(passes: Passes, rows: Rows) -> tuple[SamGrads, Any]:
    """Clears the rows of absent tasks and returns trees like the parameters."""
    found = passes.first

    def tree(rows):
        if found.region.mask is not None:
            rows = stack.select(rows, found.region.mask)
        return found.leaves.shared_tree(_placed(passes, rows, "shared"))

    flat = None if rows.flat is None else tree(rows.flat)
    return SamGrads(tree(rows.loss), flat), own_tree(passes, rows.own)


def merge_own(update: Any, own_grads: Any) -> Any:
    """Inserts the gradients of own parameters into the holes of a shared update.

    Args:
      update: The output of a balancer of shared gradients. It has the structure of the
        parameters, with ``optax.MaskedNode()`` for own parameters.
      own_grads: Gradients of own parameters, with ``optax.MaskedNode()`` for shared
        parameters.

    Returns:
      A tree with the structure of the parameters, for one optimizer.

    Examples:
      >>> import optax
      >>> from mtljax.sharpness import merge_own
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
    """Returns a function that computes per-task gradients and their flat parts.

    Let ``g_i = ∇_θ L_i`` be the gradient of the shared parameters θ, and
    ``q_i = ∇_φ L_i`` that of the own parameters φ_i. Then::

        ε_i = ρ g_i/‖g_i‖            δ_i = ρ_own q_i/‖q_i‖
        g_i^SAM, q_i^SAM = ∇ L_i(θ + ε_i, φ_i + δ_i)        on the same batch
        h_i = g_i^SAM − g_i          to first order ρ ∇‖g_i‖

    The update in the paper is ``A(g_1..g_T) + A(h_1..h_T)`` for θ (see
    :func:`flat_split`) and ``q_i^SAM`` for φ_i.

    Args:
      task_losses: A function ``task_losses(params, *args, **kwargs)`` that returns the
        losses, an array of shape ``[T]`` or a dictionary ``{name: scalar}``, or
        ``(losses, aux)``. Both passes receive the same arguments. Pass the dropout key
        as one of them, because h is noise if the two passes use different dropout
        masks. Return running averages of batch normalisation in ``aux``, which is taken
        from the first pass. Both passes normalise with the statistics of the batch.
      rho: ρ ≥ 0, radius of the ball around the shared and around the own parameters,
        or a :class:`Ball` with further options. May be a traced scalar. A constant 0
        needs no second pass and gives ``flat = 0`` exactly.
      perturb: Direction of the perturbations. ``"local"`` computes one ``ε_i`` per
        task, as in the paper. ``"global"`` computes one ε for all tasks, along the
        mean gradient. With separate norms each head still follows its own loss. With
        a joint norm ε also covers the heads, which is SAM of the mean loss.
        ``"samo"``, or :class:`Samo` with options, mixes both directions.
      split: Whether to separate the loss gradients from the flat parts. With False the
        result is ``SamGrads(g^SAM, None)``. This is sufficient for
        ``flat_split(balancer, "direct")``. It saves passes if ε does not depend on
        ``g_i`` (``"global"`` and ``"samo"``).
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``, see
        :func:`mtljax.value_and_task_grads`. An own leaf must belong to one task only
        (:func:`mtljax.check_labels`). A frozen leaf is not perturbed.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``.
      strategy: How the tasks are run, see :func:`mtljax.value_and_task_grads`. Both
        passes of a task run together. All strategies give the same numbers up to
        rounding. Gradients of own parameters are summed and not stacked, except those
        of the first pass of ``"vmap"``.
      axis_name: The mapped axis, see :func:`mtljax.value_and_task_grads`. Losses and
        gradients are averaged over it in both passes, and every ε is computed from the
        averaged gradient. The results are therefore those of the whole batch on one
        device. Perturbations from the gradient of each device ("m-sharpness") are a
        different algorithm, which is not supported.
      grad_shardings: Shardings of the gradients, see
        :func:`mtljax.value_and_task_grads`.
      backward: See :func:`mtljax.value_and_task_grads`.

    Returns:
      A function ``f(params, *args, mask=None, sam_key=None, sam_active=None,
      **kwargs)``. It returns ``(losses, SamGrads(loss, flat), own_grads)``, with
      ``(losses, aux)`` in first place if ``has_aux=True``. The losses have shape
      ``[T]``, or are a dictionary if ``task_losses`` returns one. The tree
      ``own_grads`` has the structure of the parameters, with ``optax.MaskedNode()`` for
      shared ones, as :func:`merge_own` requires.

      The boolean array ``mask`` of shape ``[T]`` marks the tasks that are present. An
      absent task has zero gradients, does not change its head and is not perturbed.
      Its loss may be NaN, but its derivative must be finite. ``sam_key`` is the random
      key of z for ``"samo"``. If the traced flag ``sam_active`` is False, ``lax.cond``
      skips the second pass at run time. Under ``vmap`` over the flag both branches
      are evaluated.

      Cost in passes over the network:

      - ``"local"``: 1 + T forward and 2 T backward passes.
      - ``"global"``: 2 forward and 1 + 2 T backward passes (1 + T without ``split``).
      - ``"samo"``: one backward and one forward-mode pass more than ``"local"``. With
        ``compat="spsa"``, 2 T forward passes replace the forward-mode pass. Without
        ``split``, T backward passes fewer.

      Memory: 2 T times the shared parameters.

    Raises:
      ValueError: If a radius is negative or not finite, if an option is unknown or
        conflicts with another option, if the labels are invalid, if ``"samo"``
        has no ``sam_key``, or if ``task_losses`` does not return a vector.

    Examples:
      For a quadratic loss with Hessian H, ``h = H ε``. Here ``H_1 = diag(2, 0)`` and
      ``ε_1 = (0.1, 0)``.

      >>> import jax.numpy as jnp
      >>> from mtljax.sharpness import sam_task_grads
      >>> def task_losses(params):
      ...     return jnp.stack([params["w"][0] ** 2, params["w"] @ jnp.ones(2)])
      >>> grad_fn = sam_task_grads(task_losses, rho=0.1)
      >>> losses, grads, _ = grad_fn({"w": jnp.array([1.0, 3.0])})
      >>> grads.loss["w"].tolist(), grads.flat["w"].tolist()
      ([[2.0, 0.0], [1.0, 1.0]], [[0.2, 0.0], [0.0, 0.0]])

    References:
      Phan et al., `Beyond Losses Reweighting: Empowering Multi-Task Learning via the
      Generalization Perspective <https://arxiv.org/abs/2211.13723>`_, ICCV 2025
      (FS-MTL); Foret et al., `Sharpness-Aware Minimization
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
        call = VectorLosses(task_losses, args, kwargs)
        passes = first_pass(
            call,
            params,
            engine.options,
            mask=mask,
            name=name,
        )
        rows = engine.rows(passes, sam_key, sam_active, split=split)
        grads, own = as_trees(passes, rows)
        losses = call.named(passes.losses)
        return ((losses, passes.first.aux) if has_aux else losses), grads, own

    return function
