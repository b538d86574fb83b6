"""Splits a program into a shared part and one part per task.

A value *reaches* a task if the loss of the task depends on it. Operations that reach
one task are its *head*, independently of the names in the user's code. Operations that
reach several tasks are the *trunk*. One backward pass can differentiate the heads of
all tasks, if each head reads its own copy of the outputs of the trunk. Only the trunk
needs T passes. If every task has a separate forward pass, there is no trunk, and one
pass is enough.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

from mtljax.gradients._primitives import (
    BROADCAST,
    CALLS,
    CONCATENATE,
    CONVERT,
    CUSTOM_JVP,
    ELEMENTWISE,
    REORDERS,
    STACK,
    bodies,
)
from mtljax.gradients._program import Op, Program, Ref, is_float


class View(NamedTuple):
    """A parameter whose entries have another order or precision."""

    leaf: int
    chain: tuple[Any, ...]  # the reordering operations; equal for equal layouts


class Stages(NamedTuple):
    """The operations of a program, in an order in which they can be run."""

    fixed: list[Op]  # independent of the parameters
    views: list[Op]
    trunk: list[Op]
    heads: list[list[Op]]  # one list per task
    tail: list[Op]  # elementwise operations from the entries to the vector of losses
    extra: list[Op]  # operations that no loss depends on
    view_of: dict[Ref, View]
    dependent: set[Ref]  # values that depend on a parameter
    reads: list[set[Ref]]  # values from outside that the head of each task reads
    outputs: set[Ref]  # values of the trunk that heads read
    entries: list[Ref]  # vectors of the trunk of which task t reads entry t

    @property
    def once(self) -> list[Op]:
        """The operations of all heads; an operation of several heads is listed once.

        XLA fuses its copies with other operations.
        """
        return list({op.outs: op for ops in self.heads for op in ops}.values())


def _is_reorder(op: Op, program: Program) -> bool:
    if op.primitive in REORDERS:
        return len(op.outs) == 1
    before, after = program.avals[op.ins[0]], program.avals[op.outs[0]]
    if op.primitive in CONVERT:
        return is_float(before.dtype) and is_float(after.dtype)
    if op.primitive in BROADCAST:
        return math.prod(before.shape) == math.prod(after.shape)
    return False


def _frozen(params: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """Parameters in a comparable form, so that views of different layouts differ."""

    def fixed(value):
        if isinstance(value, list | tuple):
            return tuple(map(fixed, value))
        # A value that cannot be compared is equal to itself only.
        return value if isinstance(value, Hashable) else id(value)

    return frozenset((key, fixed(value)) for key, value in params.items())


def find_views(program: Program) -> tuple[dict[Ref, View], list[Op]]:
    """Finds all reordered parameters, and the operations that compute them."""
    views = {ref: View(i, ()) for i, ref in enumerate(program.leaves)}
    ops = []
    for op in program.ops:
        if op.ins and op.ins[0] in views and _is_reorder(op, program):
            leaf, chain = views[op.ins[0]]
            if op.primitive not in CONVERT:
                chain = (*chain, (op.primitive, _frozen(op.params)))
            views[op.outs[0]] = View(leaf, chain)
            ops.append(op)
    return views, ops


def joins_scalars(op: Op, program: Program, num_tasks: int) -> bool:
    """Whether the operation stacks one number per task."""
    if op.primitive not in STACK | CONCATENATE or len(op.ins) != num_tasks:
        return False
    shape = () if op.primitive in STACK else (1,)
    return all(program.avals[ref].shape == shape for ref in op.ins)


class _Reach(NamedTuple):
    ops: list[int]  # the tasks that an operation reaches, as bits
    tail: set[int]  # operations on entries
    entries: set[Ref]  # values of which each task reads one entry


def _reach(
    program: Program, num_tasks: int, dependent: set[Ref], views: dict[Ref, View]
) -> _Reach:
    """Computes the reached tasks, from the losses back to the parameters."""
    everyone = (1 << num_tasks) - 1
    reach = dict.fromkeys(program.avals, 0)
    entries = set() if num_tasks == 1 else {program.losses}
    reach[program.losses] = int(num_tasks == 1)

    def by_entries(op):
        """Returns the vectors that an elementwise operation of losses reads."""
        shapes = {ref: program.avals[ref].shape for ref in op.ins}
        moving = [ref for ref in op.ins if ref in dependent]
        fits = op.primitive in ELEMENTWISE and all(
            shape in ((), (num_tasks,)) for shape in shapes.values()
        )
        # A scalar or a parameter that affects all losses belongs to the trunk.
        own = all(shapes[ref] and ref not in views for ref in moving)
        return moving if fits and own else None

    ops = [0] * len(program.ops)
    tail = set()
    for index in reversed(range(len(program.ops))):
        op = program.ops[index]
        for out in op.outs:
            ops[index] |= reach[out]
        if entries.intersection(op.outs):
            if not ops[index]:
                if joins_scalars(op, program, num_tasks):
                    for task, ref in enumerate(op.ins):
                        reach[ref] |= 1 << task
                    tail.add(index)
                    continue
                vectors = by_entries(op)
                if vectors is not None:
                    entries.update(vectors)
                    tail.add(index)
                    continue
            ops[index] = everyone
        for ref in op.ins:
            reach[ref] |= ops[index]
    return _Reach(ops, tail, entries)


def _ends_to_heads(stages: Stages) -> Stages:
    """Moves activations at the end of the trunk into every head that reads them.

    A head differentiates them in the loop that computes its cotangent. The trunk would
    need a pass over the cotangents of all tasks, and memory for the result.
    """
    heads, reads = [list(ops) for ops in stages.heads], [set(r) for r in stages.reads]
    remain: list[Op] = []
    inside = set(stages.entries)  # values that are read outside of heads
    for op in reversed(stages.trunk):
        moving = [ref for ref in op.ins if ref in stages.dependent]
        # Only one operand is permitted, so that heads read as many values as before. A
        # conversion would round the cotangents before they are combined.
        activation = op.primitive not in CONVERT and _is_elementwise(op.eqn)
        single = len(op.outs) == len(moving) == 1 and moving[0] not in stages.view_of
        if not activation or not single or inside.intersection(op.outs):
            remain.append(op)
            inside.update(op.ins)
            continue
        for ops, refs in zip(heads, reads, strict=True):
            if op.outs[0] in refs:
                ops.insert(0, op)
                refs.update(op.ins)
    made = {ref for op in remain for ref in op.outs}
    outputs = made & set().union(*reads)
    trunk = remain[::-1]
    return stages._replace(trunk=trunk, heads=heads, reads=reads, outputs=outputs)


def _is_elementwise(eqn: Any) -> bool:
    """Whether every entry of the result depends on one entry of each operand."""
    if eqn.primitive not in CUSTOM_JVP | CALLS:
        return eqn.primitive in ELEMENTWISE
    inner = [one for body in bodies(eqn.params) for one in body.eqns]
    return all(map(_is_elementwise, inner))


def split(program: Program, num_tasks: int) -> Stages:
    """Sorts the operations by the tasks that they reach."""
    view_of, views = find_views(program)
    dependent = set(program.leaves)
    for op in program.ops:
        if dependent.intersection(op.ins):
            dependent.update(op.outs)
    reach = _reach(program, num_tasks, dependent, view_of)

    fixed, trunk, tail, extra = [], [], [], []
    heads: list[list[Op]] = [[] for _ in range(num_tasks)]
    reads: list[set[Ref]] = [set() for _ in range(num_tasks)]
    for index, op in enumerate(program.ops):
        bits = reach.ops[index]
        if op.outs and op.outs[0] in view_of:
            continue
        if op.outs and not dependent.intersection(op.outs):
            fixed.append(op)
        elif index in reach.tail:
            tail.append(op)
            if joins_scalars(op, program, num_tasks):
                for task, ref in enumerate(op.ins):
                    reads[task].add(ref)
        elif not bits:
            extra.append(op)
        elif bits.bit_count() == 1:
            heads[bits.bit_length() - 1].append(op)
            reads[bits.bit_length() - 1].update(op.ins)
        else:
            trunk.append(op)
    if num_tasks == 1:
        reads[0].add(program.losses)
    made = {ref for op in trunk for ref in op.outs}
    entries = reach.entries - {ref for op in tail for ref in op.outs}
    stages = Stages(
        fixed=fixed,
        views=views,
        trunk=trunk,
        heads=heads,
        tail=tail,
        extra=extra,
        view_of=view_of,
        dependent=dependent,
        reads=reads,
        outputs=made & set().union(*reads),
        entries=sorted(entries),
    )
    return _ends_to_heads(stages)
