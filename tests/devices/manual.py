"""``shard_map`` with and without tracked axes, and ``pmap``: local losses, averages."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices.compare import (
    balance_rows,
    check,
    check_placed,
    jacobian,
    model_of,
    numbers,
    one_device,
    stack_update,
)
from devices.harness import DEVICES, Case, Skip
from devices.layouts import Layout, Place, has_set_mesh, make_mesh
from devices.models import TASKS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtljax
from mtljax.gradients import Mapped, cross_task_gramian

STRATEGIES = ("auto", "vmap", "map", "chunked", "unrolled")
SIZES = ("small", "large")
REGIONS = ("vma", "unchecked", "pmap")
ENGINES = {
    "losses": ("uncertainty", "losses"),
    "gramian": ("cagrad", "gramian"),
    "stacked": ("cagrad", "stacked"),
    "auto": ("mgda", "auto"),
    "grads": ("trimmed_mean", "auto"),  # reads the gradients, entry by entry
}


def build(method: str) -> mtljax.Balancer:
    return mtljax.get_method(method).build(TASKS, key=jax.random.key(0))


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """As users make it: the kind of its axes is JAX's default."""
    return jax.make_mesh((DEVICES,), ("data",))


def batch_axes(name: str) -> Any:
    """The axis of every argument that is split."""
    names = model_of(name).batch_names
    return jax.tree.map(lambda _: P("data"), names, is_leaf=lambda x: x[0] == "batch")


def mapped(function: Any, mesh: Any, in_specs: Any, out_specs: Any, **options: Any):
    """``jit(shard_map(function))`` on arguments that are placed first."""
    call = jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options
        )
    )
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        in_specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    return lambda *args: call(*jax.device_put(args, places))


def run(region: str, function: Any, name: str, size: str, *shared: Any) -> Any:
    """``function(*shared, *local batch)`` in a region; results equal on all devices.

    ``"vma"`` is ``shard_map`` as it is by default, which itself checks that results
    are equal. In the other two the test compares the devices.
    """
    batch = model_of(name).batches[size]
    axes = batch_axes(name)
    specs = (*[P()] * len(shared), *axes)
    if region == "vma":
        return mapped(function, mesh(), specs, P())(*shared, *batch)
    if region == "unchecked":
        results = mapped(
            lambda *args: jax.tree.map(lambda x: x[None], function(*args)),
            mesh(),
            specs,
            P("data"),
            check_vma=False,
        )(*shared, *batch)
    else:
        if not hasattr(jax, "pmap"):
            raise Skip("this version of JAX has no pmap")
        split = jax.tree.map(
            lambda x: x.reshape(DEVICES, x.shape[0] // DEVICES, *x.shape[1:]), batch
        )
        axes = (*[None] * len(shared), *[0] * len(split))
        results = jax.pmap(function, axis_name="data", in_axes=axes)(*shared, *split)
    results = jax.tree.map(np.asarray, jax.device_get(unkeyed(results)))
    first = jax.tree.map(lambda x: x[0], results)
    for device in range(1, DEVICES):
        other = jax.tree.map(lambda x, d=device: x[d], results)
        check(f"device {device} against device 0:", other, first, 1e-6)
    return first


def unkeyed(tree: Any) -> Any:
    """Keys of random numbers as their words, which can be compared."""
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        tree,
    )


def arrays(tree: Any) -> Any:
    """What two runs are compared by: all numbers but the residuals of solvers."""

    def kept(path, leaf):
        names = {getattr(entry, "name", None) for entry in path}
        return jnp.zeros(()) if "solver" in names else leaf

    return unkeyed(jax.tree_util.tree_map_with_path(kept, tree))


def losses_of(name: str) -> Any:
    return model_of(name).losses(Place())


def task_sums(strategy: str, size: str) -> None:
    """Without ``axis_name`` gradients are sums, as ``jax.jacrev`` returns them."""
    losses, rows = jacobian("mlp", size)
    local = losses_of("mlp")
    grad_fn = mtljax.value_and_task_grads(local, strategy=strategy)

    def both(p, x, y):
        values, grads = grad_fn(p, x, y)
        return jax.lax.pmean(values, "data"), grads, jax.jacrev(local)(p, x, y)

    values, grads, reference = run("vma", both, "mlp", size, model_of("mlp").params)
    check("the losses", values, losses)
    check("the gradients", grads, reference)
    check("the gradients", grads, jax.tree.map(lambda g: DEVICES * g, rows))


