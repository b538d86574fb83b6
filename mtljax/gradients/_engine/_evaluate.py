"""A planned program, run and differentiated stage by stage."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtljax import stack
from mtljax.gradients._engine import _contract as contract
from mtljax.gradients._engine._plan import Factored, Plan
from mtljax.gradients._engine._program import Env, Ref, apply, has_cotangent, run
from mtljax.gradients._engine._stages import joins_scalars
from mtljax.gradients._engine._sweep import sweep
from mtljax.types import Gramian, Losses, Mask, Weights

Leaf = int
# Runs a function of one task's cotangents on those of all, stacked along ``in_axes``.
MapTasks = Callable[..., Any]


class Backward(NamedTuple):
    """Forward pass and one backward pass of the heads, ready for the trunk."""

    losses: Losses
    aux: list[Any]
    env: Env  # values that outlive the forward pass
    cotangents: dict[Ref, Array]  # at the end of the trunk, of all tasks
    pull_trunk: Callable[[dict[Ref, Array]], tuple[dict[Leaf, Array], Any]]
    # Of seeds of the losses: cotangents of what each head took over, of the entries,
    # and of the leaves that each head reads.
    pull_heads: Callable[[Losses], tuple[Any, dict[Ref, Array], Any]]
    head_rows: list[dict[Leaf, Array]]  # each task's gradient as far as its head goes
    mask: Mask | None = None


def forward(plan: Plan, leaves: Sequence[Any]) -> Backward:
    """Runs the program once, and backwards through all heads at once."""
    program, stages = plan.program, plan.stages
    fixed = dict(program.constants)
    for op in stages.fixed:
        run(op, fixed)

    ends = [
        ref
        for ref in sorted({*stages.handed, *stages.entries})
        if has_cotangent(program.avals[ref].dtype)
    ]
    in_trunk = {leaf: leaves[leaf] for leaf in sorted(plan.in_trunk)}
    made = {use.op.outs[0] for f in plan.factored.values() for use in f.uses}
    nudges = {ref: jnp.zeros(*program.avals[ref]) for ref in sorted(made)}
    trunk = _trunk(plan, fixed, ends)
    handed, pull_trunk, seen = jax.vjp(trunk, in_trunk, nudges, has_aux=True)
    pull_trunk = sweep(pull_trunk, handed, runs=plan.num_tasks)
    env = {**fixed, **seen}

    copies = [{r: handed[r] for r in ends if r in reads} for reads in stages.reads]
    entries = {ref: handed[ref] for ref in ends if ref in stages.entries}
    values = [
        {leaf: leaves[leaf] for leaf, tasks in plan.in_heads.items() if task in tasks}
        for task in range(plan.num_tasks)
    ]
    heads = _heads(plan, env)
    losses, pull_heads, seen = jax.vjp(heads, copies, entries, values, has_aux=True)
    pull_heads = sweep(pull_heads, losses)
    of_copies, of_entries, head_rows = pull_heads(jnp.ones_like(losses))
    cotangents = {
        ref: _stack(ref, handed[ref], of_copies, of_entries.get(ref)) for ref in ends
    }

    env = {**env, **seen}
    if stages.extra or program.aux:
        env.update(_views(plan, dict(enumerate(leaves))))
    for op in stages.extra:
        run(op, env)
    return Backward(
        losses,
        [env[ref] for ref in program.aux],
        env,
        cotangents,
        pull_trunk,
        lambda seeds: pull_heads(seeds.astype(losses.dtype)),
        head_rows,
    )


def _trunk(plan: Plan, fixed: Env, ends: list[Ref]) -> Callable[..., Any]:
    """The trunk as a function of its parameters and of zeros added to results."""
    kept = _kept(plan).union(ends)

    def trunk(values, nudges):
        env = {**fixed, **_views(plan, values)}
        for op in plan.stages.trunk:
            run(op, env)
            for ref in op.outs:
                if ref in nudges:
                    env[ref] = env[ref] + nudges[ref]
        return {ref: env[ref] for ref in ends}, {r: env[r] for r in kept if r in env}

    return trunk


def _heads(plan: Plan, env: Env) -> Callable[..., Any]:
    """The heads as a function of what each task reads, every task its own copy."""
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
                # Entry t as task t sees it.
                parts = [seen[ref] for seen, ref in zip(each, op.ins, strict=True)]
                (last[op.outs[0]],) = apply(op, parts)
            else:
                run(op, last)
        losses = (each[0] if plan.num_tasks == 1 else last)[plan.program.losses]
        return losses, {r: seen[r] for seen in [*each, last] for r in kept if r in seen}

    return heads


def select(backward: Backward, mask: Mask) -> Backward:
    """Zeroes the gradients of absent tasks, also where they are not finite."""
    rows = _present(backward.head_rows, mask)
    cotangents = {
        ref: jnp.where(jnp.expand_dims(mask, _around(c)), c, 0)
        for ref, c in backward.cotangents.items()
    }
    return backward._replace(cotangents=cotangents, head_rows=rows, mask=mask)


def _present(trees: list[Any], mask: Mask | None) -> list[Any]:
    """One tree per task, those of absent tasks zeroed."""
    if mask is None:
        return trees
    return [
        jax.tree.map(lambda x, here=here: jnp.where(here, x, 0), tree)
        for tree, here in zip(trees, mask, strict=True)
    ]


def _kept(plan: Plan) -> set[Ref]:
    """Values that are read outside of the stage that computes them."""
    kept = {use.source for f in plan.factored.values() for use in f.uses}
    kept.update(plan.stages.handed, plan.stages.entries, plan.program.aux)
    for op in plan.stages.extra:
        kept.update(op.ins)
    return kept


def _views(plan: Plan, values: dict[Leaf, Any]) -> Env:
    """The given parameters and all their reordered forms."""
    env = {plan.program.leaves[leaf]: value for leaf, value in values.items()}
    for op in plan.stages.views:
        if op.ins[0] in env:
            run(op, env)
    return env


def _stack(
    ref: Ref, value: Array, of_copies: list[dict[Ref, Array]], of_entry: Array | None
) -> Array:
    """Cotangents of one value by task; a task that does not read it has 0."""
    zeros = jnp.zeros_like(value)
    rows = [copy.get(ref, zeros) for copy in of_copies]
    if of_entry is not None:
        rows = [r + e for r, e in zip(rows, jnp.diag(of_entry), strict=True)]
    return jnp.stack(rows, _task_axis(value.ndim + 1))


def _task_axis(ndim: int) -> int:
    """Where the tasks lie among the axes of stacked cotangents.

    Beside the last one, so that ``δ [*positions, T, O]`` of a dense layer is a matrix
    whose rows are positions.
    """
    return max(ndim - 2, 0)


def _around(stacked: Array) -> list[int]:
    """All axes but that of the tasks."""
    return [a for a in range(stacked.ndim) if a != _task_axis(stacked.ndim)]


class Rows(NamedTuple):
    """The T gradients of the shared leaves, formed only as far as the plan says."""

    sides: dict[Leaf, contract.Side]  # of factored leaves
    whole: dict[Leaf, Array]  # [T, *leaf], of other leaves that the trunk reads
    partial: dict[Leaf, dict[int, Array]]  # by task, of those that only heads read
    deltas: dict[Ref, Array]  # [b, P, T, O], cotangents of products of factored leaves


def gather(plan: Plan, backward: Backward, map_tasks: MapTasks) -> Rows:
    """T backward passes through the trunk."""
    wanted = [leaf for leaf in plan.direct if leaf in plan.in_trunk]
    uses = {use.op.outs[0]: use for f in plan.factored.values() for use in f.uses}

    def pull(rows):
        leaves, nudges = backward.pull_trunk(rows[0])
        deltas = {ref: use.cotangent(nudges[ref]) for ref, use in uses.items()}
        return {leaf: leaves[leaf] for leaf in wanted}, deltas

    whole, deltas = {}, {}
    if wanted or uses:
        # The second entry is not read; it says how many tasks if there is no other.
        rows = backward.cotangents, jnp.zeros(plan.num_tasks)
        in_axes = {ref: _task_axis(c.ndim) for ref, c in rows[0].items()}, 0
        out_axes = dict.fromkeys(wanted, 0), dict.fromkeys(uses, 2)
        whole, deltas = map_tasks(pull, rows, in_axes, out_axes)
    partial = {}
    for leaf in plan.direct:
        tasks = plan.in_heads.get(leaf, [])
        rows = {task: backward.head_rows[task][leaf] for task in tasks}
        if leaf not in whole:
            partial[leaf] = rows
        for task, row in rows.items() if leaf in whole else ():
            whole[leaf] = whole[leaf].at[task].add(row)
    sides = {
        leaf: _side(factored, backward.env, deltas)
        for leaf, factored in plan.factored.items()
    }
    return Rows(sides, whole, partial, deltas)


def _side(factored: Factored, env: Env, deltas: dict[Ref, Array]) -> contract.Side:
    """``Σ_u X_uᵀ δ_u`` is one product if the positions of all uses u are joined."""
    uses = factored.uses
    sources = [jnp.asarray(env[use.source]) for use in uses]
    each = [use.inputs(x) for use, x in zip(uses, sources, strict=True)]
    deltas_of = [deltas[use.op.outs[0]] for use in uses]
    blocks = [_joined(parts) for parts in zip(*each, strict=True)]
    if factored.bias is not None:
        blocks.append(jnp.ones_like(blocks[0][..., :1]))
    return contract.Side(blocks, _joined(deltas_of))


def _joined(parts: Sequence[Array]) -> Array:
    """One array of all positions."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def products(plan: Plan, left: Rows, right: Rows) -> Gramian:
    """``<g_s, g'_t>`` over all shared leaves."""
    leaves = [plan.program.leaves[leaf] for leaf in plan.shared]
    dtypes = [plan.program.avals[ref].dtype for ref in leaves]
    dtype = functools.reduce(jnp.promote_types, dtypes, jnp.float32)
    total = jnp.zeros((plan.num_tasks, plan.num_tasks), dtype)
    for leaf, factored in plan.factored.items():
        total = total + factored.contract(left.sides[leaf], right.sides[leaf])
    if left.whole:
        total = total + stack.cross_gramian(left.whole, right.whole)
    # Leaves that the heads of the same tasks read make one block of the matrix.
    groups: dict[tuple[int, ...], list[Leaf]] = {}
    for leaf, rows in left.partial.items():
        groups.setdefault(tuple(rows), []).append(leaf)
    for tasks, members in groups.items():
        if tasks:
            sides = (
                [_stacked(s.partial[leaf]) for leaf in members] for s in (left, right)
            )
            at = jnp.array(tasks)
            total = total.at[at[:, None], at[None]].add(stack.cross_gramian(*sides))
    return total


