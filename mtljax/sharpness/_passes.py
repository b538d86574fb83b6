"""The first pass, and how the tasks are run through what follows it."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtljax.balancer import as_mask
from mtljax.gradients import Strategy, pullback, resolve_labels
from mtljax.gradients.linearized import checked_losses
from mtljax.gradients.passes import Body
from mtljax.gradients.passes import Passes as Runs
from mtljax.gradients.passes import pick
from mtljax.sharpness._perturbation import Leaves
from mtljax.types import Losses, Params

Part: TypeAlias = Literal["shared", "own"]


class Parts(NamedTuple):
    """Parameters as two lists of leaves, and the way back."""

    shared: Leaves
    own: Leaves
    merge: Callable[[Leaves, Leaves], Params]
    tree_of: Callable[[Part, Leaves], Any]  # the rest is MaskedNode


class Point(NamedTuple):
    """The losses at one point, and their gradients."""

    losses: Losses
    aux: Any
    pull: Callable[..., Any]

    @property
    def body(self) -> Body:
        """The size of one backward pass."""
        return self.pull.body  # pyright: ignore[reportFunctionMemberAccess]

    def gradients(self, cotangent: Array) -> tuple[Leaves, Leaves]:
        """Those of the shared and of the own leaves."""
        return self.pull(cotangent)[0]


class Passes(NamedTuple):
    """What both parts of a step are computed from."""

    pull: Point  # its aux is that of the first pass
    losses_at: Callable[[tuple[Leaves, Leaves]], Losses]
    again: Callable[[tuple[Leaves, Leaves]], Point]
    parts: Parts
    basis: Array  # [T, T], rows of absent tasks zero


def partition(params: Params, labels: Any) -> Parts:
    """Splits the parameters by their labels; without labels all are shared."""
    leaves, treedef = jax.tree.flatten(params)
    marks = ["shared"] * len(leaves)
    if labels is not None:
        marks = resolve_labels(labels, params)

    def pick(part):
        return [x for x, mark in zip(leaves, marks, strict=True) if mark == part]

    def fill(shared, own):
        sources = {"shared": iter(shared), "own": iter(own)}
        return jax.tree.unflatten(treedef, [next(sources[mark]) for mark in marks])

    def tree_of(part, found):
        rest = [optax.MaskedNode()] * (len(leaves) - len(found))
        return fill(found, rest) if part == "shared" else fill(rest, found)

    return Parts(pick("shared"), pick("own"), fill, tree_of)


def first_pass(
    function: Callable[[Params], Any],
    params: Params,
    *,
    has_aux: bool,
    labels: Any,
    mask: Any,
    name: str,
) -> Passes:
    """One forward pass at the parameters; all else is computed from what it returns."""
    parts = partition(params, labels)

    def of_parts(both):
        return function(parts.merge(*both))

    def again(both):
        losses, pull, aux = pullback(
            lambda p: checked_losses(of_parts(p), has_aux), both, has_aux=True
        )
        return Point(losses, aux, pull)

    def losses_at(both):
        out = of_parts(both)
        return out[0] if has_aux else out

    pull = again((parts.shared, parts.own))
    num_tasks = pull.losses.shape[0]
    basis = jnp.eye(num_tasks, dtype=pull.losses.dtype)
    if mask is not None:
        basis = jnp.where(as_mask(name, num_tasks, mask)[:, None], basis, 0)
    return Passes(pull, losses_at, again, parts, basis)


def only(losses: Losses, basis: Array) -> Array:
    """The loss that a row of the basis picks; others may be NaN."""
    return jnp.where(basis != 0, losses, 0).sum()


def add(left: Leaves, right: Leaves) -> Leaves:
    return [a + b for a, b in zip(left, right, strict=True)]


def over_tasks(
    single: Callable[[Array, Array], tuple[Any, Leaves]],
    many: Callable[[Array, Array], tuple[Any, Leaves]],
    passes: Passes,
    strategy: Strategy,
    chunk_size: int,
) -> tuple[Any, Leaves]:
    """Runs every task: stacks the first result, adds up the second.

    Args:
      single: ``single(row of the basis, task) -> (rows, sums)``.
      many: The same for ``c`` tasks at once.
      passes: The first pass.
      strategy: As in :func:`mtljax.value_and_task_grads`.
      chunk_size: Tasks in a chunk.

    Returns:
      Stacks ``[T, ...]`` and sums.
    """
    basis, num_tasks = passes.basis, passes.basis.shape[0]
    asked = Runs(strategy, chunk_size)
    strategy, chunk_size, together = pick(asked, num_tasks, passes.pull.body)
    tasks = jnp.arange(num_tasks)
    if strategy == "vmap":
        return many(basis, tasks)
    if strategy == "unrolled":
        found = [single(basis[task], tasks[task]) for task in range(num_tasks)]
        rows = jax.tree.map(lambda *row: jnp.stack(row), *[rows for rows, _ in found])
        return rows, functools.reduce(add, [sums for _, sums in found])
    size = min(chunk_size, num_tasks) if strategy == "chunked" else 1
    blocks = -(-num_tasks // size)
    spare = blocks * size - num_tasks  # rows of zeros: tasks that are absent
    basis = jnp.pad(basis, ((0, spare), (0, 0))).reshape(blocks, size, num_tasks)
    tasks = jnp.pad(tasks, (0, spare)).reshape(blocks, size)

    def block(sums, at):
        if strategy == "map":
            rows, more = single(at[0][0], at[1][0])
            rows = jax.tree.map(lambda x: x[None], rows)
        else:
            rows, more = many(*at)
        return add(sums, more), rows

    _, sums = jax.eval_shape(single, basis[0, 0], tasks[0, 0])
    zeros = [jnp.zeros(x.shape, x.dtype) for x in sums]
    sums, rows = jax.lax.scan(block, zeros, (basis, tasks), unroll=together)
    rows = jax.tree.map(
        lambda x: x.reshape(blocks * size, *x.shape[2:])[:num_tasks], rows
    )
    return rows, sums