def local_losses(method: str, engine: str, size: str) -> None:
    """A method that does not read losses balances the sums of the gradients."""
    model, balancer = model_of("mlp"), build(method)
    losses, rows = jacobian("mlp", size)
    rows = jax.tree.map(lambda g: DEVICES * g, rows)
    expected, state = balance_rows(model, balancer, losses, rows)
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of("mlp"), balancer, labels=model.labels, engine=engine
    )

    def step(p, state, x, y):
        values, grad, state = grad_fn(p, state, x, y)
        return jax.lax.pmean(values, "data"), grad, state

    start = balancer.init(model.params)
    values, grad, new = run("vma", step, "mlp", size, model.params, start)
    check("the losses", values, losses)
    check("the gradient", grad, expected)
    check("the state", numbers(new), numbers(state))


def varying_state() -> None:
    """A method that reads local losses is refused by ``shard_map``, not averaged."""
    model, balancer = model_of("mlp"), build("uncertainty")
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of("mlp"), balancer, labels=model.labels
    )

    def step(p, state, x, y):
        return grad_fn(p, state, x, y)[1:]

    with pytest.raises(ValueError, match="out_specs"):
        run("vma", step, "mlp", "small", model.params, balancer.init(model.params))


def mean_in_loss(name: str, engine: str, size: str) -> None:
    """With ``pmean`` inside the losses every engine has the numbers of one device."""
    model = model_of(name)
    method, how = ENGINES[engine]
    balancer, local = build(method), losses_of(name)
    grad_fn = mtljax.value_and_balanced_grad(
        lambda *args: jax.lax.pmean(local(*args), "data"),
        balancer,
        labels=model.labels,
        engine=how,
    )
    start = balancer.init(model.params)
    found = run("vma", grad_fn, name, size, model.params, start)
    check_step(found, one_device(name, size, method))


def check_step(found: Any, expected: Any) -> None:
    check("the losses", found[0], expected[0])
    check("the gradient", found[1], expected[1])
    check("the state", numbers(found[2]), numbers(expected[2]))


def averaged(region: str, name: str, engine: str, size: str, exchange: str) -> None:
    """``axis_name=`` has the numbers of one device in every kind of region."""
    model = model_of(name)
    method, how = ENGINES[engine]
    balancer = build(method)
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of(name),
        balancer,
        labels=model.labels,
        engine=how,
        axis_name=Mapped("data", exchange),
    )
    start = balancer.init(model.params)
    found = run(region, grad_fn, name, size, model.params, start)
    check_step(found, one_device(name, size, method))


def averaged_rows(region: str, strategy: str) -> None:
    """The stacked gradients themselves, own ones included."""
    model = model_of("mlp")
    losses, rows = jacobian("mlp", "small")
    grad_fn = mtljax.value_and_task_grads(
        losses_of("mlp"), labels=model.labels, strategy=strategy, axis_name="data"
    )
    values, grads = run(region, grad_fn, "mlp", "small", model.params)
    check("the losses", values, losses)
    check("the shared gradients", grads["trunk"], rows["trunk"])
    heads = jax.tree.map(lambda g: g.sum(0), rows["heads"])
    check("the own gradients", grads["heads"], heads)


def gramian_of(rows: Any, others: Any = None) -> np.ndarray:
    """Inner products in float64."""
    first, second = (
        np.concatenate(
            [
                np.asarray(g, np.float64).reshape(TASKS, -1)
                for g in jax.tree.leaves(tree)
            ],
            axis=1,
        )
        for tree in (rows, rows if others is None else others)
    )
    return first @ second.T


def averaged_gramian(region: str, engine: str, size: str) -> None:
    model = model_of("mlp")
    losses, rows = jacobian("mlp", size)
    function = mtljax.task_gramian(
        losses_of("mlp"), labels=model.labels, engine=engine, axis_name="data"
    )
    values, gramian = run(region, function, "mlp", size, model.params)
    check("the losses", values, losses)
    check("the Gramian", gramian, gramian_of(rows["trunk"]))