def _stacked(rows: dict[int, Array]) -> Array:
    return jnp.stack(list(rows.values()))


def _combine(stacked: Array, weights: Weights) -> Array:
    """``Σ_t weights[t] c_t`` of values that, unlike parameters, may be complex."""
    wide = contract.wide(stacked)
    weights = weights.astype(wide.dtype)
    if wide.ndim == 1:
        return jnp.dot(weights, wide, precision="highest").astype(stacked.dtype)
    # A row vector for every position: tensordot would first bring the tasks forward.
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
    heads_again: bool,
) -> dict[Leaf, Array]:
    """``Σ_t weights[t] g_t`` of some leaves: one backward pass through the trunk.

    It starts from a second pass through the heads, or from the mixture of what they
    handed over in the first.
    """
    shares = any(len(plan.in_heads.get(leaf, [])) > 1 for leaf in leaves)
    through_trunk = bool(plan.in_trunk.intersection(leaves))
    again: Any = ()
    if shares or (heads_again and through_trunk):
        copies, of_entries, rows = backward.pull_heads(weights)
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
        mixed, _ = backward.pull_trunk(ends)
        found = {leaf: mixed[leaf] for leaf in leaves if leaf in plan.in_trunk}
    for leaf in leaves:
        tasks = plan.in_heads.get(leaf, [])
        if len(tasks) > 1:  # adds up what else would be a row per head
            parts = [again[2][task][leaf] for task in tasks]
        else:
            parts = [
                (weights[task] * row).astype(row.dtype)
                for task in tasks
                for row in [backward.head_rows[task][leaf]]
            ]
        for part in parts:
            found[leaf] = found[leaf] + part if leaf in found else part
    return found


