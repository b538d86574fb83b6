"""The balanced gradient, by the cheapest engine that is exactly equal."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import optax

from mtljax import placement, stack
from mtljax.balancer import check_choice, commit
from mtljax.gradients.gramian import LinearizedUses, choose, linearize_uses
from mtljax.gradients.linearized import (
    AxisName,
    Linearized,
    Strategy,
    linearize,
    make_options,
    own_weights,
)
from mtljax.gradients.scatter import scattered_step
from mtljax.gradients.task_grads import task_rows
from mtljax.placement import Backward
from mtljax.types import Heads

Engine: TypeAlias = Literal["auto", "losses", "stacked", "gramian"]


def _losses_engine(balancer, found: Linearized, state, inputs, passes):
    """One weighted backward pass: the weights do not depend on the gradients."""
    del passes
    weights, state = balancer.weigh(state, losses=found.losses, **inputs)
    return found.shared(weights), weights, state


def _stacked_engine(balancer, found: Linearized, state, inputs, passes):
    """T backward passes, then the balancer's own update."""
    if found.options.exchange == "scatter":
        return scattered_step(balancer, found, state, inputs, passes)
    rows = task_rows(found, passes)
    if getattr(balancer, "weigh", None) is None:
        stacked = found.leaves.shared_tree(rows)
        transform = optax.with_extra_args_support(balancer)
        update, state = transform.update(stacked, state, losses=found.losses, **inputs)
        return found.leaves.shared_list(update), None, state
    stack.check(rows, balancer.num_tasks, balancer.name)
    gramian = found.gramian(rows) if balancer.needs == "gramian" else None
    weights, state = balancer.weigh(
        state, losses=found.losses, gramian=gramian, **inputs
    )
    return stack.combine(rows, weights), weights, state


def _gramian_engine(balancer, found: LinearizedUses, state, inputs, passes):
    """T backward passes of the activations, then a weighted one or their mixture."""
    rows = found.rows(passes)
    gramian = found.gramian(rows)
    weights, state = balancer.weigh(
        state, losses=found.losses, gramian=gramian, **inputs
    )
    return found.shared(weights, rows), weights, state


_ENGINES = {
    "losses": _losses_engine,
    "stacked": _stacked_engine,
    "gramian": _gramian_engine,
}


def _check_engine(engine: Engine, needs: str, name: str) -> None:
    check_choice("value_and_balanced_grad", "engine", engine, Engine)
    supports = {"losses": ("losses",), "gramian": ("losses", "gramian")}
    if needs not in supports.get(engine, (needs,)):
        raise ValueError(
            f"engine={engine!r} does not support {name}, which needs the {needs}; "
            "use engine='auto' or 'stacked'."
        )