def averaged_cross(region: str, engine: str) -> None:
    """Two batches: the first, and the same with its targets negated."""
    model, local = model_of("mlp"), losses_of("mlp")
    x, y = model.batches["small"]
    flipped = [-t for t in y]
    rows = jax.jit(jax.jacrev(local))(model.params, x, y)["trunk"]
    others = jax.jit(jax.jacrev(local))(model.params, x, flipped)["trunk"]
    function = cross_task_gramian(
        local, labels=model.labels, engine=engine, axis_name="data"
    )

    def both(p, x, y):
        return function(p, (x, y), (x, [-t for t in y]))

    first, second, cross = run(region, both, "mlp", "small", model.params)
    check("the first losses", first, local(model.params, x, y))
    check("the second losses", second, local(model.params, x, flipped))
    check("the products", cross, gramian_of(rows, others))


def two_axes(engine: str, tracked: bool) -> None:
    """A batch that is split over two axes of the mesh."""
    model = model_of("mlp")
    method, how = ENGINES[engine]
    balancer = build(method)
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of("mlp"),
        balancer,
        labels=model.labels,
        engine=how,
        axis_name=("data", "model"),
    )
    both = P(("data", "model"))
    step = mapped(
        grad_fn,
        jax.make_mesh((4, 2), ("data", "model")),
        (P(), P(), both, both),
        P(),
        check_vma=tracked,
    )
    start = balancer.init(model.params)
    found = step(model.params, start, *model.batches["small"])
    check_step(found, one_device("mlp", "small", method))


def idle_axis(engine: str) -> None:
    """The batch is split over one axis of two; nothing varies over the other."""
    model = model_of("mlp")
    method, how = ENGINES[engine]
    balancer = build(method)
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of("mlp"), balancer, labels=model.labels, engine=how, axis_name="data"
    )
    step = mapped(
        grad_fn,
        jax.make_mesh((4, 2), ("data", "model")),
        (P(), P(), P("data"), P("data")),
        P(),
    )
    start = balancer.init(model.params)
    found = step(model.params, start, *model.batches["small"])
    check_step(found, one_device("mlp", "small", method))


# Methods with weights from losses, from solvers and from learned numbers.
METHODS = ("nash_mtl", "upgrad", "mgda", "famo", "imtl_g", "fairgrad")
METHODS += ("dwa", "igb_v1", "gradnorm", "aligned_mtl", "dualproj")


def explicit_axis(method: str, how: str, tracked: bool) -> None:
    """The batch is split over a mapped axis, and parameters over an Explicit one."""
    if not has_set_mesh():
        raise Skip("a part of a mesh can be mapped in the context of the mesh only")
    model = model_of("mlp")
    balancer = build(method)
    layout = Layout("model", (4, 2), ("data", "model"), (), model="model")
    mesh = make_mesh(layout, "explicit")
    specs = (P(), P(), P("data"), P("data"))

    def grad_fn(*args):
        place = Place(layout, jax.sharding.get_abstract_mesh(), "explicit")
        return mtljax.value_and_balanced_grad(
            model.losses(place),
            balancer,
            labels=model.labels,
            engine=how,
            axis_name="data",
        )(*args)

    place = Place(layout, mesh, "explicit", True)
    with place.context:
        step = jax.shard_map(
            grad_fn,
            mesh=mesh,
            in_specs=specs,
            out_specs=P(),
            check_vma=tracked,
            axis_names={"data"},
        )
        params = place.put(model.params, model.names)
        start = place.replicate(balancer.init(model.params))
        batch = jax.device_put(model.batches["small"], NamedSharding(mesh, P("data")))
        found = jax.jit(step)(params, start, *batch)
    check_step(found, one_device("mlp", "small", method))
    check_placed("the gradient", found[1], place.shardings(model.names))


def weighted_heads(region: str, engine: str, exchange: str) -> None:
    """Own gradients times the task's weight, by the average over devices."""
    model = model_of("mlp")
    balancer = build("cagrad")
    losses, rows = jacobian("mlp", "small")
    update, state = stack_update(balancer, losses, {"trunk": rows["trunk"]})
    heads = jax.tree.map(
        lambda g: jnp.tensordot(state.task_weights, g, 1), rows["heads"]
    )
    grad_fn = mtljax.value_and_balanced_grad(
        losses_of("mlp"),
        balancer,
        labels=model.labels,
        engine=engine,
        heads="weighted",
        axis_name=Mapped("data", exchange),
    )
    start = balancer.init(model.params)
    found = run(region, grad_fn, "mlp", "small", model.params, start)
    check("the shared gradient", found[1]["trunk"], update["trunk"])
    check("the own gradients", found[1]["heads"], heads)


