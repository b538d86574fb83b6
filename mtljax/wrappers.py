"""Wrappers of balancers: composition, smoothing, reuse and groups."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    as_losses,
    as_mask,
    check_number,
    check_state,
    choose_state,
    commit,
    factory,
    judge_losses,
    weigh_stacked,
    weighted,
)
from mtljax.types import Needs, Weights


class ComposeState(NamedTuple):
    """State of :func:`compose`."""

    loss_balancer: Any
    gradient_balancer: Any
    task_weights: Weights  # product of the weights of both balancers


class SmoothState(NamedTuple):
    """State of :func:`smooth_weights`."""

    inner: Any
    average: Weights
    seen: Bool[Array, " tasks"]  # tasks that have an average
    task_weights: Weights


class PerLayerState(NamedTuple):
    """State of :func:`per_layer`, one state of the inner balancer per group."""

    groups: dict[str, Any]


class InjectState(NamedTuple):
    """State of :func:`inject_hyperparams`.

    Attributes:
      step: Number of applied steps.
      hyperparams: Values of the last step. You may replace an entry that has no
        schedule.
      inner: State of the balancer.
    """

    step: Int[Array, ""]
    hyperparams: dict[str, Any]
    inner: Any


@factory
def compose(loss_balancer: Balancer, gradient_balancer: Balancer) -> Balancer:
    """Applies a gradient balancer to the gradients that a loss balancer weighted.

    The gradient balancer reads ``w_i g_i``, the gradients of the losses weighted with
    ``w_i``, and returns weights ``a_i``. The composition is a :class:`Balancer` with
    weights ``w_i a_i``. With ``scale_invariant`` as the loss balancer, the gradient
    balancer reads the gradients of the log losses, as in the ``LOG_`` variants of the
    FAMO code. The direction of ``nash_mtl`` and ``imtl_g`` does not depend on the scale
    of a loss, so it does not change. If the gradient balancer also reads the losses, it
    receives them unweighted.

    Args:
      loss_balancer: A balancer that reads at most the losses.
      gradient_balancer: A balancer with task weights and the same number of tasks.

    Returns:
      A :class:`Balancer` that reads the inputs of both balancers. A step costs the
      passes that the two need. The state contains both states and T numbers.

    Raises:
      ValueError: If the first balancer reads gradients, the second has no task weights,
        or the numbers or the names of the tasks differ.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.compose(mtljax.scale_invariant(2), mtljax.mgda(2))
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 10.0]])}
      >>> state = balancer.init(grads)
      >>> update, _ = balancer.update(grads, state, losses=jnp.array([1.0, 10.0]))
      >>> update["w"].tolist()
      [0.5, 0.5]

    References:
      Dai et al., `Improvable Gap Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2307.15429>`_, 2023, combine loss and gradient balancing.
    """
    first, second = loss_balancer, gradient_balancer
    if first.needs != "losses":
        raise ValueError(
            f"compose: the first balancer must read at most the losses, but "
            f"{first.name} needs the {first.needs}."
        )
    if second.weigh is None or first.weigh is None:
        raise ValueError(
            "compose: the second balancer must have task weights, but "
            f"{second.name} has none."
        )
    if first.num_tasks != second.num_tasks:
        raise ValueError(
            "compose: the numbers of tasks must be equal, but "
            f"{first.name} has num_tasks={first.num_tasks} and "
            f"{second.name} has num_tasks={second.num_tasks}."
        )
    if first.names and second.names and first.names != second.names:
        raise ValueError(
            f"compose: {first.name} has the tasks {list(first.names)} and "
            f"{second.name} has {list(second.names)}, but the names must be the same, "
            "in the same order."
        )
    weigh_losses, weigh_gradients = first.weigh, second.weigh
    num_tasks = first.num_tasks
    name = f"compose({first.name}, {second.name})"

    def init(params):
        return ComposeState(
            first.init(params), second.init(params), jnp.ones(num_tasks, jnp.float32)
        )

    def weigh(state, *, losses=None, gramian=None, mask=None, **side):
        check_type(name, state, ComposeState)
        outer, s1 = weigh_losses(state.loss_balancer, losses=losses, mask=mask, **side)
        if gramian is not None:
            gramian = outer[:, None] * gramian * outer[None, :]
        inner, s2 = weigh_gradients(
            state.gradient_balancer, losses=losses, gramian=gramian, mask=mask, **side
        )
        weights = outer * inner
        keep = as_mask(name, num_tasks, mask).any()
        new = choose_state(keep, ComposeState(s1, s2, weights), state)
        # Restores the first state if the second balancer found a non-finite input.
        return commit(True, weights, new, state)

    def domain(losses):
        within = [b.domain(losses) for b in (first, second) if b.domain is not None]
        return jnp.stack([jnp.ones(num_tasks, bool), *within]).all(0)

    def observe(state, *, losses, mask=None):
        check_type(name, state, ComposeState)
        present = as_mask(name, num_tasks, mask)
        checked = as_losses(name, num_tasks, losses)
        _, healthy = judge_losses(name, num_tasks, checked, present, domain)
        parts = [
            part if b.observe is None else b.observe(part, losses=losses, mask=mask)
            for b, part in ((first, state[0]), (second, state[1]))
        ]
        new = ComposeState(parts[0], parts[1], state.task_weights)
        return commit(healthy, (), new, state)[1]

    looks = first.observe is not None or second.observe is not None
    return weighted(
        name,
        num_tasks,
        init=init,
        weigh=weigh,
        needs=second.needs,
        reads_losses=first.reads_losses or second.reads_losses,
        positive_losses=first.positive_losses or second.positive_losses,
        domain=domain,
        observe=observe if looks else None,
    )


@factory
def smooth_weights(balancer: Balancer, *, decay: float | Array = 0.9) -> Balancer:
    """Exponential moving average of the task weights (CR-MOGM).

    The weights of step k are ``λ_k = a λ_{k-1} + (1 - a) λ̂_k``, where ``λ̂_k`` are the
    weights of the inner balancer. The average starts at the first weights. In the
    paper, a tends to 1 as the learning rate decays. Here it is constant, as in TorchJD.
    If the inner method guarantees that no task gets worse, the average does not.

    Args:
      balancer: A balancer with task weights.
      decay: Decay a, at least 0 and below 1. With 0 the weights are unchanged.

    Returns:
      A :class:`Balancer` that reads the inputs of the inner balancer. A step costs the
      passes of the inner balancer. The state has 2 T more numbers, without
      ``task_weights``.

    Raises:
      ValueError: If ``decay`` is outside [0, 1), or the balancer has no task weights.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.smooth_weights(mtljax.scale_invariant(1), decay=0.5)
      >>> grads = {"w": jnp.ones((1, 1))}
      >>> state = balancer.init(grads)
      >>> for loss in (1.0, 0.5):
      ...     _, state = balancer.update(grads, state, losses=jnp.array([loss]))
      >>> state.task_weights.tolist()
      [1.5]

    References:
      Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient
      Manipulation and Beyond, NeurIPS 2022.
    """
    check_number("smooth_weights", "decay", decay, at_least=0, below=1)
    inner_weigh = balancer.weigh
    if inner_weigh is None:
        raise ValueError(
            "smooth_weights requires a balancer with task weights, but "
            f"{balancer.name} has none."
        )
    num_tasks = balancer.num_tasks
    name = f"smooth_weights({balancer.name})"

    def init(params):
        ones = jnp.ones(num_tasks, jnp.float32)
        return SmoothState(
            balancer.init(params), ones, jnp.zeros(num_tasks, bool), ones
        )

    def weigh(state, *, losses=None, gramian=None, mask=None, **side):
        check_type(name, state, SmoothState)
        found, inner = inner_weigh(
            state.inner, losses=losses, gramian=gramian, mask=mask, **side
        )
        present = as_mask(name, num_tasks, mask)
        mixed = decay * state.average + (1 - decay) * found
        mixed = jnp.where(state.seen, mixed, found)
        weights = jnp.where(present, mixed, 0)
        new = SmoothState(
            inner=inner,
            average=jnp.where(present, mixed, state.average),
            seen=state.seen | present,
            task_weights=weights,
        )
        new = choose_state(present.any(), new, state)
        return commit(True, weights, new, state)

    def observe(state, *, losses, mask=None):
        assert balancer.observe is not None
        check_type(name, state, SmoothState)
        inner = balancer.observe(state.inner, losses=losses, mask=mask)
        return state._replace(inner=inner)

    return weighted(
        name,
        num_tasks,
        init=init,
        weigh=weigh,
        needs=balancer.needs,
        reads_losses=balancer.reads_losses,
        positive_losses=balancer.positive_losses,
        domain=balancer.domain,
        observe=None if balancer.observe is None else observe,
    )


class ReuseState(NamedTuple):
    """State of :func:`reuse`."""

    inner: Any
    kept: Weights  # weights of the last computation
    seen: Bool[Array, " tasks"]  # tasks that were present at the last computation
    steps: Int[Array, ""]  # number of applied steps
    task_weights: Weights


class Reuse(Balancer):
    """A balancer that determines before the T passes whether a step needs them.

    Attributes:
      refresh: Function ``refresh(state, mask) -> bool`` that returns whether this step
        computes new weights.
      keep: Function for a step that reuses the weights, with the arguments of
        ``weigh``. It reads the losses and the mask only.
      renew: Function for a step that computes new weights, with the arguments of
        ``weigh``. It returns ``(weights[T], state)``.
    """

    refresh: Callable[..., Any]
    keep: Callable[..., Any]
    renew: Callable[..., Any]


@factory
def reuse(balancer: Balancer, *, every: int) -> Balancer:
    """Computes the task weights every k steps and reuses them in between.

    In the other steps :func:`mtljax.value_and_balanced_grad` runs the program of a step
    with constant weights, without the T backward passes. If a present task was absent
    at the last computation, the weights are computed again. This does not change the
    steps of the later computations. Reused weights of absent tasks are zero. The other
    weights are scaled to the previous sum. Under ``vmap`` over the state both programs
    run.

    Apply it last. Inside another wrapper, such as :func:`mtljax.smooth_weights`, the
    weights are the same, but all T backward passes run in every step.

    Args:
      balancer: A balancer with task weights.
      every: Number of steps k between two computations, at least 1. The Nash-MTL paper
        uses 1, and 50 or 100 for reinforcement learning.

    Returns:
      A :class:`Balancer` that reads the inputs of the inner balancer. The state is that
      of the inner balancer and 2 T + 1 numbers, without ``task_weights``. With k = 1
      the function returns the inner balancer.

    Raises:
      ValueError: If ``every`` is not a positive integer, or the balancer has no task
        weights.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.reuse(mtljax.mgda(2), every=2)
      >>> first, second = {"w": jnp.array([[1.0], [3.0]])}, {"w": jnp.ones((2, 1)) * 5}
      >>> state = balancer.init(first)
      >>> _, state = balancer.update(first, state)
      >>> _, state = balancer.update(second, state)
      >>> state.task_weights.tolist()
      [1.0, 0.0]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022, Section 5.3, for Nash-MTL.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"reuse: every must be a positive integer, not {every!r}.")
    inner_weigh = balancer.weigh
    if inner_weigh is None:
        raise ValueError(
            f"reuse requires a balancer with task weights, but {balancer.name} has "
            "none."
        )
    if every == 1:
        return balancer
    num_tasks = balancer.num_tasks
    name = f"reuse({balancer.name})"

    def start(inner):
        ones = jnp.ones(num_tasks, float)
        return ReuseState(inner, ones, jnp.zeros(num_tasks, bool), jnp.int32(0), ones)

    def init(params):
        return start(balancer.init(params))

    def check(state):
        check_type(name, state, ReuseState)
        # The inner balancer checks its own state.
        own = jax.eval_shape(lambda: start(()))
        check_state(name, state._replace(inner=()), own)

    def refresh(state, mask=None):
        check(state)
        present = as_mask(name, num_tasks, mask)
        return (state.steps % every == 0) | (present & ~state.seen).any()

    def finish(state, weights, present, healthy, **changed):
        weights = weights.astype(state.kept.dtype)
        new = state._replace(steps=state.steps + 1, task_weights=weights, **changed)
        new = choose_state(present.any(), new, state)
        return commit(healthy, weights, new, state)

    def keep(state, *, losses=None, mask=None, **unused):
        del unused
        present = as_mask(name, num_tasks, mask)
        healthy = True
        if losses is not None:
            _, healthy = judge_losses(name, num_tasks, losses, present, balancer.domain)
        weights = jnp.where(present, state.kept, 0)
        total, here = state.kept.sum(), weights.sum()
        weights = weights * jnp.where(here == 0, 1, total / jnp.where(here, here, 1))
        return finish(state, weights, present, healthy)

    def renew(state, *, mask=None, **inputs):
        weights, inner = inner_weigh(state.inner, mask=mask, **inputs)
        present = as_mask(name, num_tasks, mask)
        weights = weights.astype(state.kept.dtype)
        return finish(
            state, weights, present, True, inner=inner, kept=weights, seen=present
        )

    def weigh(state, *, losses=None, mask=None, **inputs):
        check(state)
        fresh = renew(state, losses=losses, mask=mask, **inputs)
        kept = keep(state, losses=losses, mask=mask)
        again = refresh(state, mask)
        return choose_state(again, fresh, kept)

    def observe(state, *, losses, mask=None):
        assert balancer.observe is not None
        check(state)
        inner = balancer.observe(state.inner, losses=losses, mask=mask)
        return state._replace(inner=inner)

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        weights, updates, new = weigh_stacked(
            reusing,
            updates,
            state,
            params=params,
            losses=losses,
            mask=mask,
            **extra_args,
        )
        return commit(True, stack.combine(updates, weights), new, state)

    reusing: Any = Reuse(
        init,
        update,
        name=name,
        num_tasks=num_tasks,
        needs=balancer.needs,
        weigh=weigh,
        reads_losses=balancer.reads_losses,
        positive_losses=balancer.positive_losses,
        domain=balancer.domain,
        observe=None if balancer.observe is None else observe,
    )
    reusing.refresh, reusing.keep, reusing.renew = refresh, keep, renew
    return reusing