def value_and_balanced_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformationExtraArgs,
    *,
    labels: Any = None,
    heads: Heads = "own",
    has_aux: bool = False,
    engine: Engine = "auto",
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
    grad_shardings: Any = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Computes the losses and the balanced gradient in the cheapest exact way.

    Equal to stacking the gradients with :func:`value_and_task_grads` and passing them
    through ``balancer.update``, but a balancer that reads only the losses costs a
    single backward pass, and one that reads the Gramian need not form the gradients:
    with ``y = x W`` and ``δ_t`` the cotangent of y for loss t, the entry of W in the
    Gramian is ``<xᵀ δ_s, xᵀ δ_t> = <δ_s, (x xᵀ) δ_t>``, so that T backward passes of
    the activations are enough, and the update is ``xᵀ Σ_t w_t δ_t`` or one more pass.

    Args:
      task_losses: ``task_losses(params, *args, **kwargs) -> losses[T]`` (or
        ``(losses[T], aux)``).
      balancer: A :class:`mtljax.Balancer` (or any transformation of stacked gradients).
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``, see
        :func:`value_and_task_grads`. The balancer sees the shared ones only.
      heads: Gradient of own parameters: ``"own"``, that of their own task's loss, or
        ``"weighted"``, that gradient times the task's weight. Reference codebases
        differ; the papers that balance "shared parameters" mean the first.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      engine: ``"losses"`` (one weighted backward pass), ``"gramian"`` (T backward
        passes of the activations, then their mixture or one weighted pass, whichever is
        less work; a parameter's T gradients are formed only if that is less work, or
        if it is used in an unknown way), ``"stacked"`` (T backward passes) or
        ``"auto"``: the cheapest that the balancer allows and, of the last two, the one
        with less work by the shapes. ``"auto"`` stacks if ``task_losses`` uses
        ``jax.checkpoint``, which the engine ``"gramian"`` inlines, or a ``custom_vjp``
        whose rule is not linear in the cotangent, for which ``"gramian"`` raises. The
        engine ``"losses"`` passes the weighted cotangent through such a rule, as
        training with static weights does.
      strategy: How T backward passes run, see :func:`value_and_task_grads`.
      axis_name: The mapped axis, see :func:`value_and_task_grads`; with
        ``Mapped(name, exchange="scatter")`` the gradients are stacked and every device
        holds a part of them. The balancer sees the means over the devices, and its
        state is equal on all of them.
      grad_shardings: Shardings of the gradient, see :func:`value_and_task_grads`.
      backward: See :func:`value_and_task_grads`.

    Returns:
      ``function(params, state, *args, mask=None, side=None, **kwargs)`` that returns
      ``(losses[T], grad, state)``, or ``((losses[T], aux), grad, state)``. ``state`` is
      the balancer's (``balancer.init(params)``); ``grad`` is shaped like ``params``.
      ``mask`` ``[T]`` marks the tasks present in the batch. The loss of an absent task
      may be NaN, but must be differentiable to finite numbers (0 · NaN is NaN in any
      backward pass): write ``where``-safe losses. ``side`` is a dict of further
      keywords for the balancer's update. If a loss or gradient of a present task, or
      the result, is not finite, ``grad`` is NaN everywhere and the state is unchanged.

    Raises:
      ValueError: If the balancer was built for another number of tasks, the losses are
        not a vector, or ``heads="weighted"`` meets a balancer without weights.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax, optax
      >>> def task_losses(params, x):
      ...     h = x @ params["trunk"]
      ...     pair = zip((0.0, 1.0), params["heads"])
      ...     return jnp.stack([jnp.mean((h @ v - y) ** 2) for y, v in pair])
      >>> params = {"trunk": jnp.ones((2, 3)), "heads": [jnp.ones(3), -jnp.ones(3)]}
      >>> balancer = mtljax.mgda(2)
      >>> grad_fn = value_and_balanced_grad(
      ...     task_losses, balancer, labels={"trunk": "shared", "heads": "own"})
      >>> state = balancer.init(params)
      >>> losses, grad, state = jax.jit(grad_fn)(params, state, jnp.eye(2))
      >>> jax.tree.map(jnp.shape, grad)
      {'heads': [(3,), (3,)], 'trunk': (2, 3)}

    References:
      Goodfellow, `Efficient Per-Example Gradient Computations
      <https://arxiv.org/abs/1510.01799>`_, 2015, has the identity for norms; Quinton
      and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, descend by the Gramian.
    """
    needs = getattr(balancer, "needs", "grads")
    num_tasks = getattr(balancer, "num_tasks", None)
    name = getattr(balancer, "name", "the transformation")
    check_choice("value_and_balanced_grad", "heads", heads, Heads)
    if heads == "weighted" and getattr(balancer, "weigh", None) is None:
        raise ValueError(
            f"heads='weighted' needs task weights, but {name} has none; "
            "use heads='own'."
        )
    _check_engine(engine, needs, name)
    options = make_options(
        "value_and_balanced_grad",
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
        grad_shardings=grad_shardings,
    )
    # Weights that read only the losses need no Gramian, weights that read the
    # gradients need them formed.
    default = {"losses": "losses", "gramian": None}.get(needs, "stacked")
    fixed = engine if engine in ("losses", "stacked") else default
    if options.exchange == "scatter":
        if needs == "grads" or engine == "gramian":
            raise ValueError(
                f"exchange='scatter' stacks gradients of which a device holds a part; "
                f"it supports neither engine='gramian' nor {name} if that reads "
                "the gradients. Use exchange='all'."
            )
        fixed = fixed or "stacked"

    def linearized(function, params, mask):
        if fixed is None:
            uses, passes = choose(engine, function, params, options)
            if uses is not None:
                found = linearize_uses(uses, options, mask=mask, name=name)
                return found, "gramian", passes
        else:
            passes = options.passes
        found = linearize(function, params, options, mask=mask, name=name)
        return found, fixed or "stacked", passes

    def function(params, state, *args, mask=None, side=None, **kwargs):
        found, chosen, passes = linearized(
            lambda p: task_losses(p, *args, **kwargs), params, mask
        )
        losses, mask = found.losses, found.region.mask
        if num_tasks is not None and losses.shape[0] != num_tasks:
            raise ValueError(
                f"task_losses returns {losses.shape[0]} losses, but {name} was built "
                f"with num_tasks={num_tasks}."
            )
        inputs = {"mask": mask, **(side or {})}
        shared, weights, new = _ENGINES[chosen](balancer, found, state, inputs, passes)
        if heads == "own" or weights is None:
            weights = own_weights(losses, mask)
        grad = found.leaves.gradient(shared, found.own(weights))
        seen = losses if mask is None else jnp.where(mask, losses, 0)
        grad, state = commit(jnp.isfinite(seen).all(), grad, new, state)
        grad = placement.constrain(grad, grad_shardings)
        return ((losses, found.aux) if has_aux else losses), grad, state

    return function