def local_aux(region: str, engine: str) -> None:
    """The auxiliary output is that of the device; the losses are averaged."""
    model, local = model_of("mlp"), losses_of("mlp")
    balancer = build("cagrad")

    def with_aux(p, x, y):
        return local(p, x, y), {"seen": x.sum()}

    grad_fn = mtljax.value_and_balanced_grad(
        with_aux,
        balancer,
        labels=model.labels,
        has_aux=True,
        engine=engine,
        axis_name="data",
    )

    def step(p, state, x, y):
        (losses, aux), grad, state = grad_fn(p, state, x, y)
        return (
            losses,
            grad,
            state,
            jax.lax.psum(aux["seen"], "data"),
            (jax.lax.psum(jnp.abs(aux["seen"] - x.sum()), "data")),
        )

    start = balancer.init(model.params)
    *found, seen, error = run(region, step, "mlp", "small", model.params, start)
    check_step(found, one_device("mlp", "small", "cagrad"))
    check("the sum of aux", seen, model.batches["small"][0].sum(), 1e-4)
    assert float(error) == 0, "aux is not that of the device"


def masks(engine: str) -> np.ndarray:
    """Which task has data on which device; the last task has none anywhere."""
    present = np.ones((DEVICES, TASKS), bool)
    present[::2, 0] = False
    present[:5, 1] = False
    if engine != "grads":  # a trimmed mean needs three rows
        present[:, 2] = False
    return present


def local_masks(region: str, engine: str, exchange: str) -> None:
    """A loss is the mean over the devices that have its task."""
    model, local = model_of("mlp"), losses_of("mlp")
    method, how = ENGINES[engine]
    balancer, present = build(method), masks(engine)
    x, y = model.batches["small"]
    count = x.shape[0] // DEVICES

    def reference(p):
        each = [
            local(
                p,
                x[d * count : (d + 1) * count],
                [t[d * count : (d + 1) * count] for t in y],
            )
            for d in range(DEVICES)
        ]
        weights = present / np.maximum(present.sum(0), 1)
        return (jnp.stack(each) * weights).sum(0)

    anywhere = jnp.asarray(present.any(0))
    losses = reference(model.params)
    rows = jax.jit(jax.jacrev(reference))(model.params)
    update, state = stack_update(
        balancer, losses, {"trunk": rows["trunk"]}, mask=anywhere
    )
    heads = jax.tree.map(lambda g: g.sum(0), rows["heads"])
    grad_fn = mtljax.value_and_balanced_grad(
        local,
        balancer,
        labels=model.labels,
        engine=how,
        axis_name=Mapped("data", exchange),
    )

    def step(p, state, every, x, y):
        mask = every[jax.lax.axis_index("data")]
        values, grad, state = grad_fn(p, state, x, y, mask=mask)
        return jnp.where(every.any(0), values, 0), grad, state

    start = balancer.init(model.params)
    values, grad, new = run(
        region, step, "mlp", "small", model.params, start, jnp.asarray(present)
    )
    check("the losses", values, jnp.where(anywhere, losses, 0))
    check("the shared gradient", grad["trunk"], update["trunk"])
    check("the own gradients", grad["heads"], heads)
    check("the state", numbers(new), numbers(state))


def shards(engine: str, exchange: str) -> None:
    """Parameters in parts (FSDP), gathered inside of the losses.

    Their rows arrive in parts already, so that nothing is left to scatter, and a
    method that reads whole gradients cannot have them.
    """
    model, local = model_of("mlp"), losses_of("mlp")
    method, how = ENGINES[engine]
    balancer = build(method)
    specs = {
        "trunk": [{"w": P("data"), "b": P()}, {"w": P(None, "data"), "b": P()}],
        "heads": [P()] * TASKS,
    }

    def gathered(p, x, y):
        trunk = [
            {**layer, "w": jax.lax.all_gather(layer["w"], "data", axis=i, tiled=True)}
            for i, layer in enumerate(p["trunk"])
        ]
        return local({**p, "trunk": trunk}, x, y)

    grad_fn = mtljax.value_and_balanced_grad(
        gathered,
        balancer,
        labels=model.labels,
        engine=how,
        axis_name=Mapped("data", exchange),
    )
    step = mapped(
        grad_fn, mesh(), (specs, P(), P("data"), P("data")), (P(), specs, P())
    )
    start = balancer.init(model.params)
    if exchange == "scatter" and how in ("stacked", "auto"):  # auto stacks here
        with pytest.raises(ValueError, match="exchange='scatter'"):
            step(model.params, start, *model.batches["small"])
        return
    if engine == "grads":
        with pytest.raises(ValueError, match=method):
            step(model.params, start, *model.batches["small"])
        return
    found = step(model.params, start, *model.batches["small"])
    check_step(found, one_device("mlp", "small", method))


