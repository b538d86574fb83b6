"""One optimizer step for a group of tasks, and the work of a whole batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from mtljax import placement, stack
from mtljax.alternating import _states as states
from mtljax.alternating._gradients import (
    Group,
    averaged,
    each_member,
    group_gradient,
)
from mtljax.alternating._parts import Parts, put_rows, take_rows
from mtljax.alternating._schedule import DROPOUT, ROUNDING, Rounds, draw_key
from mtljax.balancer import Balancer, choose, clone_keys
from mtljax.gradients import value_and_balanced_grad
from mtljax.gradients.linearized import Options
from mtljax.types import Losses, Mask

Keep: TypeAlias = Literal["per_task", "slot", "shared"]
BatchNorm: TypeAlias = Literal["last", "scaled", "batch"]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """Further options of :func:`alternate`.

    Attributes:
      clip_norm: Bound on the global norm of the gradient of an inner step, including
        own parameters. For ``"per_task"`` within groups it applies to each member.
      grad_fn: Replaces ``jax.value_and_grad``. Every inner step calls
        ``grad_fn(loss, has_aux=True)(params)``. Use it for example for sharpness-aware
        gradients. Stacked own leaves of ``params`` have rows of the members only.
      decay: Transformation that is applied to zero gradients once per batch, for the
        parameters that were active. For example, decoupled weight decay is
        ``optax.chain(optax.add_decayed_weights(1e-2),
        optax.scale_by_learning_rate(schedule))``.
      batch_norm: Update of the running averages. They must not depend on the task.
        ``"last"`` updates them once per batch, from the last forward pass.
        ``"scaled"`` updates them in every pass, with steps that together have the
        decay ``batch_norm_decay``. ``"batch"`` does not update them. It is for models
        that always use the statistics of the batch.
      batch_norm_decay: The decay that the model uses for its averages (``"scaled"``).
      moments: ``"bfloat16"`` stores the arrays in the optimizer states of the shared
        parameters in 16 bits, with random rounding so that slow averages keep
        changing. It needs half the memory. To save more, use an optimizer with
        factored second moments (``optax.scale_by_factored_rms``).
    """

    clip_norm: Any = None
    grad_fn: Callable[..., Any] | None = None
    decay: optax.GradientTransformation | None = None
    batch_norm: BatchNorm = "last"
    batch_norm_decay: Any = 0.99
    moments: states.Moments = "full"


class Rule(NamedTuple):
    """The options of :func:`alternate`."""

    optimizer: optax.GradientTransformation
    own_optimizer: optax.GradientTransformation
    rounds: Rounds
    state: Keep
    mean: bool
    balancer: Balancer | None
    options: StepOptions
    gradients: Options

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.rounds.num_tasks

    @property
    def slots(self) -> int:
        """Number of optimizer states of the shared parameters."""
        counts = {"per_task": self.num_tasks, "slot": self.rounds.groups, "shared": 1}
        return counts[self.state]

    @property
    def by_member(self) -> bool:
        """Whether the tasks of a group step separately, all from one point."""
        return self.state == "per_task" and self.rounds.size > 1


class Carry(NamedTuple):
    """The values that an inner step changes."""

    params: Any
    shared: Any  # optimizer states of the shared parameters, [slots, ...]
    rows: Any  # optimizer states of stacked own parameters, [T, ...]
    owned: tuple[Any, ...]  # optimizer states of the leaves of each owner
    balancer: Any  # [groups, ...]
    losses: Losses  # of the completed steps
    seen: Losses  # includes the losses of skipped steps
    counts: Int[Array, " tasks"]
    active: Mask
    batch_stats: Any


class Run(NamedTuple):
    """The values that all inner steps of a batch share.

    An inner step changes rows of stacked arrays, such as a head, that no other step of
    the batch reads. The step reads them from ``before`` and writes them to the carry,
    so that XLA updates them in place. Otherwise XLA copies the stack at every step.
    """

    rule: Rule
    parts: Parts
    before: Carry  # at the start of the batch
    task_loss: Callable[..., Any]
    batch: Any
    number: Int[Array, ""]  # number of the batch
    mask: Mask | None  # tasks that are present on at least one device
    local_mask: Mask | None  # tasks that are present on this device
    key: PRNGKeyArray | None
    with_key: bool

    def draw(self, stream: int, step: Array) -> PRNGKeyArray | None:
        """Returns a key of this inner step."""
        if self.key is None:
            return None
        return jax.random.fold_in(draw_key(self.key, stream, self.number), step)

    def dropout(self, step: Array) -> PRNGKeyArray | None:
        """Returns the key of the task loss, which differs between devices."""
        key, axes = self.draw(DROPOUT, step), self.rule.gradients.axes
        if key is None or not axes:
            return key
        return jax.random.fold_in(key, jax.lax.axis_index(axes))


class Outcome(NamedTuple):
    """Losses of the members, and the new values of all but the own parameters."""

    losses: Array
    healthy: Bool[Array, " members"]  # whether losses and gradients are finite
    stats: Any
    own_grad: Any  # its shared leaves are not used
    params: Any  # the shared parameters
    shared: Any
    balancer: Any


def _where(keep: Any, new: Any, old: Any) -> Any:
    """Selects the new tree where ``keep`` (None: everywhere), in the old dtypes."""

    def leaf(n, o):
        n = n if n.dtype == o.dtype else n.astype(o.dtype)
        return n if keep is None else choose(keep, n, o)

    return jax.tree.map(leaf, new, old)


def _healthy(run: Run, present: Any, loss: Any, *trees: Any) -> Array:
    """Whether a present loss and all trees are finite on all devices."""
    found = jnp.isfinite(jnp.where(present, loss, 0)).all() & stack.all_finite(
        [x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact)]
    )
    return placement.agreed(found, run.before.counts)


def _clip(rule: Rule, grad: Any, params: Any) -> Any:
    bound = rule.options.clip_norm
    if bound is None:
        return grad
    axes = frozenset(rule.gradients.axes)
    squares = []
    for g, leaf in zip(jax.tree.leaves(grad), jax.tree.leaves(params), strict=True):
        split = tuple(sorted(axes & placement.varying(leaf)))
        squares.append(placement.total(jnp.square(g).sum(), split))
    norm = jnp.sqrt(sum(squares))
    factor = jnp.where(norm > bound, bound / norm, 1)
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grad)


def _add(tree: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, tree, other)


def _optimize(run: Run, grad: Any, held: Any, shared: Any, value: Array):
    """Returns the updates of the shared parameters, and the new wide state."""
    optimizer, held = run.rule.optimizer, states.widen(run.rule.optimizer, shared, held)
    grad = run.parts.shared(grad)
    return states.step(optimizer, grad, held, shared, batch=run.number, value=value)


def _together(run: Run, group: Group, view: Any, carry: Carry, at: Any) -> Outcome:
    """Performs one optimizer step with one gradient of the group."""
    slot, number = at
    rule, parts = run.rule, run.parts
    balancer = carry.balancer
    if rule.balancer is None:
        losses, stats, grad = group_gradient(
            group, view, rule.mean, rule.options.grad_fn
        )
    else:
        held = states.read(run.before.balancer, slot)
        losses, stats, grad, new = _balanced(rule, group, view, held)
        balancer = states.write(balancer, slot, new)
    index = group.tasks[0] if rule.state == "per_task" else slot
    held = states.read(carry.shared, index)
    grad = _clip(rule, grad, view)
    shared = parts.shared(carry.params)
    value = group.total(losses, rule.mean)
    updates, new = _optimize(run, grad, held, shared, value)
    keep = _healthy(run, group.present, losses, grad, updates, new)
    new = states.narrow(new, held, run.draw(ROUNDING, number))
    healthy = jnp.broadcast_to(keep, group.present.shape)
    if run.mask is not None:
        keep &= group.present.any()
    moved = _where(keep, optax.apply_updates(shared, updates), shared)
    place = states.after(index, moved)
    return Outcome(
        losses,
        healthy,
        stats,
        grad,
        moved,
        states.write(carry.shared, place, _where(keep, new, held)),
        balancer,
    )


def _balanced(rule: Rule, group: Group, view: Any, state: Any):
    """Returns the losses and the balanced gradient of the members."""
    parts, balancer = group.parts, rule.balancer
    assert balancer is not None
    mask = None if group.full else group.present
    if rule.options.grad_fn is None:
        axes = rule.gradients.axes
        gradient = value_and_balanced_grad(
            group.losses,
            balancer,
            labels=parts.marks(),
            has_aux=True,
            axis_name=axes or None,
        )
        local = None if group.full else group.here
        (losses, stats), grad, state = gradient(view, state, mask=local)
        return losses, averaged(stats, axes), grad, state

    def visit(total, number, loss, grad):
        del number, loss
        return _add(total, parts.own(grad)), parts.shared(grad)

    zeros = jax.tree.map(jnp.zeros_like, parts.own(view))
    losses, stats, own, rows = each_member(
        group, view, visit, zeros, mean=False, grad_fn=rule.options.grad_fn
    )
    update, state = balancer.update(rows, state, losses=losses, mask=mask)
    return losses, stats, parts.merge(update, own), state


def _side_by_side(run: Run, group: Group, view: Any, carry: Carry, at: Any) -> Outcome:
    """Performs one step per member with its own state at one point, and adds them."""
    _, number = at
    rule, parts = run.rule, run.parts
    shared = parts.shared(carry.params)
    key = run.draw(ROUNDING, number)

    def visit(state, member, loss, grad):
        moved, slots, own = state
        grad = _clip(rule, grad, view)
        task, here = group.tasks[member], group.present[member]
        held = states.read(slots, task)
        updates, new = _optimize(run, grad, held, shared, jnp.where(here, loss, 0))
        healthy = _healthy(run, here, loss, grad, updates, new)
        keep = healthy if group.full else healthy & here
        folded = None if key is None else jax.random.fold_in(key, member)
        new = _where(keep, states.narrow(new, held, folded), held)
        zeros = jax.tree.map(jnp.zeros_like, moved)
        moved = _add(moved, _where(keep, updates, zeros))
        slots = states.write(slots, states.after(task, moved), new)
        zeros = jax.tree.map(jnp.zeros_like, own)
        own = _add(own, _where(healthy, parts.own(grad), zeros))
        return (moved, slots, own), healthy

    zeros = jax.tree.map(jnp.zeros_like, (shared, parts.own(view)))
    losses, stats, (moved, slots, own), healthy = each_member(
        group,
        view,
        visit,
        (zeros[0], carry.shared, zeros[1]),
        mean=rule.mean,
        grad_fn=rule.options.grad_fn,
    )
    params = _where(None, optax.apply_updates(shared, moved), shared)
    return Outcome(losses, healthy, stats, own, params, slots, carry.balancer)


def _step_rows(run: Run, group: Group, out: Outcome, carry: Carry):
    """Updates the rows of the members in stacked own parameters."""
    rule, parts = run.rule, run.parts
    old = parts.rows(parts.view(run.before.params, group.tasks))

    def one(grad, opt_state, params, value):
        found = states.step(
            rule.own_optimizer, grad, opt_state, params, batch=run.number, value=value
        )
        return *found, _healthy(run, True, 0.0, found)

    updates, new, healthy = jax.vmap(one)(
        parts.rows(out.own_grad),
        clone_keys(jax.tree.map(lambda x: take_rows(x, group.tasks), run.before.rows)),
        old,
        out.losses,
    )
    # Writes to row T, which does not exist, are ignored. Absent members use it.
    keep = group.present & out.healthy & healthy
    write = jnp.where(keep, group.tasks, rule.num_tasks)

    def put(x, n):
        return put_rows(x, write, n)

    params = jax.tree.map(
        put, parts.rows(carry.params), optax.apply_updates(old, updates)
    )
    return params, jax.tree.map(put, carry.rows, new)


def _step_owned(run: Run, group: Group, out: Outcome, carry: Carry):
    """Updates own parameters of any shape for members; the others stay unchanged.

    A zero gradient is not sufficient, because momentum would still change them.
    """
    rule, parts = run.rule, run.parts
    trees, new_states = [], []
    for task, opt_state in zip(parts.owners, carry.owned, strict=True):
        here = (group.tasks == task) & group.present & out.healthy
        old = parts.owned(carry.params, task)
        updates, new = states.step(
            rule.own_optimizer,
            parts.owned(out.own_grad, task),
            opt_state,
            old,
            batch=run.number,
            value=jnp.where(here, out.losses, 0).sum(),
        )
        keep = here.any() & _healthy(run, True, 0.0, updates, new)
        new = states.narrow(new, opt_state, None)
        trees.append(_where(keep, optax.apply_updates(old, updates), old))
        new_states.append(_where(keep, new, opt_state))
    return trees, tuple(new_states)


def _next_stats(run: Run, new: Any, old: Any, moved: Bool[Array, " members"]) -> Any:
    """Returns the running averages after an inner step."""
    rule = run.rule
    options = rule.options
    if old is None or options.batch_norm == "batch":
        return old
    if options.batch_norm == "scaled":
        decay, steps = options.batch_norm_decay, rule.rounds.steps
        share = (1 - decay ** (1 / steps)) / (1 - decay)

        def leaf(n, o):
            return o + share * (n - o) if jnp.issubdtype(o.dtype, jnp.floating) else n

        new = jax.tree.map(leaf, new, old)
    return _where(moved.any(), new, old)


def inner_step(run: Run, carry: Carry, at: Any) -> Carry:
    """Performs one step of one group; ``at`` is (members, group, step number)."""
    members, slot, number = at
    rule, parts = run.rule, run.parts
    present = members < rule.num_tasks
    # Padding entries repeat the first member. Their results are discarded.
    tasks = jnp.where(present, members, members[0])
    here = present
    if run.mask is not None and run.local_mask is not None:
        present = present & run.mask[tasks]
        here = run.local_mask[tasks]
    options = {"key": run.dropout(number)} if run.with_key else {}
    if carry.batch_stats is not None:
        scaled = rule.options.batch_norm == "scaled"
        stats = carry.batch_stats if scaled else run.before.batch_stats
        options["batch_stats"] = stats
    group = Group(
        parts=parts,
        task_loss=lambda p, task: run.task_loss(p, task, run.batch, **options),
        tasks=tasks,
        present=present,
        has_stats=carry.batch_stats is not None,
        full=run.mask is None and rule.num_tasks % rule.rounds.groups == 0,
        here=here if run.mask is not None else jnp.ones_like(present),
        options=rule.gradients,
    )
    view = parts.merge(
        parts.rows(parts.view(run.before.params, tasks)),
        parts.shared(carry.params),
        *(parts.owned(carry.params, task) for task in parts.owners),
    )
    move = _side_by_side if rule.by_member else _together
    out = move(run, group, view, carry, (slot, number))
    trees, rows = [], carry.rows
    if parts.has_rows:
        tree, rows = _step_rows(run, group, out, carry)
        trees.append(tree)
    owned_trees, owned = _step_owned(run, group, out, carry)
    varying = placement.varying(out.losses) - placement.varying(carry.losses)
    if varying:
        raise ValueError(
            "alternate: the losses differ between the devices of "
            f"{tuple(sorted(varying))}, but the state does not; pass axis_name."
        )
    seen = out.losses.astype(carry.losses.dtype)
    moved = present & out.healthy
    write = jnp.where(moved, tasks, rule.num_tasks)
    return Carry(
        params=parts.merge(out.params, *trees, *owned_trees),
        shared=out.shared,
        rows=rows,
        owned=owned,
        balancer=out.balancer,
        losses=carry.losses.at[write].set(seen, mode="drop"),
        seen=carry.seen.at[jnp.where(present, tasks, rule.num_tasks)].set(
            seen, mode="drop"
        ),
        counts=carry.counts.at[write].add(1, mode="drop"),
        active=carry.active.at[write].set(True, mode="drop"),
        batch_stats=_next_stats(run, out.stats, carry.batch_stats, moved),
    )


def decay_once(run: Run, params: Any, opt_state: Any, active: Mask) -> tuple[Any, Any]:
    """Applies decoupled weight decay, which is performed once per batch."""
    decay = run.rule.options.decay
    if decay is None:
        return params, opt_state
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, new = decay.update(zeros, opt_state, params)
    decayed = _where(None, optax.apply_updates(params, updates), params)
    return run.parts.where(active, decayed, params), new
