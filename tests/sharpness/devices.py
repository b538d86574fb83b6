"""Run by test_devices in a process with eight devices: every step of sharpness."""

import functools

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
from eight_devices import P, check_placed, difference, make_mesh, put
from jax.sharding import NamedSharding

import mtljax
from mtljax.gradients import Mapped
from mtljax.sharpness import (
    Ball,
    SamSchedule,
    merge_own,
    sam_task_grads,
    surrogate_sharpness,
    value_and_flat_grad,
)

TASKS, SIZE = 3, 16
LABELS = {"trunk": "shared", "heads": "own"}
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "trunk": {"first": normal(8, 16), "bias": normal(16), "second": normal(16, 8)},
    "heads": [normal(8) for _ in range(TASKS)],
}
BATCH = normal(SIZE, 8), normal(SIZE, TASKS)
SPECS = {
    "dp": {"trunk": P(), "heads": P()},
    "fsdp": {
        "trunk": {"first": P("data"), "bias": P("data"), "second": P(None, "data")},
        "heads": P("data"),
    },
    "tp": {
        "trunk": {"first": P(None, "model"), "bias": P("model"), "second": P("model")},
        "heads": P(),
    },
}


def task_losses(params, x, y, *, mesh=None, whole=lambda p: p):
    """Mean squared errors; products say where they lie if the axes are Explicit."""

    def dot(a, b, spec):
        place = mesh and NamedSharding(mesh, spec)
        return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), out_sharding=place)

    trunk, heads = whole(params["trunk"]), whole(params["heads"])
    columns = "model" if mesh is not None and "model" in mesh.axis_names else None
    h = dot(x, trunk["first"], P("data", columns)) + trunk["bias"][None]
    h = jnp.tanh(dot(jnp.tanh(h), trunk["second"], P("data", None)))
    outputs = [dot(h, head[:, None], P("data", None))[:, 0] for head in heads]
    return jnp.stack(
        [jnp.mean((out - y[:, i]) ** 2) + 0.1 for i, out in enumerate(outputs)]
    )


def sam(losses, **options):
    """Losses and all gradients of the two passes, as a function of the data."""
    options = {"rho": Ball(0.2, 0.3), "labels": LABELS, **options}

    def run(params, x, y, mask=None):
        function = sam_task_grads(losses, **options)
        return function(params, x, y, mask=mask, sam_key=KEY)

    return run


def flat(losses, **options):
    """The balanced gradient, after two steps."""
    options = {"rho": 0.2, "labels": LABELS, **options}
    function = value_and_flat_grad(losses, mtljax.imtl_g(TASKS), **options)

    def run(params, x, y, mask=None):
        def step(state, _):
            found, grad, state = function(params, state, x, y, mask=mask)
            return state, (found, grad)

        state, found = jax.lax.scan(step, function.init(params), None, 2)
        return found, state.balancer.loss.task_weights, state.step

    return run


def surrogate(losses, **options):
    """Rises of the losses."""
    function = surrogate_sharpness(losses, [0.1, 0.4], labels=LABELS, **options)

    def run(params, x, y, mask=None):
        return function(params, x, y, mask=mask)

    return run


VARIANTS = {
    "local": (sam, {"strategy": "map"}),
    "local, vmap": (sam, {"strategy": "vmap"}),
    "chunks, adaptive": (sam, {"rho": Ball(0.4, adaptive=True), "strategy": 2}),
    "joint": (sam, {"rho": Ball(0.3, norm="joint"), "strategy": "unrolled"}),
    "global": (sam, {"perturb": "global"}),
    "samo": (sam, {"perturb": "samo", "strategy": "map"}),
    "flat": (flat, {"schedule": SamSchedule(2, 1)}),
    "flat, gramians": (flat, {"gramians": True, "strategy": "map"}),
    "surrogate": (surrogate, {"strategy": "map"}),
}


@functools.cache
def expected(variant, masked=False):
    make, options = VARIANTS[variant]
    mask = jnp.array([True, False, True]) if masked else None
    return jax.jit(make(task_losses, **options))(PARAMS, *BATCH, mask)


def placed(kind, layout, variant, context=False):
    """A whole program on a mesh of Auto or Explicit axes."""
    make, options = VARIANTS[variant]
    mesh = make_mesh("tp" if layout == "tp" else "dp", kind)
    explicit = mesh if kind == "explicit" else None

    def whole(tree):
        if layout != "fsdp":
            return tree
        place = NamedSharding(mesh, P())
        move = jax.lax.with_sharding_constraint
        if kind == "explicit":
            move = jax.sharding.reshard
        return jax.tree.map(lambda w: move(w, place), tree)

    losses = functools.partial(task_losses, mesh=explicit, whole=whole)
    params = put(PARAMS, mesh, SPECS[layout])
    batch = put(BATCH, mesh, P("data"))
    if make is sam and kind == "auto":
        places = jax.tree.map(lambda w: w.sharding, params)
        options = {**options, "grad_shardings": places}

    def run():
        return jax.jit(make(losses, **options))(params, *batch)

    if context:
        with jax.set_mesh(mesh):
            got = run()
    else:
        got = run()
    if make is sam:
        first = jax.tree.map(lambda g: g[0], got[1].loss)
        check_placed(merge_own(first, got[2]), params)
    return difference(got, expected(variant))