def same_losses(method: str) -> None:
    """Losses that are averaged already need no ``axis_name``, and are told so."""
    model, local, balancer = model_of("mlp"), losses_of("mlp"), build(method)
    grad_fn = mtljax.value_and_balanced_grad(
        lambda *args: jax.lax.pmean(local(*args), "data"), balancer, axis_name="data"
    )
    sentence = "already the same on every device of 'data'"
    with pytest.raises(ValueError, match=sentence):
        run("vma", grad_fn, "mlp", "small", model.params, balancer.init(model.params))


def scatter_refused(method: str, engine: str) -> None:
    """A device that holds a part of the gradients cannot read them all."""
    with pytest.raises(ValueError, match="exchange='scatter'"):
        mtljax.value_and_balanced_grad(
            losses_of("mlp"),
            build(method),
            engine=engine,
            axis_name=Mapped("data", "scatter"),
        )


def uneven(region: str, exchange: str) -> None:
    """Leaves whose sizes eight does not divide, scalars and matrices of one row."""
    rng = np.random.default_rng(4)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {"w": normal(7, 5), "b": normal(5), "s": normal(), "v": normal(5, TASKS)}

    def losses(p, x):
        h = jnp.tanh(x @ p["w"] + p["b"][None]) * p["s"]
        return ((h @ p["v"]) ** 2).mean(0)

    x = normal(16, 7)
    balancer = build("mgda")
    expected = stack_update(balancer, losses(params, x), jax.jacrev(losses)(params, x))
    grad_fn = mtljax.value_and_balanced_grad(
        losses,
        balancer,
        engine="stacked",
        axis_name=Mapped("data", exchange),
    )
    start = balancer.init(params)
    if region == "pmap":
        values = jax.pmap(grad_fn, axis_name="data", in_axes=(None, None, 0))(
            params, start, x.reshape(DEVICES, 2, 7)
        )
        grad = jax.tree.map(lambda g: g[3], values[1])
    else:
        tracked = region == "vma"
        step = mapped(grad_fn, mesh(), (P(), P(), P("data")), P(), check_vma=tracked)
        grad = step(params, start, x)[1]
    check("the gradient", grad, expected[0])


def local_cases():
    """Without ``axis_name``."""
    part = functools.partial
    for strategy, size in itertools.product(STRATEGIES, SIZES):
        deep = size == "large" or strategy in ("auto", "chunked", "unrolled")
        yield Case(f"sums-{strategy}-{size}", part(task_sums, strategy, size), deep)
    methods = [
        ("linear", "losses"),
        ("mgda", "gramian"),
        ("mgda", "stacked"),
        ("cagrad", "auto"),
        ("upgrad", "auto"),
    ]
    for (method, engine), size in itertools.product(methods, SIZES):
        name = f"local-{method}-{engine}-{size}"
        deep = size == "large" or engine == "auto"
        yield Case(name, part(local_losses, method, engine, size), deep)
    yield Case("local-uncertainty-refused", varying_state)
    for name, engine, size in itertools.product(("mlp", "transformer"), ENGINES, SIZES):
        deep = (name, size) != ("mlp", "small") or engine not in ("losses", "gramian")
        case = part(mean_in_loss, name, engine, size)
        yield Case(f"pmean-{name}-{engine}-{size}", case, deep)


def exchanges(engine: str) -> tuple[str, ...]:
    """What ``exchange`` can be for an engine."""
    return ("all",) if engine in ("gramian", "grads") else ("all", "scatter")


