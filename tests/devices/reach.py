"""Set-ups beyond one batch for all tasks, on meshes and in mapped regions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from devices.harness import Case
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtljax

TASKS, EXAMPLES, WIDTH = 4, 32, 16
NAMES = ("a", "b", "c", "d")
LABELS = {"trunk": "shared", "heads": "own"}
SLICES = {"trunk": None, "heads": 0}


def data():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    trunk = [normal(WIDTH, WIDTH), normal(WIDTH, WIDTH)]
    params = {"trunk": trunk, "heads": normal(WIDTH, TASKS)}
    slices = {"trunk": trunk, "heads": normal(TASKS, WIDTH)}
    batch = normal(EXAMPLES, WIDTH), normal(EXAMPLES, TASKS)
    own = normal(TASKS, EXAMPLES, WIDTH), normal(TASKS, EXAMPLES)
    return params, batch, slices, own


def encode(p, x, y=None):
    for w in p["trunk"]:
        x = jnp.tanh(x @ w)
    return x


def heads(p, z, x, y):
    return ((z @ p["heads"] - y) ** 2).mean(0)


def task_losses(p, x, y):
    return heads(p, encode(p, x), x, y)


def one(p, x, y):
    return ((encode(p, x) @ p["heads"] - y) ** 2).mean()


def named(p, x, y):
    return dict(zip(NAMES, task_losses(p, x, y), strict=True))


# name -> (losses, balancer, options, whether tasks have batches of their own)
STEPS = {
    "separate": (mtljax.separate(one, (SLICES, 0, 0)), mtljax.cagrad, {}, True),
    "representation": (
        mtljax.through(encode, heads),
        mtljax.cagrad,
        {"labels": LABELS, "measure": "representation"},
        False,
    ),
    "subset": (
        task_losses,
        mtljax.cagrad,
        {"labels": LABELS, "measure": "trunk/1"},
        False,
    ),
    "micro": (
        task_losses,
        mtljax.cagrad,
        {"labels": LABELS, "micro_batches": 2},
        False,
    ),
    # A micro-batch has fewer examples than there are devices.
    "micro-few": (
        task_losses,
        mtljax.cagrad,
        {"labels": LABELS, "micro_batches": 8},
        False,
    ),
    "micro-representation": (
        mtljax.through(encode, heads),
        mtljax.cagrad,
        {"labels": LABELS, "measure": "representation", "micro_batches": 2},
        False,
    ),
    "reuse": (
        task_losses,
        lambda tasks: mtljax.reuse(mtljax.cagrad(tasks), every=2),
        {"labels": LABELS},
        False,
    ),
    "frozen": (
        task_losses,
        mtljax.cagrad,
        {"labels": {"trunk": ["frozen", "shared"], "heads": "own"}},
        False,
    ),
    "names": (named, lambda _: mtljax.cagrad(NAMES), {"labels": LABELS}, False),
}


def two_steps(name, **more):
    """Losses and gradients of two steps, the second with a masked task."""
    losses, method, options, separate = STEPS[name]
    balancer = method(TASKS)
    grad_fn = mtljax.value_and_balanced_grad(losses, balancer, **options, **more)
    mask = jnp.array([True, True, False, True])

    def step(params, *batch):
        state = balancer.init(params)
        first, grad, state = grad_fn(params, state, *batch)
        second, again, _ = grad_fn(params, state, *batch, mask=mask)
        return first, grad, second, again

    return step, separate


def expected(name):
    params, batch, slices, own = data()
    step, separate = two_steps(name)
    args = (slices, *own) if separate else (params, *batch)
    return args, jax.jit(step)(*args)


def compare(found, wanted):
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        difference = np.abs(np.asarray(got) - np.asarray(want)).max()
        error = difference / max(np.abs(np.asarray(want)).max(), 1e-30)
        assert error < 1e-5, f"relative error {error:.1e}"


def on_mesh(name, kind):
    args, wanted = expected(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    step, separate = two_steps(name)
    rows = PartitionSpec(None, "data") if separate else PartitionSpec("data")
    params = jax.device_put(args[0], NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(args[1:], NamedSharding(mesh, rows))
    compare(jax.jit(step)(params, *batch), wanted)


def tasks_over_devices(kind):
    args, wanted = expected("separate")
    mesh = jax.make_mesh((4,), ("task",), axis_types=(kind,))
    step, _ = two_steps("separate")
    spec = {"trunk": PartitionSpec(), "heads": PartitionSpec("task")}
    params = {
        key: jax.device_put(value, NamedSharding(mesh, spec[key]))
        for key, value in args[0].items()
    }
    batch = jax.device_put(args[1:], NamedSharding(mesh, PartitionSpec("task")))
    compare(jax.jit(step)(params, *batch), wanted)


def in_region(name, tracked):
    args, wanted = expected(name)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step, separate = two_steps(name, axis_name="data")
    rows = PartitionSpec(None, "data") if separate else PartitionSpec("data")
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=PartitionSpec(),
        check_vma=tracked,
    )
    compare(jax.jit(mapped)(*args), wanted)


def cases():
    for kind in (AxisType.Auto, AxisType.Explicit):
        word = kind.name.lower()
        for name in STEPS:
            run = functools.partial(on_mesh, name, kind)
            yield Case(f"{name}-{word}", run)
        yield Case(f"tasks-{word}", functools.partial(tasks_over_devices, kind))
    for tracked in (True, False):
        word = "vma" if tracked else "unchecked"
        for name in STEPS:
            if name == "micro-few":
                continue  # a device has no example for some micro-batches
            yield Case(f"{name}-{word}", functools.partial(in_region, name, tracked))


CASES = list(cases())
