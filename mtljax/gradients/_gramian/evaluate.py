"""Runs and differentiates a planned program stage by stage."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import placement, stack
from mtljax.gradients._gramian import contract
from mtljax.gradients._gramian.plan import Factored, Plan
from mtljax.gradients._gramian.stages import joins_scalars
from mtljax.gradients._gramian.uses import task_axis
from mtljax.gradients._program import Env, Ref, apply, has_cotangent, run
from mtljax.gradients._pullback import pullback
from mtljax.placement import Axes
from mtljax.types import Gramian, Losses, Mask, Weights

Leaf = int
# Applies a function of one task's cotangents to all tasks, stacked along ``in_axes``.
MapTasks = Callable[..., Any]


class Forward(NamedTuple):
    """A forward pass, from which backward passes through the heads can be run."""

    plan: Plan
    losses: Losses
    aux: list[Any]
    leaves: list[Any]
    env: Env  # values that are needed after the forward pass
    outputs: dict[Ref, Array]  # values at the end of the trunk
    pull_trunk: Callable[[dict[Ref, Array]], tuple[dict[Leaf, Array], Any]]
    # Maps cotangents of the losses to cotangents of the copies that each head reads, of
    # the entries, and of the leaves that each head reads.
    pull_heads: Callable[[Losses], tuple[Any, dict[Ref, Array], Any]]
    mode: placement.Backward


class Backward(NamedTuple):
    """The result of one pass through all heads, from which the trunk can be run."""

    forward: Forward
    cotangents: dict[Ref, Array]  # at the end of the trunk, of all tasks
    head_rows: list[dict[Leaf, Array]]  # gradients of the leaves of each task's head
    mask: Mask | None = None

    @property
    def aux(self) -> list[Any]:
        """Auxiliary outputs."""
        return self.forward.aux

    @property
    def leaves(self) -> list[Any]:
        """The parameters."""
        return self.forward.leaves


def forward(
    plan: Plan, leaves: Sequence[Any], mode: placement.Backward
) -> tuple[Losses, Forward]:
    """Runs the program once; ``mode`` is the argument ``backward`` of the user."""
    program, stages = plan.program, plan.stages
    fixed = dict(program.constants)
    for op in stages.fixed:
        run(op, fixed)

    ends = [
        ref
        for ref in sorted({*stages.outputs, *stages.entries})
        if has_cotangent(program.avals[ref].dtype)
    ]
    in_trunk = {leaf: leaves[leaf] for leaf in sorted(plan.in_trunk)}
    made = {use.op.outs[0] for f in plan.factored.values() for use in f.uses}
    # Probes are added to the products, and their cotangents are the δ. They must have
    # the types of the products. For a value that is equal on all devices, JAX would
    # return the sum of the cotangents over the devices.
    probes = {ref: placement.zeros(program.avals[ref]) for ref in sorted(made)}
    trunk = _trunk(plan, fixed, ends)
    outputs, pull_trunk, seen = pullback(
        trunk, in_trunk, probes, has_aux=True, backward=mode, runs=plan.num_tasks
    )
    env = {**fixed, **seen}

    copies = [{r: outputs[r] for r in ends if r in reads} for reads in stages.reads]
    entries = {ref: outputs[ref] for ref in ends if ref in stages.entries}
    values = [
        {leaf: leaves[leaf] for leaf, tasks in plan.in_heads.items() if task in tasks}
        for task in range(plan.num_tasks)
    ]
    heads = _heads(plan, env)
    losses, pull_heads, seen = pullback(
        heads, copies, entries, values, has_aux=True, backward=mode
    )
    env = {**env, **seen}
    if stages.extra or program.aux:
        env.update(_views(plan, dict(enumerate(leaves))))
    for op in stages.extra:
        run(op, env)
    aux = [env[ref] for ref in program.aux]
    made = Forward(
        plan, losses, aux, list(leaves), env, outputs, pull_trunk, pull_heads, mode
    )
    return losses, made


def through_heads(forward: Forward, seeds: Losses | None) -> Backward:
    """Runs one backward pass through all heads; None for ``seeds`` means ones."""
    losses, outputs = forward.losses, forward.outputs
    seeds = jnp.ones(losses.shape) if seeds is None else seeds
    found = forward.pull_heads(seeds.astype(losses.dtype))
    of_copies, of_entries, head_rows = found
    cotangents = {
        ref: _stack(ref, value, of_copies, of_entries.get(ref))
        for ref, value in outputs.items()
    }
    return Backward(forward, cotangents, head_rows)


def _trunk(plan: Plan, fixed: Env, ends: list[Ref]) -> Callable[..., Any]:
    """Returns the trunk as a function of its parameters and of the probes."""
    kept = _kept(plan).union(ends)

    def trunk(values, probes):
        env = {**fixed, **_views(plan, values)}
        for op in plan.stages.trunk:
            run(op, env)
            for ref in op.outs:
                if ref in probes:
                    env[ref] = env[ref] + probes[ref]
        return {ref: env[ref] for ref in ends}, {r: env[r] for r in kept if r in env}

    return trunk


def _heads(plan: Plan, env: Env) -> Callable[..., Any]:
    """Returns the heads as a function of separate copies of the values they read."""
    kept, stages = _kept(plan), plan.stages

    def heads(copies, entries, values):
        each = [
            {**env, **copy, **_views(plan, value)}
            for copy, value in zip(copies, values, strict=True)
        ]
        for ops, of_task in zip(stages.heads, each, strict=True):
            for op in ops:
                run(op, of_task)
        last = {**env, **entries}
        for op in stages.tail:
            if joins_scalars(op, plan.program, plan.num_tasks):
                # Entry t is taken from the values of task t.
                parts = [seen[ref] for seen, ref in zip(each, op.ins, strict=True)]
                (last[op.outs[0]],) = apply(op, parts)
            else:
                run(op, last)
        losses = (each[0] if plan.num_tasks == 1 else last)[plan.program.losses]
        return losses, {r: seen[r] for seen in [*each, last] for r in kept if r in seen}

    return heads


def select(backward: Backward, mask: Mask) -> Backward:
    """Sets the gradients of absent tasks to zero, even if they are not finite."""
    rows = _present(backward.head_rows, mask)
    cotangents = {
        ref: jnp.where(jnp.expand_dims(mask, _around(c)), c, 0)
        for ref, c in backward.cotangents.items()
    }
    return backward._replace(cotangents=cotangents, head_rows=rows, mask=mask)


def _present(trees: list[Any], mask: Mask | None) -> list[Any]:
    """Returns one tree per task, with zeros for absent tasks."""
    if mask is None:
        return trees
    return [
        jax.tree.map(lambda x, here=here: jnp.where(here, x, 0), tree)
        for tree, here in zip(trees, mask, strict=True)
    ]


def _kept(plan: Plan) -> set[Ref]:
    """Returns the values that are read outside of the stage that computes them."""
    kept = {use.source for f in plan.factored.values() for use in f.uses}
    kept.update(plan.stages.outputs, plan.stages.entries, plan.program.aux)
    for op in plan.stages.extra:
        kept.update(op.ins)
    return kept


def _views(plan: Plan, values: dict[Leaf, Any]) -> Env:
    """Returns the given parameters and all their reordered forms."""
    env = {plan.program.leaves[leaf]: value for leaf, value in values.items()}
    for op in plan.stages.views:
        if op.ins[0] in env:
            run(op, env)
    return env


def _stack(
    ref: Ref, value: Array, of_copies: list[dict[Ref, Array]], of_entry: Array | None
) -> Array:
    """Stacks the cotangents of one value; zero for a task that does not read it."""
    zeros = jnp.zeros_like(value)
    rows = [copy.get(ref, zeros) for copy in of_copies]
    if of_entry is not None:
        rows = [r + e for r, e in zip(rows, jnp.diag(of_entry), strict=True)]
    return jnp.stack(rows, task_axis(value.ndim + 1))


def _around(stacked: Array) -> list[int]:
    """Returns all axes except that of the tasks."""
    return [a for a in range(stacked.ndim) if a != task_axis(stacked.ndim)]


class Rows(NamedTuple):
    """The T gradients of the shared leaves, formed only if the plan requires it."""

    sources: dict[Ref, Array]  # inputs of the products with factored leaves
    deltas: dict[Ref, Array]  # cotangents of these products, of all tasks
    whole: dict[Leaf, Array]  # [T, *leaf], for other leaves that the trunk reads
    partial: dict[Leaf, dict[int, Array]]  # by task, for leaves that only heads read


def gather(
    plan: Plan, backward: Backward, map_tasks: MapTasks, sums: dict[Leaf, Axes]
) -> Rows:
    """Runs T backward passes through the trunk.

    Args:
      plan: The plan.
      backward: The result of the pass through the heads.
      map_tasks: Applies a function of one task's cotangents to those of all tasks.
      sums: Mapped axes over which the gradient of a leaf is summed.
    """
    wanted = [leaf for leaf in plan.direct if leaf in plan.in_trunk]
    uses = [use for factored in plan.factored.values() for use in factored.uses]
    products = {use.op.outs[0] for use in uses}

    def pull(rows):
        leaves, probes = backward.forward.pull_trunk(rows[0])
        return (
            {leaf: leaves[leaf] for leaf in wanted},
            {ref: probes[ref] for ref in products},
        )

    whole, deltas = {}, {}
    if wanted or uses:
        # The second entry is not read. It fixes the number of tasks if the first is
        # empty.
        rows = backward.cotangents, jnp.zeros(plan.num_tasks)
        in_axes = {ref: task_axis(c.ndim) for ref, c in rows[0].items()}, 0
        avals = plan.program.avals
        out_axes = (
            dict.fromkeys(wanted, 0),
            {ref: task_axis(len(avals[ref].shape) + 1) for ref in products},
        )
        whole, deltas = map_tasks(pull, rows, in_axes, out_axes)
    partial = {}
    for leaf in plan.direct:
        tasks = plan.in_heads.get(leaf, [])
        rows = {task: backward.head_rows[task][leaf] for task in tasks}
        if leaf not in whole:
            partial[leaf] = rows
        for task, row in rows.items() if leaf in whole else ():
            whole[leaf] = whole[leaf].at[task].add(row)
    env = backward.forward.env
    sources = {use.source: jnp.asarray(env[use.source]) for use in uses}
    whole = {leaf: placement.total(x, sums[leaf]) for leaf, x in whole.items()}
    partial = {leaf: placement.total(x, sums[leaf]) for leaf, x in partial.items()}
    return Rows(sources, deltas, whole, partial)


def _side(factored: Factored, rows: tuple[list[Array], list[Array]]) -> contract.Side:
    """Joins the positions of all uses u, so that ``Σ_u X_uᵀ δ_u`` is one product."""
    uses, (sources, deltas) = factored.uses, rows
    each = [use.inputs(x) for use, x in zip(uses, sources, strict=True)]
    deltas = [use.cotangents(d) for use, d in zip(uses, deltas, strict=True)]
    blocks = [_joined(parts) for parts in zip(*each, strict=True)]
    if factored.bias is not None:
        blocks.append(jnp.ones_like(blocks[0][..., :1]))
    return contract.Side(blocks, _joined(deltas))


def _contracted(
    factored: Factored, leaf: Array, left: Rows, right: Rows, axes: Axes
) -> tuple[Gramian, Axes]:
    """Returns this device's part for one factored leaf, and the axes of its sum."""
    uses = factored.uses
    parts = [
        ([r.sources[u.source] for u in uses], [r.deltas[u.op.outs[0]] for u in uses])
        for r in ((left,) if left is right else (left, right))
    ]
    # The gradient of a leaf that is equal on all devices is summed over the devices.
    mapped = axes or tuple(sorted(placement.varying(parts) - placement.varying(leaf)))

    def run(*parts):
        sides = [_side(factored, part) for part in parts]
        return factored.contract(sides[0], sides[-1], mapped)

    return placement.free(run, *parts), mapped


