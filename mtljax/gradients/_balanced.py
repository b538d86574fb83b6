"""The balanced gradient, by the cheapest engine that is exactly equal."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import optax

from mtljax import stack
from mtljax.balancer import as_mask, check_choice, weigh_stacked
from mtljax.gradients._engine._passes import Passes
from mtljax.gradients._gramian_engine import Linearized, choose, linearize_uses
from mtljax.gradients._task_grads import (
    Pullback,
    Strategy,
    linearize,
    own_cotangent,
    task_rows,
)
from mtljax.types import Heads, Mask, Weights

Engine: TypeAlias = Literal["auto", "losses", "stacked", "gramian"]


def _losses_engine(balancer, pull: Pullback, state, inputs, passes):
    """One weighted backward pass: the weights do not depend on the gradients."""
    del passes
    weights, state = balancer.weigh(state, losses=pull.losses, **inputs)
    return pull.shared(weights.astype(pull.losses.dtype)), weights, state


def _stacked_engine(balancer, pull: Pullback, state, inputs, passes):
    """T backward passes, then the balancer's own update."""
    grads = task_rows(pull, passes)
    if getattr(balancer, "weigh", None) is None:
        if inputs["mask"] is not None:
            grads = stack.select(grads, inputs["mask"])
        transform = optax.with_extra_args_support(balancer)
        update, state = transform.update(grads, state, losses=pull.losses, **inputs)
        return update, None, state
    weights, grads, state = weigh_stacked(
        balancer, grads, state, losses=pull.losses, **inputs
    )
    return stack.combine(grads, weights), weights, state


def _gramian_engine(balancer, pull: Linearized, state, inputs, passes):
    """T backward passes of the activations, then a weighted one or their mixture."""
    mask = inputs["mask"]
    pull = pull if mask is None else pull.select(mask)
    rows = pull.rows(passes)
    gramian = pull.gramian(rows)
    weights, state = balancer.weigh(
        state, losses=pull.losses, gramian=gramian, **inputs
    )
    return pull.shared(weights, rows), weights, state


_ENGINES = {
    "losses": _losses_engine,
    "stacked": _stacked_engine,
    "gramian": _gramian_engine,
}


def _check_engine(engine: Engine, needs: str, name: str) -> None:
    check_choice("value_and_balanced_grad", "engine", engine, Engine)
    serves = {"losses": ("losses",), "gramian": ("losses", "gramian")}
    if needs not in serves.get(engine, (needs,)):
        raise ValueError(
            f"engine={engine!r} cannot serve {name}, which needs the {needs}; "
            "use engine='auto' or 'stacked'."
        )


def _own_weights(
    heads: Heads,
    weights: Weights | None,
    pull: Pullback | Linearized,
    mask: Mask | None,
):
    if heads == "own" or weights is None:
        return own_cotangent(pull.losses, mask)
    return weights.astype(pull.losses.dtype)


def value_and_balanced_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformationExtraArgs,
    *,
    labels: Any = None,
    heads: Heads = "own",
    has_aux: bool = False,
    engine: Engine = "auto",
    strategy: Strategy = "auto",
    chunk_size: int = 4,
) -> Callable[..., Any]:
    """Losses and the balanced gradient, computed the cheapest exact way.

    Equal to stacking the gradients with :func:`value_and_task_grads` and passing them
    through ``balancer.update``, but a balancer that reads only the losses costs a
    single backward pass, and one that reads the Gramian need not see the gradients:
    with ``y = x W`` and ``δ_t`` the cotangent of y for loss t, the entry of W in the
    Gramian is ``<xᵀ δ_s, xᵀ δ_t> = <δ_s, (x xᵀ) δ_t>``, so that T backward passes of
    the activations are enough, and the update is ``xᵀ Σ_t w_t δ_t`` or one more pass.

    Args:
      task_losses: ``task_losses(params, *args, **kwargs) -> losses[T]`` (or
        ``(losses[T], aux)``).
      balancer: A :class:`mtljax.Balancer` (or any transformation of stacked gradients).
      labels: Marks parameters ``"shared"`` or ``"own"``, see
        :func:`value_and_task_grads`. The balancer sees the shared ones only.
      heads: What own parameters receive: ``"own"``, the gradient of their own task's
        loss, or ``"weighted"``, that gradient times the task's weight. Reference
        codebases differ; the papers that balance "shared parameters" mean the first.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      engine: ``"losses"`` (one weighted backward pass), ``"gramian"`` (T backward
        passes of the activations, then their mixture or one weighted pass, whichever is
        less work; a parameter's T gradients are formed only where that is less work, or
        where it is used in an unknown way), ``"stacked"`` (T backward passes) or
        ``"auto"``: the least that the balancer allows and, of the last two, the one
        with less work by the shapes. The engine ``"gramian"`` inlines
        ``jax.checkpoint``; ``"auto"`` then stacks.
      strategy: How T backward passes run, see :func:`value_and_task_grads`.
      chunk_size: Tasks in a chunk.

    Returns:
      ``function(params, state, *args, mask=None, side=None, **kwargs)`` that returns
      ``(losses[T], grad, state)``, or ``((losses[T], aux), grad, state)``. ``state`` is
      the balancer's (``balancer.init(params)``); ``grad`` is shaped like ``params``.
      ``mask`` ``[T]`` marks the tasks present in the batch. The loss of an absent task
      may be NaN, but must be differentiable to finite numbers (0 · NaN is NaN in any
      backward pass): write ``where``-safe losses. ``side`` is a dict of further
      keywords for the balancer's update.

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
    # Weights that read only the losses need no Gramian, weights that read the
    # gradients need them formed.
    default = {"losses": "losses", "gramian": None}.get(needs, "stacked")
    fixed = engine if engine in ("losses", "stacked") else default

    asked = Passes(strategy, chunk_size)

    def linearized(function, params):
        options = {"has_aux": has_aux, "labels": labels}
        if fixed is not None:
            return linearize(function, params, **options), fixed, asked
        uses, passes = choose(engine, function, params, asked, **options)
        if uses is None:
            return linearize(function, params, **options), "stacked", passes
        return linearize_uses(uses), "gramian", passes

    def function(params, state, *args, mask=None, side=None, **kwargs):
        pull, chosen, passes = linearized(
            lambda p: task_losses(p, *args, **kwargs), params
        )
        found = pull.losses.shape[0]
        if num_tasks is not None and found != num_tasks:
            raise ValueError(
                f"task_losses returns {found} losses, but {name} was built with "
                f"num_tasks={num_tasks}."
            )
        mask = None if mask is None else as_mask(name, found, jnp.asarray(mask))
        inputs = {"mask": mask, **(side or {})}
        run = _ENGINES[chosen]
        shared, weights, state = run(balancer, pull, state, inputs, passes)
        own = pull.own and pull.own(_own_weights(heads, weights, pull, mask))
        grad = pull.merge(shared, own)
        return ((pull.losses, pull.aux) if has_aux else pull.losses), grad, state

    return function
