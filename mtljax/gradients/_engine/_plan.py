"""Which gradients are formed and which are not, decided from static shapes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array

from mtljax.gradients._engine import _contract as contract
from mtljax.gradients._engine._program import Op, Program
from mtljax.gradients._engine._stages import Stages, split
from mtljax.gradients._engine._uses import Use, find_use

Contract = Callable[[contract.Side, contract.Side], Array]

# Entries of the T gradients of one leaf from which on they are made piece by piece.
_LARGE = 1 << 25


class Factored(NamedTuple):
    """A leaf whose T gradients stay products ``Xᵀδ``."""

    uses: list[Use]
    contract: Contract


class Plan(NamedTuple):
    """A program, sorted, with a way to the Gramian for every shared leaf."""

    program: Program
    stages: Stages
    num_tasks: int
    factored: dict[int, Factored]
    direct: list[int]  # the other shared leaves, differentiated as usual
    in_trunk: set[int]  # leaves that the trunk reads
    in_heads: dict[int, list[int]]  # leaves that heads read, and the tasks of these

    @property
    def shared(self) -> list[int]:
        """All leaves over which inner products are taken."""
        return [*self.factored, *self.direct]


def plan(program: Program, num_tasks: int, shared: Sequence[int]) -> Plan:
    """Plans the Gramian over the shared leaves (numbers into ``program.leaves``)."""
    stages = split(program, num_tasks)
    view_of = stages.view_of
    readers: dict[int, list[tuple[Op, int]]] = {}
    for op in stages.trunk:
        for operand, ref in enumerate(op.ins):
            if ref in view_of:
                readers.setdefault(view_of[ref].leaf, []).append((op, operand))
    ends = {view_of[ref].leaf for ref in stages.entries if ref in view_of}
    in_heads: dict[int, list[int]] = {}
    for task, reads in enumerate(stages.reads):
        for leaf in sorted({view_of[ref].leaf for ref in reads if ref in view_of}):
            in_heads.setdefault(leaf, []).append(task)

    factored = {}
    for leaf in shared:
        # What a head reads is differentiated by the one pass over all heads.
        if leaf in readers and leaf not in ends and leaf not in in_heads:
            found = _factor(readers[leaf], program, stages, num_tasks)
            if found is not None:
                factored[leaf] = found
    direct = [leaf for leaf in shared if leaf not in factored]
    in_trunk = ends.union(readers)
    return Plan(program, stages, num_tasks, factored, direct, in_trunk, in_heads)


def common_plan(left: Plan, right: Plan) -> tuple[Plan, Plan]:
    """The plans of one function on two batches, brought to the same form."""

    def same(leaf):
        one, two = left.factored[leaf], right.factored.get(leaf)
        return two is not None and one.contract is two.contract

    kept = [leaf for leaf in left.factored if same(leaf)]

    def restrict(made):
        return made._replace(
            factored={leaf: made.factored[leaf] for leaf in kept},
            direct=[leaf for leaf in sorted(made.shared) if leaf not in kept],
        )

    return restrict(left), restrict(right)


def _factor(
    readers: list[tuple[Op, int]], program: Program, stages: Stages, num_tasks: int
) -> Factored | None:
    """All uses of one leaf, if every one is known and they fit together."""
    uses = []
    for op, operand in readers:
        use = find_use(op, operand, stages.view_of[op.ins[operand]], program)
        if use is None or use.source in stages.view_of:
            return None
        uses.append(use)
    fit = all(use.layout == uses[0].layout for use in uses)
    if not fit or (uses[0].lookup and len(uses) > 1):
        return None
    way = choose(uses, num_tasks)
    return None if way is None else Factored(uses, way)


def choose(uses: list[Use], num_tasks: int) -> Contract | None:
    """The cheaper way in multiplications; None is to form the gradients as usual."""
    first = uses[0]
    if first.lookup:
        return contract.looked_up if first.positions < first.fan_in else None
    if not_forming(uses, num_tasks) < forming(uses, num_tasks):
        return contract.inner
    entries = num_tasks * first.batch * first.fan_in * first.fan_out
    return contract.formed if entries > _LARGE else None


def forming(uses: list[Use], num_tasks: int) -> int:
    """Multiplications that make T gradients of a leaf."""
    first = uses[0]
    positions = sum(use.positions for use in uses)
    return num_tasks * positions * first.batch * first.fan_in * first.fan_out


def not_forming(uses: list[Use], num_tasks: int) -> int:
    """Multiplications of :func:`inner`."""
    first = uses[0]
    positions = sum(use.positions for use in uses)
    return positions**2 * first.batch * (first.fan_in + num_tasks * first.fan_out)