def manual(variant, *, tracked=True, fsdp=False, masks=None, form="axis_name"):
    """The same inside ``jax.shard_map``, on local parts of the batch."""
    make, options = VARIANTS[variant]
    mesh = make_mesh("dp", "auto")
    losses, factor = task_losses, 1
    if fsdp:
        losses = functools.partial(task_losses, whole=gather)
    if form == "axis_name":
        options = {**options, "axis_name": "data"}
    elif form == "mapped":
        options = {**options, "axis_name": Mapped(("data",))}
    elif form == "pmean":
        losses = lambda *args: jax.lax.pmean(task_losses(*args), "data")
    else:  # sums over the devices, as in jax.jacrev: eight times the mean
        factor = 8
    specs = SPECS["fsdp" if fsdp else "dp"]
    out = P()
    if make is sam:
        loss_spec = P("data") if form == "local" else P()
        rows = jax.tree.map(
            lambda s: P(None, *s), specs["trunk"], is_leaf=lambda s: isinstance(s, P)
        )
        hole = PARTS[1]
        rows = {"trunk": rows, "heads": hole["heads"]}
        own = {"trunk": PARTS[2]["trunk"], "heads": specs["heads"]}
        out = (loss_spec, mtljax.sharpness.SamGrads(rows, rows), own)
    step = make(losses, **options)
    masked = masks is not None
    args = (PARAMS, *BATCH) + ((masks,) if masked else ())

    def run(params, x, y, *mask):
        return step(params, x, y, *(m[0] for m in mask))

    places = (specs, P("data"), P("data")) + ((P("data"),) if masked else ())
    function = jax.shard_map(
        run, mesh=mesh, in_specs=places, out_specs=out, check_vma=tracked
    )
    got = jax.jit(function)(*args)
    want = expected(variant, masked)
    if masked:  # the loss of an absent task is 0 in a region
        want = (jnp.where(masks[0], want[0], 0), *want[1:])
    if form == "local":
        losses = got[0].reshape(8, TASKS).mean(0)
        grads = jax.tree.map(lambda g: g / factor, got[1:])
        got = (losses, *grads)
    return difference(got, want)


def gather(tree):
    """The whole leaves out of this device's parts."""
    specs = SPECS["fsdp"]["trunk"] if isinstance(tree, dict) else P("data")

    def leaf(spec, part):
        axis = spec.index("data")
        return jax.lax.all_gather(part, "data", axis=axis, tiled=True)

    if isinstance(tree, dict):
        return {name: leaf(specs[name], tree[name]) for name in tree}
    return [leaf(specs, part) for part in tree]


HOLE = mtljax.shared_params(PARAMS, LABELS)["heads"]
PARTS = (
    None,
    {"heads": HOLE},
    {"trunk": jax.tree.map(lambda _: HOLE[0], PARAMS["trunk"])},
)

# Every device lacks the second task, four of them the third as well.
MASKS = jnp.stack([jnp.array([True, False, i % 2 == 0]) for i in range(8)])


def split_masks():
    """Tasks that are present on some of the devices: means over those."""
    even = [i for i in range(SIZE) if (i // 2) % 2 == 0]
    found = {}
    for task, rows in ((0, range(SIZE)), (2, even)):
        batch = jax.tree.map(lambda a, r=tuple(rows): a[jnp.array(r)], BATCH)
        found[task] = jax.jit(sam(task_losses, strategy="map"))(PARAMS, *batch)
    mesh = make_mesh("dp", "auto")
    step = sam(task_losses, strategy="map", axis_name="data")
    function = jax.shard_map(
        lambda p, x, y, m: step(p, x, y, m[0]),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P("data")),
        out_specs=P(),
    )
    losses, grads, own = jax.jit(function)(PARAMS, *BATCH, MASKS)
    worst = 0.0
    for task, (want_losses, want, want_own) in found.items():
        got = losses[task], jax.tree.map(lambda g, t=task: g[t], grads)
        picked = want_losses[task], jax.tree.map(lambda g, t=task: g[t], want)
        worst = max(worst, difference(got, picked))
        worst = max(worst, difference(own["heads"][task], want_own["heads"][task]))
    assert all(not np.any(leaf[1]) for leaf in jax.tree.leaves(grads))
    assert not np.any(own["heads"][1])
    return worst


CASES = {
    f"{kind} {layout}: {variant}": functools.partial(placed, kind, layout, variant)
    for kind, layout, variant in (
        ("auto", "dp", "joint"),
        ("auto", "fsdp", "chunks, adaptive"),
        ("explicit", "dp", "global"),
        ("explicit", "fsdp", "flat"),
        ("explicit", "tp", "flat, gramians"),
        ("explicit", "tp", "local, vmap"),
        ("explicit", "tp", "samo"),
        ("explicit", "tp", "surrogate"),
    )
}
CASES["explicit tp, set_mesh: joint"] = functools.partial(
    placed, "explicit", "tp", "joint", context=True
)
CASES |= {
    f"{name}: {variant}": functools.partial(manual, variant, **options)
    for name, variant, options in (
        ("axis_name", "local, vmap", {}),
        ("axis_name", "joint", {}),
        ("axis_name", "samo", {}),
        ("axis_name", "flat", {}),
        ("axis_name", "surrogate", {}),
        ("axis_name, not tracked", "chunks, adaptive", {"tracked": False}),
        ("axis_name, not tracked", "flat", {"tracked": False}),
        ("axis_name, split parameters", "chunks, adaptive", {"fsdp": True}),
        ("Mapped", "global", {"form": "mapped"}),
        ("pmean in the loss", "local", {"form": "pmean"}),
        ("local losses", "local, vmap", {"form": "local"}),
        ("local losses", "global", {"form": "local"}),
    )
}
CASES["axis_name, mask: local"] = functools.partial(
    manual, "local", masks=jnp.tile(jnp.array([[True, False, True]]), (8, 1))
)
CASES["axis_name, masks that differ"] = split_masks

if __name__ == "__main__":
    eight_devices.main(CASES)
