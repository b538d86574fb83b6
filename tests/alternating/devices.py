"""Run by test_devices in a process with eight devices: batches of alternating steps."""

import functools

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
from eight_devices import P, check_placed, difference, make_mesh, put
from jax.sharding import NamedSharding

import mtljax
from mtljax.alternating import StepOptions, alternate

TASKS, SIZE = 4, 16
LABELS = {"first": "shared", "second": "shared", "heads": "own", "extra": 1}
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "first": normal(8, 16),
    "second": normal(16, 8),
    "heads": normal(TASKS, 8),
    "extra": normal(8),
}
BATCH = normal(SIZE, 8), normal(SIZE, TASKS)
SPECS = {
    "dp": dict.fromkeys(PARAMS, P()),
    "fsdp": {
        "first": P("data"),
        "second": P(None, "data"),
        "heads": P(None, "data"),
        "extra": P("data"),
    },
    "tp": {
        "first": P(None, "model"),
        "second": P("model"),
        "heads": P(),
        "extra": P(),
    },
}


def task_loss(params, task, batch, *, mesh=None, whole=lambda p, row: p):
    """Mean squared error of one task."""

    def dot(a, b, spec):
        place = mesh and NamedSharding(mesh, spec)
        return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), out_sharding=place)

    params = whole(params, True)
    x, y = batch
    columns = "model" if mesh is not None and "model" in mesh.axis_names else None
    h = jnp.tanh(dot(x, params["first"], P("data", columns)))
    h = jnp.tanh(dot(h, params["second"], P("data", None)))
    head = params["heads"] + jnp.where(task == 1, params["extra"], 0)
    out = dot(h, head[:, None], P("data", None))[:, 0]
    known = (jnp.arange(TASKS) == task).astype(y.dtype)
    target = dot(y, known[:, None], P("data", None))[:, 0]
    return jnp.mean((out - target) ** 2)


VARIANTS = {
    "alternating": {},
    "slots, clipped": {"groups": 2, "options": StepOptions(clip_norm=0.5)},
    "per task in groups": {"groups": 2, "state": "per_task"},
    "balancer": {"groups": 1, "balancer": mtljax.imtl_g(TASKS)},
}


def build(variant, **options):
    """Two batches, as a function of the data."""
    loss = options.pop("loss", task_loss)
    steps = alternate(
        optax.adam(0.01),
        TASKS,
        key=KEY,
        labels=LABELS,
        **VARIANTS[variant],
        **options,
    )

    def run(params, state, x, y, mask=None):
        def batch(carry, _):
            found, *carry = steps.step(loss, *carry, (x, y), mask=mask)
            return carry, found

        (params, state), losses = jax.lax.scan(batch, [params, state], None, 2)
        return losses, params, state

    return steps, run


def numbers(found):
    losses, params, state = found
    return losses, params, state.shared, state.rows, state.owned, state.counts


@functools.cache
def expected(variant, masked=False):
    steps, run = build(variant)
    mask = jnp.array([True, True, False, True]) if masked else None
    return numbers(jax.jit(run)(PARAMS, steps.init(PARAMS), *BATCH, mask))


def placed(kind, layout, variant):
    """A whole program on a mesh of Auto or Explicit axes."""
    mesh = make_mesh("tp" if layout == "tp" else "dp", kind)

    def whole(tree, row):
        del row
        if layout != "fsdp":
            return tree
        place = NamedSharding(mesh, P())
        move = jax.lax.with_sharding_constraint
        if kind == "explicit":
            move = jax.sharding.reshard
        return jax.tree.map(lambda w: move(w, place), tree)

    loss = functools.partial(
        task_loss, mesh=mesh if kind == "explicit" else None, whole=whole
    )
    steps, run = build(variant, loss=loss)
    params = put(PARAMS, mesh, SPECS[layout])
    batch = put(BATCH, mesh, P("data"))
    got = jax.jit(run)(params, steps.init(params), *batch)
    if kind == "explicit":
        check_placed(got[1], params)
    return difference(numbers(got), expected(variant))


def gather(tree, row):
    """The whole leaves out of this device's parts; heads are rows."""
    found = {}
    for name, spec in SPECS["fsdp"].items():
        axis = spec.index("data") - (row and name == "heads")
        found[name] = jax.lax.all_gather(tree[name], "data", axis=axis, tiled=True)
    return found


def manual(variant, *, tracked=True, layout="dp", pmean=False, masked=False):
    """The same inside ``jax.shard_map``, on local parts of the batch."""
    mesh = make_mesh("dp", "auto")
    loss = task_loss
    if layout == "fsdp":
        loss = functools.partial(task_loss, whole=gather)
    if pmean:
        local = loss
        loss = lambda *args: jax.lax.pmean(local(*args), "data")
    options = {} if pmean else {"axis_name": "data"}
    steps, run = build(variant, loss=loss, **options)
    mask = jnp.array([True, True, False, True]) if masked else None
    specs, data = SPECS[layout], P("data")
    state = steps.init(PARAMS)
    state_specs = jax.tree_util.tree_map_with_path(
        lambda path, _: state_spec(path, specs), state
    )
    function = jax.shard_map(
        lambda p, s, x, y: run(p, s, x, y, mask),
        mesh=mesh,
        in_specs=(specs, state_specs, data, data),
        out_specs=(P(), specs, state_specs),
        check_vma=tracked,
    )
    got = jax.jit(function)(PARAMS, state, *BATCH)
    return difference(numbers(got), expected(variant, masked))


def state_spec(path, specs):
    """Moments lie as their parameters; those of shared ones are stacked."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
    if not {"mu", "nu"} & set(names):
        return P()
    spec = specs[names[-1]]
    return P(None, *spec) if names[0] == "shared" else spec


CASES = {
    f"{kind} {layout}: {variant}": functools.partial(placed, kind, layout, variant)
    for kind, layout, variant in (
        ("auto", "fsdp", "alternating"),
        ("auto", "tp", "balancer"),
        ("explicit", "dp", "slots, clipped"),
        ("explicit", "fsdp", "alternating"),
        ("explicit", "fsdp", "slots, clipped"),
        ("explicit", "tp", "per task in groups"),
        ("explicit", "tp", "balancer"),
    )
}
CASES |= {
    f"{name}: {variant}": functools.partial(manual, variant, **options)
    for name, variant, options in (
        ("axis_name", "alternating", {}),
        ("axis_name", "per task in groups", {}),
        ("axis_name", "balancer", {}),
        ("axis_name, not tracked", "slots, clipped", {"tracked": False}),
        ("axis_name, split parameters", "slots, clipped", {"layout": "fsdp"}),
        ("axis_name, mask", "alternating", {"masked": True}),
        ("pmean in the loss", "per task in groups", {"pmean": True}),
    )
}

if __name__ == "__main__":
    eight_devices.main(CASES)
