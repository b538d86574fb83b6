"""Bytes that devices exchange, read from compiled programs.

The bounds are counted from the shapes: T tasks, D devices, P shared and H own entries
of four bytes, and for a layer of I inputs and O outputs with n examples in all,
``n (I + 1) + n T O`` entries of the two sides of its products (1 for the bias).
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from devices import hlo
from devices.harness import DEVICES, Case
from devices.layouts import BY_NAME, Place, make_mesh
from devices.models import SIZED, Model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtljax
from mtljax.gradients import Mapped

TASKS = 4
ENTRY = 4  # bytes


@functools.cache
def model_of(name: str) -> Model:
    return SIZED[name]()


def entries(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def sides(model: Model) -> int:
    """Entries of the two sides of all products of the trunk."""
    (batch,) = model.batches.values()
    count = batch[0].shape[0]
    return sum(
        count * (layer["w"].shape[0] + 1 + TASKS * layer["w"].shape[1])
        for layer in model.params["trunk"]
    )


def compile_step(place: Place, name: str, method: str, engine: str, **options: Any):
    """The step of a layout under ``jit``, compiled, and its arguments."""
    model = model_of(name)
    (batch,) = model.batches.values()
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    if place.kind == "auto":
        options["grad_shardings"] = place.shardings(model.names)
    grad_fn = mtljax.value_and_balanced_grad(
        model.losses(place), balancer, labels=model.labels, engine=engine, **options
    )
    with place.context:
        params = place.put(model.params, model.names)
        state = place.replicate(balancer.init(params))
        batch = place.put(batch, model.batch_names)
        args = (params, state, *batch)
        return jax.jit(grad_fn).lower(*args).compile(), args


def compile_region(
    name: str, method: str, engine: str, tracked: bool, exchange: str = "all"
):
    """The same with ``axis_name`` in a manual region, data parallel."""
    model = model_of(name)
    (batch,) = model.batches.values()
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    grad_fn = mtljax.value_and_balanced_grad(
        model.losses(Place()),
        balancer,
        labels=model.labels,
        engine=engine,
        axis_name=Mapped("data", exchange),
    )
    mesh = make_mesh(BY_NAME["dp8"], "auto")
    specs = (P(), P(), P("data"), P("data"))
    step = jax.shard_map(
        grad_fn, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=tracked
    )
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    args = jax.device_put((model.params, balancer.init(model.params), *batch), places)
    return jax.jit(step).lower(*args).compile(), args


def within(found: int, bound: int, what: str) -> None:
    assert found <= bound, f"{what}: {found} bytes, at most {bound} are needed"


def gramian_of_columns(kind: str, spec: tuple) -> None:
    """``stack.gramian`` of split rows exchanges T x T numbers of a leaf."""
    mesh = make_mesh(BY_NAME["tp42"], kind)
    place = NamedSharding(mesh, P(*spec))
    rows = {
        name: jax.device_put(jnp.ones((TASKS, *shape)), place)
        for name, shape in {"a": (64, 32), "b": (16, 128)}.items()
    }
    text = jax.jit(mtljax.stack.gramian).lower(rows).compile().as_text()
    sums = hlo.total(text)
    assert sums["all-gather"] == 0, f"{sums['all-gather']} bytes are gathered"
    axes = sum(axis is not None for axis in spec)  # XLA reduces over each of them
    within(sums["all-reduce"], axes * len(rows) * ENTRY * TASKS**2, "all-reduce")


def stacked_columns(kind: str) -> None:
    """Tensor-parallel rows are not gathered."""
    place = Place(BY_NAME["tp42"], make_mesh(BY_NAME["tp42"], kind), kind)
    text = compile_step(place, "wide", "cagrad", "stacked")[0].as_text()
    within(hlo.total(text)["all-gather"], 100_000, "all-gather")


def losses_under_jit(kind: str) -> None:
    """One gradient is reduced, as in ordinary training."""
    model = model_of("wide")
    place = Place(BY_NAME["dp8"], make_mesh(BY_NAME["dp8"], kind), kind)
    text = compile_step(place, "wide", "uncertainty", "losses")[0].as_text()
    sums = hlo.total(text)
    assert sums["all-gather"] == 0, sums
    bound = ENTRY * (entries(model.params) + TASKS)
    within(sums["all-reduce"], bound, "all-reduce")


def losses_in_region(tracked: bool) -> None:
    model = model_of("wide")
    text = compile_region("wide", "uncertainty", "losses", tracked)[0].as_text()
    sums = hlo.total(text)
    assert sums["all-gather"] == 0, sums
    bound = ENTRY * (entries(model.params) + TASKS)
    within(sums["all-reduce"], bound, "all-reduce")


def gramian_in_region(tracked: bool) -> None:
    """One side of every product is gathered, T x T numbers and P are reduced."""
    model = model_of("wide")
    text = compile_region("wide", "cagrad", "gramian", tracked)[0].as_text()
    sums = hlo.total(text)
    needed = ENTRY * sides(model)
    assert sums["all-gather"] == needed, (
        f"{sums['all-gather']} bytes are gathered, {needed} are needed"
    )
    bound = ENTRY * (entries(model.params) + TASKS**2 + TASKS)
    within(sums["all-reduce"], bound, "all-reduce")


def scattered(tracked: bool) -> None:
    """Rows are reduced and split in one collective, the update is gathered."""
    model = model_of("wide")
    step, whole = (
        compile_region("wide", "cagrad", "stacked", tracked, exchange)[0]
        for exchange in ("scatter", "all")
    )
    found = hlo.collectives(step.as_text())
    sums = hlo.total(step.as_text())
    shared, own = entries(model.params["trunk"]), entries(model.params["heads"])
    leaves = len(jax.tree.leaves(model.params["trunk"]))
    padding = leaves * (DEVICES - 1)  # entries, at most
    within(
        sums["reduce-scatter"],
        ENTRY * TASKS * (shared + padding) // DEVICES,
        "reduce-scatter",
    )
    assert sums["reduce-scatter"] >= ENTRY * TASKS * shared // DEVICES, sums
    within(sums["all-gather"], ENTRY * (shared + padding), "all-gather")
    bound = ENTRY * (TASKS**2 + TASKS + own)
    parameters = inspect.signature(jax.lax.all_gather).parameters
    # In jax 0.7.0 the update must be summed to be equal on all devices.
    summed = tracked and "to" not in parameters
    if summed:
        bound += ENTRY * (shared + padding)
    for one in found:
        if one.kind == "all-reduce":
            within(one.size, bound, f"all-reduce of {one.shape}")
    small, large = (
        program.memory_analysis().temp_size_in_bytes for program in (step, whole)
    )
    assert small < (0.5 if summed else 0.4) * large, (
        f"{small} bytes of temporaries, {large} without scatter"
    )


def sharded_rows(kind: str, method: str = "cagrad", engine: str = "stacked") -> None:
    """FSDP: no device holds the T gradients of a matrix after an all-gather."""
    place = Place(BY_NAME["fsdp8"], make_mesh(BY_NAME["fsdp8"], kind), kind, True)
    text = compile_step(place, "wide", method, engine)[0].as_text()
    found = hlo.collectives(text)
    assert found, "the step exchanges nothing"
    for one in found:
        if one.kind == "all-gather":
            shape = tuple(sorted(n for n in one.shape if n != 1))
            assert shape not in ((4, 256, 256), (4, 65536)), f"gathers {one.shape}"


def parallel_gramian(kind: str) -> None:
    """Data parallel under ``jit``: sides are gathered and one gradient is reduced."""
    model = model_of("wide")
    place = Place(BY_NAME["dp8"], make_mesh(BY_NAME["dp8"], kind), kind)
    text = compile_step(place, "wide", "cagrad", "gramian")[0].as_text()
    sums = hlo.total(text)
    # XLA may gather the sides of both factors.
    within(sums["all-gather"], 2 * ENTRY * sides(model), "all-gather")
    bound = ENTRY * (entries(model.params) + 4 * TASKS**2 + 4 * TASKS)
    within(sums["all-reduce"], bound, "all-reduce")


def cases():
    part = functools.partial
    for kind in ("auto", "explicit"):
        columns = (
            (None, None, "model"),
            (None, "model", None),
            (None, "data", "model"),
        )
        for spec in columns:
            name = "-".join(axis or "none" for axis in spec)
            yield Case(f"gramian-{kind}-{name}", part(gramian_of_columns, kind, spec))
        yield Case(f"stacked-tp-{kind}", part(stacked_columns, kind))
        yield Case(f"stacked-fsdp-{kind}", part(sharded_rows, kind))
        yield Case(f"losses-{kind}", part(losses_under_jit, kind))
        yield Case(f"gramian-dp-{kind}", part(parallel_gramian, kind))
    for method in ("upgrad", "mgda", "nash_mtl"):
        for engine in ("stacked", "gramian"):
            case = part(sharded_rows, "explicit", method, engine)
            yield Case(f"fsdp-explicit-{method}-{engine}", case, True)
    for tracked in (True, False):
        how = "vma" if tracked else "unchecked"
        yield Case(f"losses-{how}", part(losses_in_region, tracked), not tracked)
        yield Case(f"gramian-{how}", part(gramian_in_region, tracked))
        yield Case(f"scatter-{how}", part(scattered, tracked))


CASES = list(cases())
