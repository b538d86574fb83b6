"""Computes the balanced gradient with the cheapest exact engine.

A balancer declares what it reads: the losses, the Gramian of the task gradients, or the
gradients. :func:`value_and_balanced_grad` selects an engine that computes no more than
this. All engines return the same update up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from mtljax import placement
from mtljax.balancer import check_choice, commit, task_vector
from mtljax.gradients.gramian import linearize_any
from mtljax.gradients.labels import resolve_measure
from mtljax.gradients.linearized import (
    AxisName,
    Leaves,
    Options,
    Strategy,
    VectorLosses,
    linearize,
    make_options,
    own_weights,
    present_tasks,
    split_leaves,
    unsplit,
)
from mtljax.gradients.micro import Wanted, accumulate
from mtljax.gradients.representation import Through, linearize_through
from mtljax.gradients.scatter import scatter
from mtljax.gradients.separate import (
    Separate,
    linearize_separate,
    ordered,
    with_labels,
)
from mtljax.placement import Backward
from mtljax.types import Heads, Losses, Mask, Params

Engine: TypeAlias = Literal["auto", "losses", "stacked", "gramian"]

_NAME = "value_and_balanced_grad"


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
    measure: Any = None,
    micro_batches: int | None = None,
    axis_name: AxisName = None,
    grad_shardings: Any = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Returns a function that computes the losses and the balanced gradient.

    The result equals the output of ``balancer.update`` for the stacked gradients of
    :func:`value_and_task_grads`, up to rounding. The cost depends on the balancer:

    - A balancer that reads only the losses needs one backward pass.
    - A balancer that reads the Gramian needs T backward passes for the activations, but
      no stacked parameter gradients. Let ``y = x W``, and let ``δ_t`` be the cotangent
      of y for the loss of task t. The contribution of W to the Gramian is
      ``<xᵀ δ_s, xᵀ δ_t> = <δ_s, (x xᵀ) δ_t>``. The update is ``xᵀ Σ_t w_t δ_t``, or the
      result of one more pass.
    - A balancer that reads the gradients needs T backward passes and stores T
      gradients.

    Args:
      task_losses: A function ``task_losses(params, *args, **kwargs)`` that returns the
        losses, an array of shape ``[T]`` or a dictionary ``{name: scalar}``. With
        ``has_aux=True`` it returns ``(losses, aux)``. See also :func:`mtljax.separate`
        and :func:`mtljax.through`.
      balancer: A :class:`mtljax.Balancer`, or any optax transformation of stacked
        gradients.
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``, see
        :func:`value_and_task_grads`. The balancer receives the shared ones only.
      heads: Gradient of the parameters labelled ``"own"``. ``"own"`` is the gradient of
        the loss of their task. ``"weighted"`` multiplies it by the task weight.
        Reference implementations differ. Papers that balance the shared parameters
        correspond to ``"own"``.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``.
      engine: One of the following:

        - ``"auto"`` selects the cheapest engine that the balancer supports. It decides
          between the last two engines from the shapes. It stacks the gradients if
          ``task_losses`` uses ``jax.checkpoint``, or a ``custom_vjp`` whose rule is not
          linear in the cotangent.
        - ``"losses"`` runs one weighted backward pass. It passes the weighted cotangent
          through nonlinear ``custom_vjp`` rules, as training with constant weights
          does.
        - ``"gramian"`` runs T backward passes of the activations, and then combines
          their results or runs one weighted pass, whichever is less work. The T
          gradients of a parameter are formed only if that is less work, or if the
          parameter is used in an unknown operation. This engine inlines
          ``jax.checkpoint``, and raises an error for a ``custom_vjp`` whose rule is
          not linear in the cotangent.
        - ``"stacked"`` computes T gradients.
      strategy: How the T backward passes are run, see :func:`value_and_task_grads`.
      measure: Computes the task weights from other gradients than those of all shared
        parameters. The update is one weighted backward pass of all shared parameters.
        This is a different method with a lower cost, for balancers that read the
        Gramian. ``"representation"`` uses the gradients with respect to the
        representation of :func:`mtljax.through`. The T passes then run through the
        heads, and one pass runs through the trunk. On one device, the Gramian is
        computed from the products of the heads if that is less work than T gradients of
        the representation. To use the gradients of some shared
        parameters, pass their paths as in :func:`label_params`, a function of the path,
        or a tree of booleans. The T passes then end at these parameters.
      micro_batches: M, see :func:`value_and_task_grads`. With ``engine="gramian"`` the
        T gradients are stacked, because the Gramian of a batch is not the sum of the
        Gramians of its parts. With ``measure="representation"`` only the Gramians are
        accumulated, and a second loop computes the weighted gradient.
      axis_name: The mapped axis, see :func:`value_and_task_grads`. With
        ``Mapped(name, exchange="scatter")`` the gradients are stacked, and every device
        stores a part of them. The balancer receives the means over the devices, and its
        state is equal on all devices.
      grad_shardings: Shardings of the gradient, see :func:`value_and_task_grads`.
      backward: See :func:`value_and_task_grads`.

    Returns:
      A function ``f(params, state, *args, mask=None, side=None, **kwargs)``. It returns
      ``(losses, grad, state)``, or ``((losses, aux), grad, state)`` with
      ``has_aux=True``. The losses have shape ``[T]``, or are a dictionary if
      ``task_losses`` returns one. The tree ``grad`` has the structure of ``params``.
      Create the first state with ``balancer.init(params)``. With ``labels``, use
      ``balancer.init(mtljax.shared_params(params, labels))``, which balancers require
      whose state has the structure of the gradients (``moco``, ``db_mtl``,
      ``excess_mtl``, ``per_layer``). The boolean array ``mask`` of shape ``[T]``, or a
      dictionary with the names of the tasks, marks the tasks that are present in the
      batch. The loss of an absent task may be NaN, but its derivative must be finite,
      because ``0 * NaN`` is NaN in the backward pass. The dictionary ``side`` is passed
      to the balancer as keyword arguments. If the result, or a loss or gradient of a
      present task, is not finite, ``grad`` is NaN everywhere and the state is
      unchanged.

    Raises:
      ValueError: If the number of losses differs from ``balancer.num_tasks``, if
        ``task_losses`` does not return a vector, if the balancer does not support the
        options, if ``heads="weighted"`` is used with a balancer that has no task
        weights, if a parameter that is not frozen is not a floating-point array, or if
        the update of ``balancer`` does not have the shapes of the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax, optax
      >>> def task_losses(params, x):
      ...     h = x @ params["trunk"]
      ...     pair = zip((0.0, 1.0), params["heads"])
      ...     return jnp.stack([jnp.mean((h @ v - y) ** 2) for y, v in pair])
      >>> params = {"trunk": jnp.ones((2, 3)), "heads": [jnp.ones(3), -jnp.ones(3)]}
      >>> balancer = mtljax.mgda(2)
      >>> grad_fn = mtljax.value_and_balanced_grad(
      ...     task_losses, balancer, labels={"trunk": "shared", "heads": "own"})
      >>> state = balancer.init(params)
      >>> losses, grad, state = jax.jit(grad_fn)(params, state, jnp.eye(2))
      >>> jax.tree.map(jnp.shape, grad)
      {'heads': [(3,), (3,)], 'trunk': (2, 3)}

    References:
      Goodfellow, `Efficient Per-Example Gradient Computations
      <https://arxiv.org/abs/1510.01799>`_, 2015, uses the same identity for gradient
      norms. Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, use it for the Gramian.
    """
    if not callable(getattr(balancer, "update", None)):
        raise ValueError(
            "value_and_balanced_grad: balancer must be a mtljax.Balancer or an optax "
            f"transformation, not {balancer!r}. Call the method first, for example "
            "mtljax.cagrad(2)."
        )
    needs = getattr(balancer, "needs", "grads")
    name = getattr(balancer, "name", "the transformation")
    check_choice("value_and_balanced_grad", "heads", heads, Heads)
    if heads == "weighted" and getattr(balancer, "weigh", None) is None:
        raise ValueError(
            f"heads='weighted' needs task weights, but {name} has none; "
            "use heads='own'."
        )
    _check_engine(engine, needs, name)
    options = make_options(
        _NAME,
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
        grad_shardings=grad_shardings,
    )
    if measure is not None:
        _check_measure(measure, task_losses, name, needs, micro_batches)
    if options.exchange == "scatter" and (needs == "grads" or engine == "gramian"):
        raise ValueError(
            f"exchange='scatter' stacks gradients of which each device stores a part. "
            f"It does not support engine='gramian', or {name} if that reads the "
            "gradients. Use exchange='all'."
        )
    # A balancer that reads only the losses needs no Gramian. One that reads the
    # gradients needs them stacked.
    default = {"losses": "losses", "gramian": engine}.get(needs, "stacked")
    chosen = engine if engine in ("losses", "stacked") else default
    if options.exchange == "scatter" and chosen == "auto":
        chosen = "stacked"
    names = getattr(balancer, "names", None)
    if isinstance(task_losses, Separate):
        task_losses = ordered(task_losses, names)
    weigh = getattr(balancer, "weigh", None)
    setup = _Setup(
        task_losses, balancer, weigh, heads, chosen, options, measure, micro_batches
    )
    run = _reusing_step if hasattr(balancer, "keep") else _step

    def function(params, state, *args, mask=None, side=None, **kwargs):
        call = VectorLosses(task_losses, args, kwargs, names)
        found = run(setup, call, params, state, mask=mask, side=side or {})
        losses, present = found.losses, found.mask
        seen = losses if present is None else jnp.where(present, losses, 0)
        healthy = jnp.isfinite(seen).all()
        grad, state = commit(healthy, found.grad, found.state, state)
        grad = placement.constrain(grad, grad_shardings)
        losses = call.named(losses)
        return ((losses, found.aux) if has_aux else losses), grad, state

    return function


