"""Alternating independent task steps, as one pure step per batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax import placement
from mtljax.alternating import _states as states
from mtljax.alternating._parts import make_parts
from mtljax.alternating._schedule import (
    Groups,
    Order,
    Plan,
    Rounds,
    Schedule,
    make_plan,
)
from mtljax.alternating._step import (
    BatchNorm,
    Carry,
    Keep,
    Rule,
    Run,
    StepOptions,
    decay_once,
    inner_step,
)
from mtljax.balancer import (
    Balancer,
    as_mask,
    check_choice,
    check_num_tasks,
    check_number,
)
from mtljax.gradients import AxisName
from mtljax.gradients.linearized import make_options
from mtljax.types import Losses, Mask, Params
from mtljax.wrappers import fold_keys

NAME = "alternate"
DEFAULTS = StepOptions()


class AlternatingState(NamedTuple):
    """State of :func:`alternate`.

    Attributes:
      key: Of the run, never replaced; draws are functions of it and of ``batch``.
      batch: Batches seen.
      order: Groups in the order of the current round.
      shared: Optimiser states of the shared parameters, every leaf ``[slots, ...]``.
      rows: Those of stacked own parameters, ``[T, ...]``; () without any.
      owned: Those of the leaves that a task number owns, one per owner.
      balancer: States of the balancer, ``[groups, ...]``; () without one.
      decay: State of ``decay``.
      losses: The last loss of every task, 0 before the first.
      counts: Steps that every task has made.
      active: Tasks that stepped in the last batch.
    """

    key: PRNGKeyArray | None
    batch: Int[Array, ""]
    order: Int[Array, " groups"]
    shared: Any
    rows: Any
    owned: tuple[Any, ...]
    balancer: Any
    decay: Any
    losses: Losses
    counts: Int[Array, " tasks"]
    active: Mask


class Cost(NamedTuple):
    """Passes over the network per batch, and optimiser states of the shared part.

    With a ``grad_fn`` a pass forward and backward is one call of it. Where groups
    differ in size, a batch of ``"per_batch"`` may cost up to this.
    """

    forward: int
    backward: int
    states: int


class Alternating(NamedTuple):
    """What :func:`alternate` returns.

    Attributes:
      init: ``init(params) -> AlternatingState``.
      step: ``step(task_loss, params, state, batch, *, mask=None, batch_stats=None,
        with_key=False) -> (losses[T], params, state)``.
      plan: ``plan(state) -> Plan``: which tasks step in the next batch, in order. For a
        loader that feeds one task at a time.
      cost: Per batch.
    """

    init: Callable[[Params], AlternatingState]
    step: Callable[..., tuple[Any, Any, AlternatingState]]
    plan: Callable[[AlternatingState], Plan]
    cost: Cost


def _check_groups(num_tasks: int, groups: int | Groups | None) -> tuple[Groups, int]:
    """The checked options, and G."""
    check_num_tasks(NAME, num_tasks)
    found = groups if isinstance(groups, Groups) else Groups(groups)
    check_choice(NAME, "loss", found.loss, ("sum", "mean"))
    if isinstance(found.regroup_every, str):
        check_choice(NAME, "regroup_every", found.regroup_every, ("batch", "never"))
    else:
        check_number(NAME, "regroup_every", found.regroup_every, at_least=1)
    count = found.number
    if count is None:
        return found, num_tasks
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{NAME}: groups must be a positive integer, not {count!r}.")
    if count > num_tasks:
        raise ValueError(
            f"{NAME}: groups={count} is more than num_tasks={num_tasks}; every group "
            "needs a task."
        )
    return found, count


def _check_options(options: StepOptions, axis_name: Any) -> None:
    check_choice(NAME, "batch_norm", options.batch_norm, BatchNorm)
    check_choice(NAME, "moments", options.moments, states.Moments)
    check_number(NAME, "batch_norm_decay", options.batch_norm_decay, above=0, below=1)
    if options.clip_norm is not None:
        check_number(NAME, "clip_norm", options.clip_norm, above=0)
    if options.grad_fn is not None and axis_name is not None:
        raise ValueError(
            f"{NAME}: a grad_fn sees the losses of this device only, so that it cannot "
            "be averaged inside; leave out axis_name and return jax.lax.pmean of the "
            "loss from the task loss."
        )


def _check_balancer(balancer: Any, rounds: Rounds, state: Keep) -> None:
    if balancer is None:
        return
    if not isinstance(balancer, Balancer):
        raise ValueError(
            f"{NAME}: balancer must be a mtljax.Balancer, not a "
            f"{type(balancer).__name__}."
        )
    if balancer.num_tasks != rounds.size:
        raise ValueError(
            f"{NAME}: {balancer.name} was built for num_tasks={balancer.num_tasks}, "
            f"but the largest of groups={rounds.groups} of {rounds.num_tasks} tasks "
            f"has {rounds.size}."
        )
    if state == "per_task":
        raise ValueError(
            f"{NAME}: {balancer.name} makes one gradient of a group's, which belongs "
            "to no task's state; use state='slot' or 'shared'."
        )
    if balancer.observe is not None:
        raise ValueError(
            f"{NAME}: {balancer.name} looks at the losses again after a step, which an "
            "inner step does not offer."
        )


def _cost(rule: Rule) -> Cost:
    rounds, balancer = rule.rounds, rule.balancer
    together = rounds.steps
    apart = rounds.num_tasks if rounds.schedule == "same_batch" else rounds.size
    by_member = rule.by_member or (balancer and balancer.needs != "losses")
    if balancer is not None and rule.options.grad_fn is not None:
        by_member = True
    backward = apart if by_member else together
    forward = backward if rule.options.grad_fn is not None else together
    return Cost(forward, backward, rule.slots)


def _init(rule: Rule, labels: Any, key: Any, params: Params) -> AlternatingState:
    num_tasks, rounds = rule.num_tasks, rule.rounds
    parts = make_parts(NAME, labels, params, num_tasks)
    shared = parts.shared(params)
    states.check(NAME, rule.optimizer, shared)
    rows: Any = ()
    if parts.has_rows:
        heads = parts.rows(params)
        states.check(NAME, rule.own_optimizer, jax.tree.map(lambda x: x[0], heads))
        rows = states.copies(rule.own_optimizer.init, heads, num_tasks, axis=0)
    owned = []
    for task in parts.owners:
        leaves = parts.owned(params, task)
        states.check(NAME, rule.own_optimizer, leaves)
        owned.append(fold_keys(rule.own_optimizer.init(leaves), task))
    balancer: Any = ()
    if rule.balancer is not None:
        balancer = states.copies(rule.balancer.init, shared, rounds.groups)
    return AlternatingState(
        key=None if key is None else jnp.copy(key),  # the caller's is not donated
        batch=jnp.zeros((), jnp.int32),
        order=jnp.arange(rounds.groups, dtype=jnp.int32),
        shared=states.shrink(
            states.copies(rule.optimizer.init, shared, rule.slots), rule.options.moments
        ),
        rows=rows,
        owned=tuple(owned),
        balancer=balancer,
        decay=() if rule.options.decay is None else rule.options.decay.init(params),
        losses=jnp.zeros(num_tasks),
        counts=jnp.zeros(num_tasks, jnp.int32),
        active=jnp.zeros(num_tasks, bool),
    )


def _plan(rule: Rule, state: AlternatingState) -> tuple[Plan, Int[Array, " groups"]]:
    losses = jnp.where(state.counts > 0, state.losses, jnp.inf)
    return make_plan(rule.rounds, state.key, state.batch, losses, state.order)


def _carry(params: Params, state: AlternatingState, batch_stats: Any) -> Carry:
    """What inner steps change, as the batch finds it."""
    return Carry(
        params=jax.tree.map(jnp.asarray, params),
        shared=state.shared,
        rows=state.rows,
        owned=state.owned,
        balancer=state.balancer,
        losses=state.losses,
        seen=state.losses,
        counts=state.counts,
        active=jnp.zeros_like(state.active),
        batch_stats=batch_stats,
    )


def _step(run: Run, state: AlternatingState) -> tuple[Carry, Any, AlternatingState]:
    """What inner steps left, the parameters and the state after a batch."""
    rule, carry = run.rule, run.before
    plan, order = _plan(rule, state)
    steps = (plan.members, plan.groups, jnp.arange(rule.rounds.steps))
    if rule.rounds.steps == 1:
        carry = inner_step(run, carry, jax.tree.map(lambda x: x[0], steps))
    else:
        carry, _ = jax.lax.scan(
            lambda c, at: (inner_step(run, c, at), None),
            carry,
            steps,
        )
    params, decay = decay_once(run, carry.params, state.decay, carry.active)
    state = AlternatingState(
        key=state.key,
        batch=state.batch + 1,
        order=order,
        shared=carry.shared,
        rows=carry.rows,
        owned=carry.owned,
        balancer=carry.balancer,
        decay=decay,
        losses=carry.losses,
        counts=carry.counts,
        active=carry.active,
    )
    return carry, params, state


def alternate(
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    *,
    schedule: Schedule = "same_batch",
    order: Order = "random",
    state: Keep | None = None,
    groups: int | Groups | None = None,
    key: PRNGKeyArray | None = None,
    labels: Any = None,
    own_optimizer: optax.GradientTransformation | None = None,
    balancer: Balancer | None = None,
    options: StepOptions = DEFAULTS,
    axis_name: AxisName = None,
) -> Alternating:
    """Independent optimiser steps on one task (or group of tasks) after another.

    With θ shared, φ_t the own parameters of task t, O an optimiser with state s_t and π
    an order of the tasks drawn for every batch B::

        for t in π:   g, q = ∇_{θ,φ_t} L_t(θ, φ_t; B)       where the last task left θ
                      Δ, s_t = O(g, s_t);   θ ← θ + Δ;      likewise φ_t with q

    With G groups instead of T tasks, L_t becomes the sum over a group. To second order
    in the learning rate η of plain SGD, a batch moves θ by
    ``−η Σ_t g_t + (η²/2) ∇ Σ_{s<t} <g_s, g_t>`` on average over the orders: a joint
    step on the *sum* of the losses and a pull to where gradients agree. So compare with
    the sum at the same η, or the mean at T η. Per-task states of Adam make it blind to
    the scale of every loss (up to Adam's ε); no state makes it descend on their sum.

    This is our implementation of the idea of arXiv 2109.11678, whose text was not
    available: alternation, task-wise states and random grouping are its abstract's;
    which state a group uses, how often groups are drawn, the order and the counters are
    inferred. Hence the options.

    Own parameters that take no part in a step, and their optimiser state, stay bit by
    bit as they are: fed with the zero gradients of an inactive head, Adam would go on
    moving it, √T times as far in all. What belongs to a batch happens once a batch:
    schedules inside the optimisers (learning rates, ``optax.inject_hyperparams``) read
    the number of the batch, ``decay`` acts after the last inner step.
    Bias corrections count the steps of their own state.

    Args:
      optimizer: Any optax optimiser whose state is made of arrays. It gets
        ``value=loss``. It sees the shared parameters and those of every task apart:
        clip with ``StepOptions(clip_norm=...)``, not inside. Weight decay inside it
        (``optax.adamw``) acts at every inner step: use ``StepOptions(decay=...)``.
      num_tasks: T.
      schedule: ``"same_batch"``: all steps on every batch. ``"per_batch"``: one step a
        batch, so that G batches form a round; natural when tasks have data of their
        own.
      order: Of the groups in a round: ``"random"``, ``"fixed"`` (by number), or
        ``"largest_loss_first"`` by the losses last seen.
      state: Which optimiser state moves the shared parameters. ``"per_task"``: T
        states; within a group every member steps with its own, all from the same point,
        and the displacements add up (G = 1 is AdaTask, see :func:`adatask`).
        ``"slot"``: one for each of the G groups, whoever is in it; ``"shared"``: a
        single one. Default: per task for G = T, else slot.
      groups: G, from 1 (one step on all tasks) to T (the default), or :class:`Groups`
        with the options of random partitions.
      key: Seeds orders, partitions, the ``key`` of the task loss and the rounding of
        ``moments``. Needed where one of them is drawn.
      labels: ``"shared"``; ``"own"``, a leaf ``[T, ...]`` with a row for every task, of
        which a task loss gets its own row ``[...]``; or a task's number, for a leaf of
        any shape that this task alone owns. A tree, a prefix of one, or a function of
        the path. None: all shared.
      own_optimizer: For own parameters; ``optimizer`` by default.
      balancer: Combines the members' gradients of shared parameters within a group; of
        as many tasks as the largest group. Own parameters follow their own loss, and
        ``Groups.loss`` is not read.
      options: See :class:`StepOptions`.
      axis_name: The mapped axis of ``jax.pmap`` or ``jax.shard_map``, if the task loss
        is that of this device's part of the batch, see
        :func:`mtljax.value_and_task_grads`. Every inner step is then made with losses,
        gradients and running averages that are means over the devices; parameters and
        state stay equal on all of them. ``key=`` differs by device, and so may masks.

    Returns:
      ``init`` and ``step``, see :class:`Alternating`. ``task_loss(params, task,
      batch)`` returns a scalar; ``task`` is a traced number. It also gets ``key=``
      (fresh for every inner step, for dropout) if ``with_key``, and ``batch_stats=`` if
      the step was given some, and then returns ``(loss, batch_stats)``, as the step
      returns ``((losses, batch_stats), params, state)``. For a function of all losses
      see :func:`indexed`. ``losses`` ``[T]`` are those that each task last stepped on.
      Tasks absent by ``mask`` ``[T]`` do not step, nor does a group of absent tasks.
      An inner step whose losses, gradients or updates are not finite is skipped:
      parameters and states are those before it, and only ``losses`` shows it.

      Cost per batch: G passes forward and backward; T backward for ``"per_task"``
      within groups and for a balancer that reads gradients; a G-th of it with
      ``"per_batch"``. State: the optimiser's T, G or 1 times for shared parameters,
      once for own ones. One compiled body: with stacked heads, compile time does not
      depend on T.

    Raises:
      ValueError: Unknown options; ``groups`` outside 1 to T; a missing key; labels that
        fit no leaf; an optimiser whose state cannot be stacked; a balancer of another
        number of tasks; a task loss that is no scalar.

    Examples:
      Two tasks pull at one weight, one 100 times as hard. With states of their own
      neither wins; with one state the loud one does.

      >>> import jax, jax.numpy as jnp, optax
      >>> from mtljax.alternating import alternate
      >>> def task_loss(params, task, batch):
      ...     return params["w"] * jnp.array([1.0, -100.0])[task]
      >>> def moved(state):
      ...     two = alternate(optax.adam(1e-3), 2, order="fixed", state=state)
      ...     step = jax.jit(lambda p, s: two.step(task_loss, p, s, None))
      ...     params = {"w": jnp.array(0.0)}
      ...     opt = two.init(params)
      ...     for _ in range(20):
      ...         losses, params, opt = step(params, opt)
      ...     return abs(float(params["w"])) > 1e-3
      >>> moved("per_task"), moved("shared")
      (False, True)

    References:
      Pascal et al., `Improved optimization strategies for deep Multi-Task Networks
      <https://arxiv.org/abs/2109.11678>`_, 2021; Yang et al., `AdaTask
      <https://arxiv.org/abs/2211.15055>`_, 2022.
    """
    grouping, count = _check_groups(num_tasks, groups)
    check_choice(NAME, "schedule", schedule, Schedule)
    check_choice(NAME, "order", order, Order)
    kept = ("per_task" if count == num_tasks else "slot") if state is None else state
    check_choice(NAME, "state", kept, Keep)
    _check_options(options, axis_name)
    rounds = Rounds(num_tasks, count, schedule, order, grouping.batches)
    _check_balancer(balancer, rounds, kept)
    if key is None and (rounds.draws or options.moments == "bfloat16"):
        raise ValueError(
            f"{NAME}: orders, groups or roundings are drawn at random here; pass "
            "key=jax.random.key(...)."
        )
    rule = Rule(
        optimizer=optimizer,
        own_optimizer=optimizer if own_optimizer is None else own_optimizer,
        rounds=rounds,
        state=kept,
        mean=grouping.loss == "mean",
        balancer=balancer,
        options=options,
        gradients=make_options(NAME, axis_name=axis_name),
    )

    def init(params):
        return _init(rule, labels, key, params)

    def step(
        task_loss, params, state, batch, *, mask=None, batch_stats=None, with_key=False
    ):
        if with_key and state.key is None:
            raise ValueError(
                f"{NAME}: with_key=True needs a key; pass key=jax.random.key(...) to "
                f"{NAME}."
            )
        local = None if mask is None else as_mask(NAME, num_tasks, mask)
        axes = rule.gradients.axes
        shared_mask = local
        if local is not None and axes:
            shared_mask = placement.total(local.astype(jnp.int32), axes) > 0
        run = Run(
            rule=rule,
            parts=make_parts(NAME, labels, params, num_tasks),
            before=_carry(params, state, batch_stats),
            task_loss=task_loss,
            batch=batch,
            number=state.batch,
            mask=shared_mask,
            local_mask=local,
            key=state.key,
            with_key=with_key,
        )
        carry, params, state = _step(run, state)
        losses = carry.seen
        if batch_stats is not None:
            losses = losses, carry.batch_stats
        return losses, params, state

    return Alternating(init, step, lambda s: _plan(rule, s)[0], _cost(rule))
