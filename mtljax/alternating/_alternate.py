"""Alternating independent task steps as one pure step per batch."""

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
      key: Random key of the run. It never changes. Random numbers are functions of it
        and of ``batch``.
      batch: Number of completed batches.
      order: Groups in the order of the current round.
      shared: Optimizer states of the shared parameters, every leaf ``[slots, ...]``.
      rows: Optimizer states of stacked own parameters, ``[T, ...]``, or ().
      owned: Optimizer states of the leaves that a task number owns, one per owner.
      balancer: States of the balancer, ``[groups, ...]``, or () without a balancer.
      decay: State of ``decay``.
      losses: The last loss of every task, 0 before its first step.
      counts: Number of steps of every task.
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
    """Passes over the network per batch, and optimizer states of the shared part.

    With a ``grad_fn``, one forward and one backward pass are one call of it. If groups
    differ in size, the values for ``"per_batch"`` are upper bounds.
    """

    forward: int
    backward: int
    states: int


class Alternating(NamedTuple):
    """Result of :func:`alternate`.

    Attributes:
      init: ``init(params) -> AlternatingState``.
      step: ``step(task_loss, params, state, batch, *, mask=None, batch_stats=None,
        with_key=False) -> (losses[T], params, state)``.
      plan: ``plan(state) -> Plan`` returns the tasks that step in the next batch, in
        order. A data loader can use it to load the data of these tasks only.
      cost: The :class:`Cost` of a batch.
    """

    init: Callable[[Params], AlternatingState]
    step: Callable[..., tuple[Any, Any, AlternatingState]]
    plan: Callable[[AlternatingState], Plan]
    cost: Cost