def _check_whole(found: Any, name: str) -> None:
    """Raises an error if a method that reads gradients would receive parts of them."""
    axes = found.region.axes
    for leaf in found.leaves.of("shared"):
        if unsplit(leaf, axes) != axes:
            raise ValueError(
                f"{name} reads the gradients, but a shared parameter is split over "
                f"{axes}, so each device has a part of its gradient. Gather the "
                "parameters, or use a method that reads the losses or the Gramian."
            )


def _check_update(update: Sequence[Any], leaves: Leaves, name: str) -> None:
    """Raises an error if a transformation has not combined the tasks."""
    wanted = [jnp.shape(leaf) for leaf in leaves.of("shared")]
    shapes = [jnp.shape(leaf) for leaf in update]
    for shape, expected in zip(shapes, wanted, strict=False):
        if shape != expected:
            raise ValueError(
                f"value_and_balanced_grad: {name} returned an update of shape {shape} "
                f"for a parameter of shape {expected}. Pass a balancer, or a chain "
                "whose first transformation is a balancer."
            )


class _Setup(NamedTuple):
    """The options that are known before the parameters."""

    task_losses: Any
    balancer: Any
    weigh: Any
    heads: Heads
    engine: str
    options: Options
    measure: Any
    micro_batches: int | None


class _Step(NamedTuple):
    """The result of a step before the state policy is applied."""

    losses: Losses
    aux: Any
    mask: Mask | None  # tasks that are present on at least one device
    grad: Any
    state: Any


