"""Schedules of task groups: random groups, their order and their rounds.

A *round* visits every group once. It takes one batch (``"same_batch"``) or as many
batches as there are groups (``"per_batch"``). All random numbers are pure functions of
a key and the number of the batch, so a resumed run samples the same numbers.
"""

import dataclasses
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

Schedule: TypeAlias = Literal["same_batch", "per_batch"]
Order: TypeAlias = Literal["random", "fixed", "largest_loss_first"]
Regroup: TypeAlias = Literal["batch", "never"] | int

# Streams that are sampled from the key of the run.
PARTITION, ORDER, DROPOUT, ROUNDING = range(4)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Groups of tasks that step together, for :func:`alternate`.

    Attributes:
      number: G, from 1 (one step on all tasks) to T (the default).
      regroup_every: When to sample a new random partition, whose group sizes differ by
        at most one. ``"batch"`` samples at every batch, or at every round with
        ``"per_batch"``. An integer is a number of batches, for example those of an
        epoch. ``"never"`` keeps the first partition. A new partition does not trigger
        recompilation.
      loss: Loss of a group. ``"sum"`` gives a task the same weight in groups of any
        size. ``"mean"`` averages over the members.
    """

    number: int | None = None
    regroup_every: Regroup = "batch"
    loss: Literal["sum", "mean"] = "sum"

    @property
    def batches(self) -> int | None:
        """Number of batches between two partitions."""
        every = self.regroup_every
        return {"batch": 1, "never": None}[every] if isinstance(every, str) else every


class Plan(NamedTuple):
    """The inner steps of one batch, in their order.

    ``members`` contains task numbers. Groups that are smaller than the largest group
    are padded with T.
    """

    members: Int[Array, "steps members"]
    groups: Int[Array, " steps"]  # the number of the group, which is also its slot


class Rounds(NamedTuple):
    """The static part of the order of steps."""

    num_tasks: int
    groups: int
    schedule: Schedule
    order: Order
    regroup_batches: int | None  # batches between partitions; None for one partition

    @property
    def size(self) -> int:
        """Number of tasks in the largest group."""
        return -(-self.num_tasks // self.groups)

    @property
    def steps(self) -> int:
        """Number of inner steps per batch."""
        return self.groups if self.schedule == "same_batch" else 1

    @property
    def draws(self) -> bool:
        """Whether the partition or the order is random."""
        random_order = self.order == "random" and self.groups > 1
        return random_order or 1 < self.groups < self.num_tasks


def draw_key(key: PRNGKeyArray, stream: int, number: Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key of the ``number``-th sample of a stream."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), number)


def balanced_groups(
    key: PRNGKeyArray | None, num_tasks: int, groups: int
) -> Int[Array, "groups members"]:
    """Samples a uniformly random partition of the tasks with balanced sizes.

    The sizes differ by at most one. Shapes depend only on ``num_tasks`` and ``groups``,
    so a new partition does not trigger recompilation.

    Args:
      key: Random key. It is not read if ``groups`` is 1 or ``num_tasks``, because all
        partitions are then equal. The tasks are then in ascending order.
      num_tasks: T.
      groups: G, from 1 to T.

    Returns:
      An integer array of shape ``[G, ceil(T / G)]``. Row k contains the members of
      group k. The last entry of smaller groups is T, which is not a task number.

    Raises:
      ValueError: If ``groups`` is not between 1 and T.

    Examples:
      >>> import jax
      >>> from mtljax.alternating import balanced_groups
      >>> rows = balanced_groups(jax.random.key(0), 5, 2)
      >>> rows.shape, sorted(rows.ravel().tolist())
      ((2, 3), [0, 1, 2, 3, 4, 5])
    """
    if not 1 <= groups <= num_tasks:
        raise ValueError(
            f"balanced_groups: groups={groups} must lie between 1 and "
            f"num_tasks={num_tasks}."
        )
    tasks = jnp.arange(num_tasks)
    if 1 < groups < num_tasks:
        assert key is not None
        tasks = jax.random.permutation(key, tasks)
    size = -(-num_tasks // groups)
    full = num_tasks - groups * (size - 1)  # the first groups have that size
    row, column = jnp.arange(groups)[:, None], jnp.arange(size)[None]
    position = row * (size - 1) + jnp.minimum(row, full) + column
    filled = (row < full) | (column < size - 1)
    tasks = jnp.append(tasks, num_tasks)
    return tasks[jnp.where(filled, position, num_tasks)]


def group_order(
    order: Order,
    key: PRNGKeyArray | None,
    members: Int[Array, "groups members"],
    losses: Float[Array, " tasks"],
) -> Int[Array, " groups"]:
    """Returns the order in which groups step.

    ``losses`` are the last observed losses, infinite for tasks without one. The value
    of a group is the mean of its members. This is our choice, because no source
    specifies it.
    """
    groups = members.shape[0]
    if order == "random" and groups > 1:
        assert key is not None
        return jax.random.permutation(key, groups)
    if order == "largest_loss_first":
        member = members < losses.shape[0]
        each = jnp.where(member, losses[jnp.minimum(members, losses.shape[0] - 1)], 0)
        return jnp.argsort(-each.sum(1) / member.sum(1), stable=True)
    return jnp.arange(groups)


def make_plan(
    rounds: Rounds,
    key: PRNGKeyArray | None,
    batch: Scalar,
    losses: Float[Array, " tasks"],
    order: Int[Array, " groups"],
) -> tuple[Plan, Int[Array, " groups"]]:
    """Returns the plan of a batch, and the order of the round that contains the batch.

    Args:
      rounds: The static part.
      key: Random key of the run; None if nothing is random.
      batch: Number of the batch, from 0.
      losses: See :func:`group_order`.
      order: Order of the last batch, which is kept until the round is complete.
    """
    batches = 1 if rounds.schedule == "same_batch" else rounds.groups
    start = batch - batch % batches  # the first batch of the round
    if rounds.regroup_batches is None:
        partition = jnp.zeros_like(batch)
    else:
        partition = start // rounds.regroup_batches
    drawn = key if rounds.draws else None
    members = balanced_groups(
        None if drawn is None else draw_key(drawn, PARTITION, partition),
        rounds.num_tasks,
        rounds.groups,
    )
    fresh = group_order(
        rounds.order,
        None if drawn is None else draw_key(drawn, ORDER, start),
        members,
        losses,
    ).astype(order.dtype)
    if rounds.schedule == "same_batch":
        return Plan(members[fresh], fresh), fresh
    order = jnp.where(batch == start, fresh, order)
    now = order[batch - start][None]
    return Plan(members[now], now), order