def _check_groups(num_tasks: int, groups: int | Groups | None) -> tuple[Groups, int]:
    """Returns the validated options and the number of groups G."""
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
            f"{NAME}: a grad_fn sees the losses of this device only, so its gradients "
            "cannot be averaged inside the step. Leave out axis_name and return "
            "jax.lax.pmean of the loss from the task loss."
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
            f"{NAME}: {balancer.name} returns one gradient for the whole group, which "
            "belongs to no state of a task; use state='slot' or 'shared'."
        )
    if balancer.observe is not None:
        raise ValueError(
            f"{NAME}: {balancer.name} needs the losses after the step "
            "(mtljax.observe), which alternate does not compute. Use another balancer."
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
        key=None if key is None else jnp.copy(key),  # the caller's key is not donated
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


CARRIED = ("shared", "rows", "owned", "balancer", "losses", "counts", "active")
"""Fields of the state that the inner steps change."""


def _carry(params: Params, state: AlternatingState, batch_stats: Any) -> Carry:
    """Returns the initial carry of the inner steps of a batch."""
    state = state._replace(active=jnp.zeros_like(state.active))
    return Carry(
        params=jax.tree.map(jnp.asarray, params),
        seen=state.losses,
        batch_stats=batch_stats,
        **{name: getattr(state, name) for name in CARRIED},
    )


def _step(run: Run, state: AlternatingState) -> tuple[Carry, Any, AlternatingState]:
    """Returns the final carry, the parameters and the state after a batch."""
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
    carried = {name: getattr(carry, name) for name in CARRIED}
    state = state._replace(batch=state.batch + 1, order=order, decay=decay, **carried)
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
    """Builds independent optimizer steps on one task or group of tasks after another.

    Let θ be the shared parameters, φ_t the own parameters of task t, and O an optimizer
    with state s_t. For every batch B an order π of the tasks is sampled::

        for t in π:   g, q = ∇_{θ,φ_t} L_t(θ, φ_t; B)       at the θ of the last task
                      Δ, s_t = O(g, s_t);   θ ← θ + Δ;      likewise φ_t with q

    With G groups instead of T tasks, L_t becomes the sum over a group. For plain SGD
    with the learning rate η, the mean change of θ over the orders is, to second order
    in η, ``−η Σ_t g_t + (η²/2) ∇ Σ_{s<t} <g_s, g_t>``. The first term is a joint step
    on the *sum* of the losses. The second term favours points where the gradients
    agree. Therefore compare alternating steps with a joint step on the sum of the
    losses at the same η, or on their mean at T η. With per-task states, Adam is
    invariant to the scale of each loss (up to Adam's ε), so it does not minimise the
    sum of the losses.

    This is our implementation of the idea of arXiv 2109.11678. The text of the paper
    was not available. Alternation, task-wise states and random grouping follow its
    abstract. The state of a group, the frequency of regrouping, the order and the
    counters are our choices and are therefore options.

    Own parameters that take no part in a step do not change, and neither does their
    optimizer state. With the zero gradients of an inactive head, Adam would continue to
    change the head, by √T times as much in total. Operations of a batch are performed
    once per batch. Schedules inside the optimizers (learning rates,
    ``optax.inject_hyperparams``) read the number of the batch, and ``decay`` is applied
    after the last inner step. Bias corrections count the steps of their own state.

    Args:
      optimizer: Any optax optimizer whose state consists of arrays. It receives
        ``value=loss``. It is applied separately to the shared parameters and to those
        of every task. To clip the gradient, use ``StepOptions(clip_norm=...)`` and not
        a transformation in the optimizer. Weight decay in the optimizer
        (``optax.adamw``) is applied at every inner step, so use
        ``StepOptions(decay=...)``.
      num_tasks: T.
      schedule: ``"same_batch"`` performs all steps on every batch. ``"per_batch"``
        performs one step per batch, so that G batches form a round. It is suitable for
        tasks with separate data.
      order: Order of the groups in a round. ``"random"``, ``"fixed"`` (by number), or
        ``"largest_loss_first"`` by the last observed losses.
      state: The optimizer state that updates the shared parameters. ``"per_task"``
        keeps T states. Within a group every member steps with its own state from the
        same point, and the updates are added (G = 1 is AdaTask, see :func:`adatask`).
        ``"slot"`` keeps one state for each of the G groups, for any members.
        ``"shared"`` keeps a single state. The default is ``"per_task"`` for G = T, and
        ``"slot"`` otherwise.
      groups: G, from 1 (one step on all tasks) to T (the default), or :class:`Groups`
        with the options of random partitions.
      key: Random key of orders, partitions, the ``key`` of the task loss and the
        rounding of ``moments``. Required if one of them is sampled.
      labels: ``"shared"``, ``"own"`` or a task number for every leaf. ``"own"`` marks a
        leaf ``[T, ...]`` with one row per task, of which a task loss receives its own
        row ``[...]``. A task number marks a leaf of any shape that only this task uses.
        Pass a tree of labels, a prefix of one, or a function of the path. By default
        all leaves are shared.
      own_optimizer: Optimizer of the own parameters, by default ``optimizer``.
      balancer: Combines the members' gradients of shared parameters within a group. Its
        number of tasks must be the size of the largest group. It requires
        ``state="slot"`` or ``"shared"``, and must not need :func:`mtljax.observe`. Own
        parameters follow their own loss, and ``Groups.loss`` is not used.
      options: See :class:`StepOptions`.
      axis_name: The mapped axis of ``jax.pmap`` or ``jax.shard_map``, if the task loss
        is that of this device's part of the batch, see
        :func:`mtljax.value_and_task_grads`. Every inner step then uses losses,
        gradients and running averages that are means over the devices. Parameters and
        state remain equal on all devices. ``key=`` differs between devices, and masks
        may differ.

    Returns:
      An :class:`Alternating` with the functions ``init`` and ``step``. A step calls
      ``task_loss(params, task, batch)``, which returns a scalar. The number ``task``
      is traced. With ``with_key=True`` the task loss also receives ``key=``, a new key
      for every inner step, for example for dropout. If the step receives
      ``batch_stats``, the task loss receives ``batch_stats=`` too and returns
      ``(loss, batch_stats)``. The step then returns ``((losses, batch_stats), params,
      state)``. If you have a function of all losses, see :func:`indexed`.

      ``losses`` of shape ``[T]`` contains the loss of the last step of each task. Tasks
      that are absent by ``mask``, shape ``[T]``, do not step, and neither do groups of
      absent tasks. An inner step whose losses, gradients or updates are not finite is
      skipped. Parameters and states are then unchanged, and only ``losses`` shows the
      failure.

      Cost per batch: G forward and G backward passes. T backward passes are needed for
      ``"per_task"`` within groups and for a balancer that reads the Gramian or the
      gradients.
      ``"per_batch"`` divides the cost by G. The optimizer state is stored T, G or 1
      times for shared parameters and once for own parameters. The inner steps are one
      compiled loop body. With stacked heads, the compile time does not depend on T.

    Raises:
      ValueError: If an option is unknown, if ``groups`` is not between 1 and T, if a
        key is missing, if a label is invalid, if the optimizer state cannot be
        stacked, if the balancer has another number of tasks, needs ``observe`` or is
        combined with ``state="per_task"``, or if the task loss is not a scalar.

    Examples:
      Two tasks have opposite gradients at one weight, one 100 times as large as the
      other. With per-task states the updates cancel. With one shared state the task
      with the larger gradient dominates.

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
            f"{NAME}: orders, groups or roundings are random with these options; pass "
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