# Of `axis_name`, in the normal suite: (region, engine, exchange).
NORMAL = {
    ("vma", "losses", "all"),
    ("vma", "gramian", "all"),
    ("vma", "stacked", "scatter"),
    ("unchecked", "gramian", "all"),
    ("pmap", "stacked", "all"),
    ("pmap", "gramian", "all"),
}


def averaged_cases():
    """The balanced gradient with ``axis_name``."""
    part = functools.partial
    for region, name, engine, size in itertools.product(
        REGIONS, ("mlp", "transformer"), ENGINES, SIZES
    ):
        for exchange in exchanges(engine):
            deep = (region, engine, exchange) not in NORMAL
            deep = deep or (name, size) != ("mlp", "small")
            case = part(averaged, region, name, engine, size, exchange)
            yield Case(f"axis-{region}-{name}-{engine}-{size}-{exchange}", case, deep)
    for region, engine in itertools.product(REGIONS, ENGINES):
        for exchange in exchanges(engine):
            case = part(local_masks, region, engine, exchange)
            normal = (("gramian", "all"), ("stacked", "scatter"), ("losses", "all"))
            deep = region != "vma" or (engine, exchange) not in normal
            yield Case(f"masks-{region}-{engine}-{exchange}", case, deep)
    for region, engine in itertools.product(REGIONS, ("stacked", "gramian")):
        for exchange in exchanges(engine):
            case = part(weighted_heads, region, engine, exchange)
            deep = (region, engine) != ("vma", "gramian")
            yield Case(f"heads-{region}-{engine}-{exchange}", case, deep)
        deep = (region, engine) != ("unchecked", "gramian")
        yield Case(f"aux-{region}-{engine}", part(local_aux, region, engine), deep)
    for engine, pair in ENGINES.items():
        for exchange in exchanges(engine):
            deep = engine != "gramian" and (engine, exchange) != ("stacked", "all")
            case = part(shards, engine, exchange)
            yield Case(f"shards-{engine}-{exchange}", case, deep)
        for tracked in (True, False):
            name = f"two_axes-{engine}-{'vma' if tracked else 'unchecked'}"
            deep = (engine, tracked) != ("gramian", True)
            yield Case(name, part(two_axes, engine, tracked), deep)
        for tracked in (True, False):
            name = f"explicit_axis-{engine}-{'vma' if tracked else 'unchecked'}"
            deep = (engine, tracked) != ("gramian", True)
            case = part(explicit_axis, *pair, tracked)
            yield Case(name, case, deep)
        yield Case(f"idle_axis-{engine}", part(idle_axis, engine), engine != "gramian")


def explicit_methods():
    """Other methods where a mapped and an Explicit axis meet."""
    for method in METHODS:
        case = functools.partial(explicit_axis, method, "auto", True)
        yield Case(f"explicit_axis-method-{method}", case, True)


def other_cases():
    """Other functions with ``axis_name``, odd shapes and mistakes."""
    part = functools.partial
    for region, strategy in itertools.product(REGIONS, STRATEGIES):
        deep = (region, strategy) not in (("vma", "auto"), ("pmap", "map"))
        case = part(averaged_rows, region, strategy)
        yield Case(f"rows-{region}-{strategy}", case, deep)
    engines = ("stacked", "gramian", "auto")
    for region, engine, size in itertools.product(REGIONS, engines, SIZES):
        deep = (region, engine, size) != ("vma", "gramian", "small")
        case = part(averaged_gramian, region, engine, size)
        yield Case(f"task_gramian-{region}-{engine}-{size}", case, deep)
    for region, engine in itertools.product(REGIONS, ("stacked", "gramian")):
        deep = (region, engine) != ("vma", "gramian")
        case = part(averaged_cross, region, engine)
        yield Case(f"cross-{region}-{engine}", case, deep)
    for region, exchange in itertools.product(REGIONS, ("all", "scatter")):
        deep = (region, exchange) != ("vma", "scatter")
        yield Case(f"uneven-{region}-{exchange}", part(uneven, region, exchange), deep)
    for method in ("cagrad", "uncertainty"):
        yield Case(f"same_losses-{method}", part(same_losses, method))
    for method, engine in (("trimmed_mean", "auto"), ("cagrad", "gramian")):
        case = part(scatter_refused, method, engine)
        yield Case(f"scatter_refused-{method}-{engine}", case)


CASES = [*local_cases(), *averaged_cases(), *explicit_methods(), *other_cases()]