def _sum(
    ref: Ref, stacked: Array, of_copies: list[dict[Ref, Array]], of_entry: Array | None
) -> Array:
    """Cotangents of one value, weighted by the seeds, summed over the tasks."""
    parts = [copy[ref] for copy in of_copies if ref in copy]
    parts += [] if of_entry is None else [of_entry]
    shape = [n for a, n in enumerate(stacked.shape) if a != _task_axis(stacked.ndim)]
    return functools.reduce(jnp.add, parts, jnp.zeros(shape, stacked.dtype))


def combine(
    plan: Plan, backward: Backward, rows: Rows, weights: Weights, leaves: Sequence[Leaf]
) -> dict[Leaf, Array]:
    """What :func:`gradient` returns, from what T passes left: without one more."""
    mixed = {ref: _combine(delta, weights) for ref, delta in rows.deltas.items()}
    found: dict[Leaf, Array] = {}
    for leaf in leaves:
        if leaf in plan.factored or leaf in plan.biases:
            found[leaf] = _pull_products(plan, backward.env, leaf, mixed)
        elif leaf in rows.whole:
            found[leaf] = stack.combine(rows.whole[leaf], weights)
        elif rows.partial[leaf]:
            tasks = jnp.array(list(rows.partial[leaf]))
            found[leaf] = stack.combine(_stacked(rows.partial[leaf]), weights[tasks])
    return found