@factory
def per_layer(
    balancer: Balancer, *, group: Callable[[str], str] | None = None
) -> Balancer:
    """Balances every leaf, or every group of leaves, separately.

    Each group has its own Gramian, weights and state. The guarantee that no
    task gets worse then holds in each group, and so for the whole gradient to first
    order. Other properties hold within each group only. This is the "layer" grouping of
    GradVac for any method. Random methods use a different key in each
    group. Every group receives the same losses, masks and side inputs. If the update of
    one group is not finite, all updates are NaN and no state changes.

    Args:
      balancer: The balancer that is applied to every group.
      group: Function ``group(path) -> name``. A path has the form
        ``trunk/dense/kernel``. By default every leaf is a group.

    Returns:
      A :class:`Balancer` that reads the stacked gradients. A step costs T backward
      passes. The state contains one inner state per group. Initialise it with the
      parameters that are balanced, see :func:`mtljax.shared_params`.

    Raises:
      ValueError: If the groups of the gradients differ from those of the state.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.per_layer(mtljax.mgda(2))
      >>> grads = {"a": jnp.array([[1.0], [3.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["a"].tolist()
      [1.0]

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, 2020, for the grouping per layer.
    """

    def groups_of(tree):
        paths = jax.tree_util.tree_leaves_with_path(tree)
        names = [stack.path_name(path) for path, _ in paths]
        return [name if group is None else group(name) for name in names]

    def split(tree):
        """Returns the leaves of every group, in the order of the tree."""
        groups: dict[str, list[Any]] = {}
        for name, leaf in zip(groups_of(tree), jax.tree.leaves(tree), strict=True):
            groups.setdefault(name, []).append(leaf)
        return groups

    def init(params):
        return PerLayerState(
            {
                name: fold_keys(balancer.init(leaves), i)
                for i, (name, leaves) in enumerate(split(params).items())
            }
        )

    def update(updates, state, params=None, **extra_args):
        label = f"per_layer({balancer.name})"
        stack.check(updates, balancer.num_tasks, label, params)
        check_type(label, state, PerLayerState)
        groups = split(updates)
        if set(groups) != set(state.groups):
            raise ValueError(
                f"per_layer: the gradients have groups {sorted(groups)}, but the state "
                f"has {sorted(state.groups)}. Initialise the state with the parameters "
                "that are balanced (mtljax.shared_params)."
            )
        parts, states = {}, {}
        for name, leaves in groups.items():
            part, states[name] = balancer.update(
                leaves, state.groups[name], **extra_args
            )
            parts[name] = iter(jax.tree.leaves(part))
        leaves = [next(parts[name]) for name in groups_of(updates)]
        combined = jax.tree.unflatten(jax.tree.structure(updates), leaves)
        return commit(True, combined, PerLayerState(states), state)

    def observe(state, *, losses, mask=None):
        assert balancer.observe is not None
        check_type(f"per_layer({balancer.name})", state, PerLayerState)
        return PerLayerState(
            {
                name: balancer.observe(inner, losses=losses, mask=mask)
                for name, inner in state.groups.items()
            }
        )

    return Balancer(
        init,
        update,
        name=f"per_layer({balancer.name})",
        num_tasks=balancer.num_tasks,
        needs="grads",
        reads_losses=balancer.reads_losses,
        positive_losses=balancer.positive_losses,
        domain=balancer.domain,
        observe=None if balancer.observe is None else observe,
    )