def _step(
    setup: _Setup,
    call: VectorLosses,
    params: Params,
    state: Any,
    *,
    mask: Any,
    side: dict[str, Any],
) -> _Step:
    """Computes the losses, the balanced gradient and the new state."""
    balancer: Any = setup.balancer
    found = _forward(setup, call, params, mask)
    losses, present = found.losses, found.region.mask
    name = getattr(balancer, "name", "the transformation")
    num_tasks = getattr(balancer, "num_tasks", None)
    if num_tasks is not None and losses.shape[0] != num_tasks:
        raise ValueError(
            f"task_losses returns {losses.shape[0]} losses, but {name} was built "
            f"with num_tasks={num_tasks}."
        )
    inputs = {"mask": present, **side}
    ones = own_weights(losses, present)
    if setup.weigh is None:
        _check_whole(found, name)
        stacked = found.leaves.shared_tree(found.stacked())
        transform = optax.with_extra_args_support(balancer)
        update, new = transform.update(stacked, state, losses=losses, **inputs)
        shared, own = jax.tree.leaves(update), found.own(ones)
        _check_update(shared, found.leaves, name)
    else:
        measured, cache = None, None
        if setup.engine != "losses":
            measured, cache = found.measured()
        weights, new = setup.weigh(state, losses=losses, gramian=measured, **inputs)
        of_own = ones if setup.heads == "own" else weights
        shared, own = found.gradients(weights, of_own, cache)
    grad = found.leaves.gradient(shared, own)
    return _Step(losses, found.aux, present, grad, new)