def _pull_products(plan: Plan, env: Env, leaf: Leaf, mixed: dict[Ref, Array]) -> Array:
    """``Σ_u X_uᵀ δ_u`` in the layout of the leaf, of cotangents ``[b, P, O]``.

    Of a bias, for which X is a column of ones, their sums over the positions.
    """
    avals = plan.program.avals
    uses, _, bias = plan.factored[plan.biases.get(leaf, leaf)]

    def products(value):
        seen = {**env, **_views(plan, {leaf: value})}
        if bias is None or bias.leaf != leaf:
            made = [apply(use.op, [seen[ref] for ref in use.op.ins])[0] for use in uses]
        else:
            for op in bias.spreads:
                run(op, seen)
            shapes = [avals[use.op.outs[0]].shape for use in uses]
            rows = zip(bias.terms, bias.orders, shapes, strict=True)
            made = [_row(seen[ref], order, shape) for ref, order, shape in rows]
        return [use.cotangent(y) for use, y in zip(uses, made, strict=True)]

    aval = avals[plan.program.leaves[leaf]]
    pull = jax.linear_transpose(products, jax.ShapeDtypeStruct(*aval))
    ends = [mixed[use.op.outs[0]] for use in uses]
    (gradient,) = sweep(pull, ends)(ends)
    return gradient


def _row(term: Array, order: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """What is added to a product, with the axes of the product."""
    if term.ndim:
        term = term.transpose(order)
    return jnp.broadcast_to(term, shape)