def _joined(parts: Sequence[Array]) -> Array:
    """Concatenates arrays along the positions."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def products(
    plan: Plan,
    leaves: Sequence[Any],
    left: Rows,
    right: Rows,
    *,
    sums: dict[Leaf, Axes],
    axes: Axes,
) -> Gramian:
    """Computes ``<g_s, g'_t>`` over all shared leaves.

    Args:
      plan: The plan.
      leaves: The parameters.
      left: Gradients of one batch.
      right: Gradients of the other batch, or of the same.
      sums: Mapped axes over which the gradient of a leaf is summed. Over other axes of
        the region the leaf is split, and a device has a part of its gradient.
      axes: All mapped axes of the region.
    """
    splits = {i: tuple(a for a in axes if a not in over) for i, over in sums.items()}
    refs = [plan.program.leaves[leaf] for leaf in plan.shared]
    dtypes = [plan.program.avals[ref].dtype for ref in refs]
    dtype = stack.wide_dtype(*dtypes)
    # The parts of the Gramian are grouped by their mapped axes, with one sum per group.
    parts: dict[Axes, list[Gramian]] = {}
    for leaf, factored in plan.factored.items():
        part, mapped = _contracted(factored, leaves[leaf], left, right, sums[leaf])
        parts.setdefault(mapped, []).append(part)
    for leaf, whole in left.whole.items():
        part = stack.cross_gramian(whole, right.whole[leaf])
        parts.setdefault(splits[leaf], []).append(part)
    # Leaves that the heads of the same tasks read form one block of the matrix.
    groups: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf, rows in left.partial.items():
        groups.setdefault((*rows, splits[leaf]), []).append(leaf)
    zeros = jnp.zeros((plan.num_tasks, plan.num_tasks), dtype)
    for (*tasks, split), members in groups.items():
        if tasks:
            sides = (
                [_stacked(s.partial[leaf]) for leaf in members] for s in (left, right)
            )
            at = jnp.array(tasks)
            block = stack.cross_gramian(*sides)
            part = placement.cast(zeros, split).at[at[:, None], at[None]].add(block)
            parts.setdefault(split, []).append(part)
    total = [
        placement.total(functools.reduce(jnp.add, some), mapped)
        for mapped, some in parts.items()
    ]
    return functools.reduce(jnp.add, total, zeros)


def _stacked(rows: dict[int, Array]) -> Array:
    return jnp.stack(list(rows.values()))


def _combine(stacked: Array, weights: Weights) -> Array:
    """Computes ``Σ_t weights[t] c_t``; unlike parameters, the values may be complex."""
    wide = contract.wide(stacked)
    weights = weights.astype(wide.dtype)
    if wide.ndim == 1:
        return jnp.dot(weights, wide, precision="highest").astype(stacked.dtype)
    if placement.explicit_mesh(stacked) is not None:
        tasks = task_axis(wide.ndim)
        contracted = (((tasks,), (0,)), ((), ()))
        mixed = jax.lax.dot_general(wide, weights, contracted, precision="highest")
        return mixed.astype(stacked.dtype)
    # One row vector per position; tensordot would first move the tasks to the front.
    rows = wide.reshape(-1, *wide.shape[-2:])
    weights = jnp.broadcast_to(weights, (len(rows), 1, len(weights)))
    mixed = jnp.matmul(weights, rows, precision="highest")
    return mixed.reshape(*wide.shape[:-2], -1).astype(stacked.dtype)


def gradient(
    plan: Plan,
    backward: Backward,
    weights: Weights,
    leaves: Sequence[Leaf],
    *,
    seeds: Losses | None,
    heads_again: bool,
) -> dict[Leaf, Array]:
    """Computes ``Σ_t weights[t] g_t`` of some leaves by one pass through the trunk.

    The pass starts from a second pass through the heads, or from the weighted sum of
    the cotangents of the first pass.
    """
    shares = any(len(plan.in_heads.get(leaf, [])) > 1 for leaf in leaves)
    through_trunk = bool(plan.in_trunk.intersection(leaves))
    again: Any = ()
    if shares or (heads_again and through_trunk):
        again_seeds = (
            weights if seeds is None else weights * seeds.astype(weights.dtype)
        )
        copies, of_entries, rows = backward.forward.pull_heads(
            again_seeds.astype(backward.forward.losses.dtype)
        )
        here = backward.mask
        if here is not None:
            of_entries = {ref: jnp.where(here, e, 0) for ref, e in of_entries.items()}
        again = _present(copies, here), of_entries, _present(rows, here)
    found: dict[Leaf, Array] = {}
    if through_trunk:
        if not again:
            ends = {ref: _combine(c, weights) for ref, c in backward.cotangents.items()}
        else:
            ends = {
                ref: _sum(ref, c, again[0], again[1].get(ref))
                for ref, c in backward.cotangents.items()
            }
        mixed, _ = backward.forward.pull_trunk(ends)
        found = {leaf: mixed[leaf] for leaf in leaves if leaf in plan.in_trunk}
    for leaf in leaves:
        tasks = plan.in_heads.get(leaf, [])
        if len(tasks) > 1:  # sums in the pass instead of one row per head
            parts = [again[2][task][leaf] for task in tasks]
        else:
            parts = [
                _scaled(row, weights[task])
                for task in tasks
                for row in [backward.head_rows[task][leaf]]
            ]
        for part in parts:
            found[leaf] = found[leaf] + part if leaf in found else part
    return found


def _scaled(row: Array, weight: Array) -> Array:
    """Multiplies a gradient by a weight in a wide dtype, and returns its own dtype."""
    wide = stack.wide_dtype(row.dtype)
    return (weight.astype(wide) * row.astype(wide)).astype(row.dtype)


def _sum(
    ref: Ref, stacked: Array, of_copies: list[dict[Ref, Array]], of_entry: Array | None
) -> Array:
    """Sums the cotangents of one value, which are weighted by the seeds, over tasks."""
    parts = [copy[ref] for copy in of_copies if ref in copy]
    parts += [] if of_entry is None else [of_entry]
    shape = [n for a, n in enumerate(stacked.shape) if a != task_axis(stacked.ndim)]
    return functools.reduce(jnp.add, parts, jnp.zeros(shape, stacked.dtype))


def combine(
    plan: Plan,
    backward: Backward,
    rows: Rows,
    weights: Weights,
    leaves: Sequence[Leaf],
    *,
    sums: dict[Leaf, Axes],
) -> dict[Leaf, Array]:
    """Computes the result of :func:`gradient` from the T passes that were run."""
    mixed = {ref: _combine(delta, weights) for ref, delta in rows.deltas.items()}
    found: dict[Leaf, Array] = {}
    for leaf in leaves:
        if leaf in plan.factored or leaf in plan.biases:
            local = _pull_products(plan, backward, leaf, mixed)
            found[leaf] = placement.total(local, sums[leaf])
        elif leaf in rows.whole:
            found[leaf] = stack.combine(rows.whole[leaf], weights)
        elif rows.partial[leaf]:
            tasks = jnp.array(list(rows.partial[leaf]))
            found[leaf] = stack.combine(_stacked(rows.partial[leaf]), weights[tasks])
    return found


def _pull_products(
    plan: Plan, backward: Backward, leaf: Leaf, mixed: dict[Ref, Array]
) -> Array:
    """Computes ``Σ_u X_uᵀ δ_u`` in the layout of the leaf, from combined cotangents.

    For a bias, X is a column of ones, and the result is a sum over the positions.
    """
    avals = plan.program.avals
    uses, _, bias = plan.factored[plan.biases.get(leaf, leaf)]

    def products(value):
        seen = {**backward.forward.env, **_views(plan, {leaf: value})}
        if bias is None or bias.leaf != leaf:
            return [apply(use.op, [seen[ref] for ref in use.op.ins])[0] for use in uses]
        for op in bias.spreads:
            run(op, seen)
        shapes = [avals[use.op.outs[0]].shape for use in uses]
        rows = zip(bias.terms, bias.orders, shapes, strict=True)
        return [_row(seen[ref], order, shape) for ref, order, shape in rows]

    # Pulling back at the leaf itself gives the result its varying axes and sharding.
    # The products are linear in the leaf, so their values are dead code.
    _, pull, _ = pullback(
        products, backward.leaves[leaf], backward=backward.forward.mode
    )
    (gradient,) = pull([mixed[use.op.outs[0]] for use in uses])
    return gradient


def _row(term: Array, order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Returns the term that is added to a product, with the axes of the product."""
    if term.ndim:
        term = term.transpose(order)
    return jnp.broadcast_to(term, shape)