def _reusing_step(
    setup: _Setup,
    call: VectorLosses,
    params: Params,
    state: Any,
    *,
    mask: Any,
    side: dict[str, Any],
) -> _Step:
    """Runs a complete step, or a step with the weights of an earlier one.

    The second step is that of constant weights, with its own forward pass. A common
    forward pass would keep what the T passes need, and would go through all heads once
    more.
    """
    balancer: Any = setup.balancer
    if isinstance(mask, Mapping) and call.names is None:
        jax.eval_shape(call, params)  # sets the names
    mask = task_vector(mask, call.names)
    present = None
    if mask is not None:
        present = present_tasks(mask, balancer.num_tasks, setup.options, _NAME)
    renew = setup._replace(weigh=balancer.renew)
    keep = setup._replace(weigh=balancer.keep, engine="losses", measure=None)

    def branch(setup):
        return lambda state: _step(setup, call, params, state, mask=mask, side=side)

    again = balancer.refresh(state, present)
    return jax.lax.cond(again, branch(renew), branch(keep), state)


def _forward(setup: _Setup, call: VectorLosses, params: Params, mask: Any) -> Any:
    """Runs the forward pass and prepares the gradients that the balancer needs."""
    task: Any = setup.task_losses
    options, measure = setup.options, setup.measure
    weighs = setup.weigh is not None
    given = {"mask": mask, "name": _NAME}
    if setup.micro_batches is not None:
        wanted: Wanted = "losses" if setup.engine == "losses" else "rows"
        return accumulate(
            task,
            call,
            params,
            options,
            setup.micro_batches,
            wanted="representation" if measure == "representation" else wanted,
            owns=not weighs,
            **given,
        )
    if isinstance(task, Separate):
        call.names = task.names
        if setup.engine != "losses":
            return linearize_separate(
                task, params, call.args, call.kwargs, options, **given
            )
        options = with_labels(task, params, options)
    if measure == "representation" and isinstance(task, Through):
        return linearize_through(task, call, params, options, **given)
    if setup.engine == "losses" or not weighs:
        return linearize(call, params, options, **given)
    measured = None
    if measure is not None:
        marks = split_leaves(params, options.labels).marks
        measured = resolve_measure(measure, params, marks)
    found: Any = linearize_any(
        setup.engine, call, params, options, measured=measured, **given
    )
    return scatter(found) if options.exchange == "scatter" else found


def _check_measure(
    measure: Any, task_losses: Any, name: str, needs: str, micro_batches: int | None
) -> None:
    if needs != "gramian":
        raise ValueError(
            f"measure computes task weights from the Gramian of other gradients, but "
            f"{name} needs the {needs}. Leave out measure."
        )
    if measure == "representation" and not isinstance(task_losses, Through):
        raise ValueError(
            "measure='representation' needs task_losses=mtljax.through(encode, losses)."
        )
    if isinstance(task_losses, Separate):
        raise ValueError(
            "measure does not support mtljax.separate, whose tasks already cost one "
            "pass each. Leave out measure."
        )
    if measure != "representation" and micro_batches is not None:
        raise ValueError(
            "micro_batches supports measure='representation' only, because the Gramian "
            "of parameters is not the sum of the Gramians of the micro-batches."
        )
