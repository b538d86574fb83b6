"""Estimates the faster engine and its passes from static shapes.

Work is counted in multiplications. This does not predict a time. It distinguishes the
work of forming T gradients from the work of T backward passes, which decides the
choice. The table ``benchmarks/results/engine.json`` shows the accuracy.
"""

import math
from typing import Any, NamedTuple

import jax

from mtljax.gradients._gramian.plan import Plan, forming, not_forming
from mtljax.gradients._primitives import CONVOLUTION, DOT, bodies
from mtljax.gradients._program import Op
from mtljax.gradients.passes import Body, Passes, batched, few, loops_sooner

# Number of multiplications in the time of reading and writing one entry of an array.
_PER_ENTRY = 16
# Below this amount of work, call overhead and compilation dominate.
_SMALL = 1 << 20
# The Gramian engine must be faster by this margin, because it compiles more slowly.
_MARGIN = 0.9


class Work(NamedTuple):
    """Number of multiplications of one backward pass."""

    activations: int = 0  # cotangents of values
    shared: int = 0  # gradients of shared parameters
    own: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)


def forward_work(eqn: Any) -> int:
    """Returns the multiplications of an equation, including those of its bodies."""
    primitive, params = eqn.primitive, eqn.params
    size = sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    if primitive in DOT:
        shape = eqn.invars[0].aval.shape
        return size * math.prod(shape[a] for a in params["dimension_numbers"][0][0])
    if primitive in CONVOLUTION:
        kernel = eqn.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return size * math.prod(kernel) // max(features, 1)
    inside = bodies(params)
    if inside:
        once = sum(forward_work(inner) for body in inside for inner in body.eqns)
        return once * params.get("length", 1)
    return size * _PER_ENTRY


def backward_work(plan: Plan, ops: list[Op]) -> Work:
    """Returns the work of one backward pass through some operations."""
    shared = set(plan.shared)
    total = {"activations": 0, "shared": 0, "own": 0}
    for op in ops:
        once = forward_work(op.eqn)
        if op.primitive not in DOT | CONVOLUTION:
            total["activations"] += once
            continue
        for ref in op.ins:
            view = plan.stages.view_of.get(ref)
            if view is not None:
                total["shared" if view.leaf in shared else "own"] += once
            elif ref in plan.stages.dependent:
                total["activations"] += once
    return Work(**total)


class Estimate(NamedTuple):
    """Work of a step in addition to its forward pass."""

    stacked: int
    gramian: int


def estimate(plan: Plan) -> Estimate:
    """Estimates both engines: T passes with gradients, or T without and one with."""
    tasks = plan.num_tasks
    trunk = backward_work(plan, plan.stages.trunk)
    heads = backward_work(plan, plan.stages.once)
    sizes = {
        leaf: math.prod(plan.program.avals[plan.program.leaves[leaf]].shape)
        for leaf in plan.shared
    }
    # A formed gradient is written and read for the Gramian, and read again for the
    # update if it is stacked.
    write_read = 2 * tasks * _PER_ENTRY
    stacked = tasks * (
        trunk.activations + trunk.shared + heads.activations + heads.shared
    )
    stacked += (write_read + tasks * _PER_ENTRY) * sum(sizes.values())
    own = heads.activations + heads.own if heads.own or trunk.own else 0
    own += trunk.activations + trunk.own if trunk.own else 0

    formed = tasks * trunk.shared
    formed += write_read * sum(
        sizes[leaf] for leaf in plan.direct if leaf in plan.in_trunk
    )
    for factored in plan.factored.values():
        if not factored.uses[0].lookup:
            uses = factored.uses
            ways = forming(uses, tasks), not_forming(uses, tasks)
            formed += min(ways) - ways[0]
    again = any(
        len(who) > 1 for leaf, who in plan.in_heads.items() if leaf in plan.shared
    )
    gramian = heads.total + tasks * trunk.activations + formed
    last = _last(plan, trunk)
    gramian += min(last.weighted + again * heads.total, last.combined)
    if trunk.own:
        gramian += trunk.activations + trunk.own
    return Estimate(stacked + own, gramian)


class _Last(NamedTuple):
    """Work of the weighted gradient after the T passes."""

    weighted: int  # of one more pass
    combined: int  # of combining the results of the T passes


def _last(plan: Plan, trunk: Work) -> _Last:
    """Estimates both ways to compute the weighted gradient."""

    def entries(refs):
        return sum(math.prod(plan.program.avals[ref].shape) for ref in refs)

    uses = [use for factored in plan.factored.values() for use in factored.uses]
    products = sum(forward_work(use.op.eqn) for use in uses if not use.lookup)
    left = entries({use.op.outs[0] for use in uses})
    left += entries(plan.program.leaves[leaf] for leaf in plan.direct)
    mixing = plan.num_tasks * left * _PER_ENTRY
    return _Last(trunk.activations + trunk.shared, mixing + products)


def pays(plan: Plan) -> bool:
    """Whether the Gramian engine is faster by enough to compensate its compilation."""
    work = estimate(plan)
    # Unrolled passes compile faster without T gradients to stack. A loop of complete
    # passes would differentiate the heads of all tasks in each iteration.
    unrolls = _convolves(plan) and jax.default_backend() == "cpu"
    loops = passes(plan, stacked=True).strategy in ("map", "chunked")
    margin = 1 if unrolls or loops else _MARGIN
    return work.stacked > _SMALL and work.gramian < margin * work.stacked


def combining_pays(plan: Plan) -> bool:
    """Whether combining the T passes costs less than one more weighted pass."""
    last = _last(plan, backward_work(plan, plan.stages.trunk))
    return last.combined < last.weighted


def cheap_heads(plan: Plan) -> bool:
    """Whether a second pass through the heads costs less than combining the first."""
    ends = {*plan.stages.outputs, *plan.stages.entries}
    entries = sum(math.prod(plan.program.avals[ref].shape) for ref in ends)
    heads = backward_work(plan, plan.stages.once)
    return heads.total < plan.num_tasks * entries * _PER_ENTRY


def _convolves(plan: Plan) -> bool:
    return any(op.primitive in CONVOLUTION for op in plan.stages.trunk)


def passes(plan: Plan, *, stacked: bool) -> Passes:
    """Returns the default way to run the T passes.

    One batched pass is the fastest if its operations are large products. XLA:CPU is
    slow for batches of kernel gradients and for batched convolutions. On CPU, a small
    number of passes is therefore unrolled if the gradients are stacked, or if the trunk
    is long and contains convolutions. If the values of all tasks need too much memory,
    the passes are run in chunks.
    """
    tasks, trunk = plan.num_tasks, plan.stages.trunk
    sizes = [
        math.prod(plan.program.avals[ref].shape) for op in trunk for ref in op.outs
    ]
    body = Body(max(sizes, default=1), _convolves(plan), 2 * len(trunk))
    separate = body.convolves or (stacked and not loops_sooner(tasks, body))
    if jax.default_backend() == "cpu" and separate and few(tasks, body):
        return Passes("unrolled", 1)
    return batched(tasks, body)