def inject_hyperparams(
    method: Callable[..., Balancer], *, static_args: tuple[str, ...] = ()
) -> Callable[..., Balancer]:
    """Stores the float hyper-parameters of a balancer in its state.

    The function corresponds to ``optax.inject_hyperparams``, but the result is a
    :class:`Balancer` with the attributes ``needs`` and ``weigh``. Therefore
    :func:`mtljax.value_and_balanced_grad` uses the same engine as for the method
    itself. A step that is not applied does not advance the schedules.

    Args:
      method: Factory of a balancer, such as ``mtljax.cagrad``.
      static_args: Names of arguments that are passed to the factory unchanged. Use it
        for a callable that is not a schedule, or for a float that must be concrete.
        Integers, strings, booleans, keys and balancers are always passed unchanged.

    Returns:
      A factory with the arguments of ``method``. A float argument is a number or a
      schedule ``count -> value``. A number is stored in ``state.hyperparams``, where
      you may replace it. The state contains the state of the method, the values and
      the count.

    Raises:
      ValueError: If ``static_args`` contains a name that is not an argument.

    Examples:
      >>> import jax.numpy as jnp, mtljax, optax
      >>> schedule = optax.linear_schedule(0.0, 1.0, 10)
      >>> balancer = mtljax.inject_hyperparams(mtljax.cagrad)(2, c=schedule)
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> state = balancer.init(grads)
      >>> for _ in range(3):
      ...     update, state = balancer.update(grads, state)
      >>> float(state.hyperparams["c"]), balancer.needs
      (0.2, 'gramian')
    """
    signature = inspect.signature(method)
    for argument in static_args:
        if argument not in signature.parameters:
            raise ValueError(
                f"inject_hyperparams: {method.__name__} has no argument {argument!r}. "
                f"Its arguments are {', '.join(signature.parameters)}."
            )

    @functools.wraps(method)
    def build(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        static, values, schedules = {}, {}, {}
        for argument, value in bound.arguments.items():
            scheduled = callable(value) and not isinstance(value, tuple)
            if argument in static_args or not (scheduled or _is_float(value)):
                static[argument] = value
            else:
                (schedules if scheduled else values)[argument] = value
        return _injected(method, static, values, schedules)

    return build


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or (
        isinstance(value, jax.Array | np.ndarray | np.generic)
        and jnp.issubdtype(value.dtype, jnp.floating)
    )


def _injected(
    method: Callable[..., Balancer],
    static: dict[str, Any],
    values: dict[str, Any],
    schedules: dict[str, Callable[[Any], Any]],
) -> Balancer:
    """Builds the balancer of :func:`inject_hyperparams`."""

    def scheduled(count):
        found = {key: schedule(count) for key, schedule in schedules.items()}
        return {key: jnp.asarray(value, float) for key, value in found.items()}

    # This call checks concrete numbers once. With a concrete number a method may have
    # another form, such as db_mtl without an average. The traced form is used.
    example = method(**static, **values, **scheduled(0))

    def probe(hyperparams):
        traced = method(**static, **hyperparams)
        forms.append((traced.needs, traced.reads_losses, traced.weigh is not None))

    forms: list[tuple[Needs, bool, bool]] = []
    jax.eval_shape(probe, values | scheduled(0))
    needs, reads_losses, weighs = forms[0]
    name = f"inject_hyperparams({example.name})"

    def inner_of(state):
        check_type(name, state, InjectState)
        if set(state.hyperparams) != {*values, *schedules}:
            raise ValueError(
                f"{name}: the state has the hyper-parameters "
                f"{sorted(state.hyperparams)}, but {sorted({*values, *schedules})} are "
                "required. Create it with init(params) of this balancer."
            )
        hyperparams = {**state.hyperparams, **scheduled(state.step)}
        return method(**static, **hyperparams), hyperparams

    def init(params):
        hyperparams = {key: jnp.asarray(value, float) for key, value in values.items()}
        hyperparams |= scheduled(0)
        inner = jax.jit(lambda h: method(**static, **h).init(params))(hyperparams)
        return InjectState(jnp.int32(0), hyperparams, inner)

    def stepped(result, state, hyperparams, mask):
        found, inner = result
        some = as_mask(name, example.num_tasks, mask).any()
        new = InjectState(state.step + 1, hyperparams, inner)
        return commit(True, found, choose_state(some, new, state), state)

    def weigh(state, *, mask=None, **inputs):
        balancer, hyperparams = inner_of(state)
        assert balancer.weigh is not None
        result = balancer.weigh(state.inner, mask=mask, **inputs)
        return stepped(result, state, hyperparams, mask)

    def update(updates, state, params=None, *, mask=None, **extra_args):
        balancer, hyperparams = inner_of(state)
        result = balancer.update(updates, state.inner, params, mask=mask, **extra_args)
        return stepped(result, state, hyperparams, mask)

    def observe(state, *, losses, mask=None):
        balancer, _ = inner_of(state)
        assert balancer.observe is not None
        inner = balancer.observe(state.inner, losses=losses, mask=mask)
        return state._replace(inner=inner)

    attributes = {
        "needs": needs,
        "reads_losses": reads_losses,
        "positive_losses": example.positive_losses,
        "domain": example.domain,
        "observe": None if example.observe is None else observe,
    }
    num_tasks = example.num_tasks
    if not weighs:
        balancer = Balancer(init, update, name=name, num_tasks=num_tasks, **attributes)
    else:
        balancer = weighted(name, num_tasks, init=init, weigh=weigh, **attributes)
    balancer.hyperparams = {**static, **values, **schedules}
    balancer.names = example.names
    return balancer


def check_type(name: str, state: Any, expected: type) -> None:
    """Raises if the state does not have the type of the states of a wrapper."""
    if not isinstance(state, expected):
        raise ValueError(
            f"{name}: the state is of type {type(state).__name__}, not "
            f"{expected.__name__}. Create it with init(params) of this balancer."
        )


def fold_keys(state: Any, number: int) -> Any:
    """Folds the number of the group into every key of the state.

    A raw key, an array of two integers, is recognised by the name of its field.
    """

    def leaf(path, x):
        dtype = jnp.asarray(x).dtype
        named = stack.path_name(path[-1:]) == "key" and dtype == jnp.uint32
        is_key = named or jnp.issubdtype(dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, number) if is_key else x

    return jax.tree_util.tree_map_with_path(leaf, state)
