"""Who steps when: random balanced groups, their order, and the rounds they form.

A *round* visits every group once: within one batch (``"same_batch"``) or over as many
batches as there are groups (``"per_batch"``). All draws are pure functions of a key and
the number of the batch, so a resumed run goes on with the same ones.
"""

import dataclasses
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

Schedule: TypeAlias = Literal["same_batch", "per_batch"]
Order: TypeAlias = Literal["random", "fixed", "largest_loss_first"]
Regroup: TypeAlias = Literal["batch", "never"] | int

# What is drawn from the key; dropout and rounding are drawn elsewhere.
PARTITION, ORDER, DROPOUT, ROUNDING = range(4)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which tasks step together, for :func:`alternate`.

    Attributes:
      number: G, from 1 (one step on all tasks) to T (the default).
      regroup_every: When a new random partition is drawn, sizes differing by at most
        one: ``"batch"`` (every round, with ``"per_batch"``), after so many batches (an
        integer, such as those of an epoch) or ``"never"``. Never compiles again.
      loss: Of the members' losses: ``"sum"`` keeps a task's weight whatever the size of
        its group; or ``"mean"``.
    """

    number: int | None = None
    regroup_every: Regroup = "batch"
    loss: Literal["sum", "mean"] = "sum"

    @property
    def batches(self) -> int | None:
        """Batches between two partitions."""
        every = self.regroup_every
        return {"batch": 1, "never": None}[every] if isinstance(every, str) else every


class Plan(NamedTuple):
    """The inner steps of one batch, in their order.

    ``members`` holds task numbers, and T where a group is one smaller than the largest.
    """

    members: Int[Array, "steps members"]
    groups: Int[Array, " steps"]  # the number of the group, which names its slot


class Rounds(NamedTuple):
    """Everything static about the order of steps."""

    num_tasks: int
    groups: int
    schedule: Schedule
    order: Order
    regroup_batches: int | None  # batches between partitions; None for one for ever

    @property
    def size(self) -> int:
        """Tasks in the largest group."""
        return -(-self.num_tasks // self.groups)

    @property
    def steps(self) -> int:
        """Inner steps of a batch."""
        return self.groups if self.schedule == "same_batch" else 1

    @property
    def draws(self) -> bool:
        """Whether anything is random."""
        random_order = self.order == "random" and self.groups > 1
        return random_order or 1 < self.groups < self.num_tasks


def draw_key(key: PRNGKeyArray, stream: int, number: Int[Array, ""]) -> PRNGKeyArray:
    """The key of the ``number``-th draw of a stream."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), number)


def balanced_groups(
    key: PRNGKeyArray | None, num_tasks: int, groups: int
) -> Int[Array, "groups members"]:
    """A uniformly random partition of the tasks whose sizes differ by at most one.

    Shapes depend on ``num_tasks`` and ``groups`` alone, so that a new partition does
    not compile anything anew.

    Args:
      key: Of the draw; not read if ``groups`` is 1 or ``num_tasks``, where all
        partitions are the same (they are then in the order of the tasks).
      num_tasks: T.
      groups: G, from 1 to T.

    Returns:
      Row k lists the members of group k; the last entry of the smaller groups is T, the
      number of no task.

    Raises:
      ValueError: If ``groups`` is not between 1 and T.

    Examples:
      >>> import jax
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
    full = num_tasks - groups * (size - 1)  # groups of that size, the first ones
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
    """The order in which groups step.

    ``losses`` are the last ones seen, infinite for tasks not seen yet; a group counts
    with the mean of its members (inferred: no source says).
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
    """The plan of a batch, and the order of the round it belongs to.

    Args:
      rounds: What is static.
      key: Of the run; None if nothing is drawn.
      batch: Number of the batch, from 0.
      losses: See :func:`group_order`.
      order: That of the last batch; a round that has begun keeps it.
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
