"""Decides from static shapes which gradients are formed for the Gramian."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array

from mtljax import placement
from mtljax.gradients._gramian import contract
from mtljax.gradients._gramian.stages import Stages, split
from mtljax.gradients._gramian.uses import Use, find_use
from mtljax.gradients._primitives import ADD, BROADCAST, TRANSPOSE
from mtljax.gradients._program import Op, Program, Ref
from mtljax.placement import Axes

Contract = Callable[..., Array]  # a function of two sides and mapped axes

# If the T gradients of a leaf have more entries, they are formed piece by piece.
_LARGE = 1 << 25


class Bias(NamedTuple):
    """A leaf that is added to the products with another leaf.

    It is one more row of that matrix, ``X W + 1 bᵀ = [X 1] [W; bᵀ]``, and costs as much
    as one column of X. A separate computation would sum T cotangents over the
    positions.
    """

    leaf: int
    terms: list[Ref]  # per product, the value that is added to it
    orders: list[tuple[int, ...]]  # the axes of the product among those of the sum
    spreads: list[Op]  # operations that broadcast the leaf for these terms


class Factored(NamedTuple):
    """A leaf whose T gradients are represented by products ``Xᵀδ``."""

    uses: list[Use]
    contract: Contract
    bias: Bias | None = None


class Plan(NamedTuple):
    """A sorted program, with a way to compute the Gramian for every shared leaf."""

    program: Program
    stages: Stages
    num_tasks: int
    factored: dict[int, Factored]
    direct: list[int]  # other shared leaves except biases, differentiated as usual
    in_trunk: set[int]  # leaves that the trunk reads
    in_heads: dict[int, list[int]]  # leaves that heads read, and their tasks

    @property
    def biases(self) -> dict[int, int]:
        """Maps each leaf that is a row of a factored leaf to the factored leaf."""
        pairs = self.factored.items()
        return {f.bias.leaf: leaf for leaf, f in pairs if f.bias is not None}

    @property
    def shared(self) -> list[int]:
        """All leaves over which inner products are computed."""
        return [*self.factored, *self.biases, *self.direct]


def plan(
    program: Program, num_tasks: int, shared: Sequence[int], axes: Axes = ()
) -> Plan:
    """Plans the Gramian over the shared leaves.

    ``shared`` contains indices into ``program.leaves``. ``axes`` are the mapped axes
    over which losses are averaged.
    """
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

    # Leaves that a head reads are excluded, as the pass over all heads differentiates
    # them.
    inside = {
        leaf: readers[leaf]
        for leaf in shared
        if leaf in readers and leaf not in ends and leaf not in in_heads
    }
    factored = {}
    for leaf, reads in inside.items():
        found = _factor(reads, program, stages, num_tasks, axes)
        if found is not None:
            factored[leaf] = found
    links = _links(stages)
    for leaf, found in factored.items():
        if not found.uses[0].lookup:
            bias = _find_bias(found.uses, inside, links, program, stages)
            factored[leaf] = found._replace(bias=bias)
    in_trunk = ends.union(readers)
    made = Plan(program, stages, num_tasks, factored, [], in_trunk, in_heads)
    known = set(made.shared)
    return made._replace(direct=[leaf for leaf in shared if leaf not in known])


def common_plan(left: Plan, right: Plan) -> tuple[Plan, Plan]:
    """Converts the plans of one function on two batches to the same form."""

    def same(leaf):
        one, two = left.factored[leaf], right.factored.get(leaf)
        return two is not None and one.contract is two.contract

    kept = [leaf for leaf in left.factored if same(leaf)]
    biases = left.biases.items() & right.biases.items()

    def restrict(made):
        factored = {leaf: made.factored[leaf] for leaf in kept}
        for leaf, found in factored.items():
            if found.bias and (found.bias.leaf, leaf) not in biases:
                factored[leaf] = found._replace(bias=None)
        less = made._replace(factored=factored, direct=[])
        known = set(less.shared)
        rest = [leaf for leaf in sorted(made.shared) if leaf not in known]
        return less._replace(direct=rest)

    return restrict(left), restrict(right)


def _factor(
    readers: list[tuple[Op, int]],
    program: Program,
    stages: Stages,
    num_tasks: int,
    axes: Axes,
) -> Factored | None:
    """Returns all uses of one leaf, if all are recognised and have the same layout."""
    uses = []
    for op, operand in readers:
        use = find_use(op, operand, stages.view_of[op.ins[operand]], program)
        if use is None or use.source in stages.view_of:
            return None
        uses.append(use)
    fit = all(use.layout == uses[0].layout for use in uses)
    if not fit or (uses[0].lookup and len(uses) > 1):
        return None
    leaf = program.avals[program.leaves[uses[0].leaf]]
    made = [program.avals[use.op.outs[0]] for use in uses]
    mapped = axes or tuple(placement.varying(made) - placement.varying(leaf))
    way = choose(uses, num_tasks, placement.size(mapped))
    return None if way is None else Factored(uses, way)


class _Links(NamedTuple):
    """Maps every value of the trunk to its producer and its consumers."""

    made_by: dict[Ref, Op]
    read_by: dict[Ref, list[Op]]
    outside: set[Ref]  # values that heads and losses read

    def only_reader(self, ref: Ref) -> Op | None:
        """Returns the only consumer of a value, or None if there are several."""
        found = self.read_by.get(ref, [])
        return found[0] if len(found) == 1 and ref not in self.outside else None


def _links(stages: Stages) -> _Links:
    made_by: dict[Ref, Op] = {}
    read_by: dict[Ref, list[Op]] = {}
    for op in stages.trunk:
        made_by |= dict.fromkeys(op.outs, op)
        for ref in op.ins:
            read_by.setdefault(ref, []).append(op)
    return _Links(made_by, read_by, stages.outputs.union(stages.entries))


def _find_bias(
    uses: list[Use],
    readers: dict[int, list[tuple[Op, int]]],
    links: _Links,
    program: Program,
    stages: Stages,
) -> Bias | None:
    """Finds the leaf that is added to all these products, and to nothing else."""
    leaves, terms, orders, spreads, reads = set(), [], [], [], []
    for use in uses:
        product = use.op.outs[0]
        add = links.only_reader(product)
        order = tuple(range(len(program.avals[product].shape)))
        while add is not None and add.primitive in TRANSPOSE:
            order = tuple(map(add.params["permutation"].index, order))
            product = add.outs[0]
            add = links.only_reader(product)
        if add is None or add.primitive not in ADD:
            return None
        place = 1 - add.ins.index(product)
        term, full = add.ins[place], add.shape(1 - place)
        read, operand, axes = add, place, range(len(add.shape(place)))
        spread = links.made_by.get(term)
        if spread is not None:
            if spread.primitive not in BROADCAST or not links.only_reader(term):
                return None
            read, operand, axes = spread, 0, spread.params["broadcast_dimensions"]
            spreads.append(spread)
        view = stages.view_of.get(read.ins[operand])
        sizes = zip(axes, read.shape(operand), strict=True)
        along = {axis for axis, size in sizes if size > 1}
        columns = {order[axis] for axis in use.axes[0] + use.axes[2]}
        if view is None or along != {axis for axis in columns if full[axis] > 1}:
            return None
        leaves.add(view.leaf)
        terms.append(term)
        orders.append(order)
        reads.append(read.outs)
    (leaf, *others) = leaves
    everywhere = [op.outs for op, _ in readers.get(leaf, [])]
    return None if others or everywhere != reads else Bias(leaf, terms, orders, spreads)


def choose(uses: list[Use], num_tasks: int, devices: int = 1) -> Contract | None:
    """Selects the contraction with fewer multiplications; None forms the gradients.

    In a mapped region each of ``devices`` has its own positions. The positions of all
    devices are gathered only if they need fewer bytes than the gradients that would be
    summed.
    """
    first = uses[0]
    if first.lookup:
        few = first.positions * devices < first.fan_in
        return contract.looked_up if few else None
    sends = devices == 1 or gathering(uses, num_tasks, devices) < summing(
        uses, num_tasks
    )
    if sends and not_forming(uses, num_tasks, devices) < forming(uses, num_tasks):
        return contract.inner
    entries = num_tasks * first.batch * first.fan_in * first.fan_out
    return contract.formed if entries > _LARGE else None


def _positions(uses: list[Use]) -> int:
    return sum(use.positions for use in uses)


def gathering(uses: list[Use], num_tasks: int, devices: int) -> int:
    """Returns the entries that a device receives for :func:`contract.inner`."""
    first = uses[0]
    entries = first.fan_in + num_tasks * first.fan_out
    return devices * _positions(uses) * first.batch * entries


def summing(uses: list[Use], num_tasks: int) -> int:
    """Returns the entries that a device sends and receives to sum T gradients."""
    first = uses[0]
    return 2 * num_tasks * first.batch * first.fan_in * first.fan_out


def forming(uses: list[Use], num_tasks: int) -> int:
    """Returns the multiplications that form T gradients of a leaf."""
    first = uses[0]
    work = first.batch * first.fan_in * first.fan_out
    return num_tasks * _positions(uses) * work


def not_forming(uses: list[Use], num_tasks: int, devices: int = 1) -> int:
    """Returns the multiplications of :func:`contract.inner`."""
    first = uses[0]
    work = first.batch * (first.fan_in + num_tasks * first.fan_out)
    return devices * _positions(uses) ** 2 * work
