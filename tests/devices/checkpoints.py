"""Checkpoints of Orbax that are restored on another mesh than they were saved on.

A run on eight devices with FSDP parameters is saved after three steps. The restored
run takes three more steps elsewhere, and must equal the run that was not interrupted.
All numbers are float64, so that the order of sums does not count.
"""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from devices.compare import check, model_of
from devices.harness import Case, Skip
from devices.layouts import BY_NAME, Place, make_mesh
from devices.manual import arrays
from devices.models import TASKS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtljax
from mtljax import alternating, sharpness

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

STEPS = 3
LIMIT = 1e-6
LABELS = {"trunk": "shared", "heads": "own"}


def optimizer() -> Any:
    # A small eps would amplify the rounding errors of small gradients.
    return optax.adam(1e-2, eps=1e-4)


def joint(build: Callable[[], Any], gradient: Any = None) -> Any:
    """``(init, step)`` of a balanced gradient and Adam."""

    def make(place):
        balancer, adam = build(), optimizer()
        losses = model_of("mlp").losses(place)
        if gradient is None:
            function = mtljax.value_and_balanced_grad(losses, balancer, labels=LABELS)

            def start(params):
                return balancer.init(mtljax.shared_params(params, LABELS))
        else:
            function = gradient(losses, balancer)
            start = function.init

        def init(params):
            return params, start(params), adam.init(params)

        def step(state, batch):
            params, of_balancer, of_adam = state
            _, grad, of_balancer = function(params, of_balancer, *batch)
            updates, of_adam = adam.update(grad, of_adam, params)
            return optax.apply_updates(params, updates), of_balancer, of_adam

        return init, step

    return make


def method(name: str, **options: Any) -> Any:
    """A registered method; random ones draw from a key in their state."""
    entry = mtljax.get_method(name)
    return lambda: entry.build(TASKS, key=jax.random.key(0), **options)


def alternate(place: Place) -> Any:
    """Independent steps in a random order."""
    rule = alternating.alternate(
        optimizer(),
        TASKS,
        labels={"trunk": "shared", "heads": [0, 1, 2]},
        key=jax.random.key(0),
    )
    losses = model_of("mlp").losses(place)
    loss = alternating.indexed(lambda p, batch: losses(p, *batch))

    def init(params):
        return params, rule.init(params)

    def step(state, batch):
        return rule.step(loss, *state, batch)[1:]

    return init, step


def flat(losses: Any, balancer: Any) -> Any:
    return sharpness.value_and_flat_grad(losses, balancer, rho=0.05, labels=LABELS)


RUNS: dict[str, Any] = {
    **{
        name: joint(method(name))
        for name in (
            *("pcgrad", "famo", "igb_v1", "nash_mtl", "db_mtl", "moco", "gradvac"),
            *("dwa", "gradnorm", "uncertainty", "random_loss_weighting"),
        )
    },
    "reuse": joint(lambda: mtljax.reuse(mtljax.cagrad(TASKS), every=2)),
    "smooth_weights": joint(lambda: mtljax.smooth_weights(mtljax.upgrad(TASKS))),
    "per_layer": joint(lambda: mtljax.per_layer(mtljax.nash_mtl(TASKS))),
    "sharpness": joint(method("famo"), flat),
    "alternate": alternate,
}
PLACES = {
    "one": (None, "auto"),
    "tp42-auto": ("tp42", "auto"),
    "two42-auto": ("two42", "auto"),
    "fsdp8-explicit": ("fsdp8", "explicit"),
    "two42-explicit": ("two42", "explicit"),
}


def place_of(layout: str | None, kind: str) -> Place:
    if layout is None:
        return Place()
    return Place(BY_NAME[layout], make_mesh(BY_NAME[layout], kind), kind)


def on_the_mesh(state: Any, mesh: Any) -> Any:
    """Replicates the arrays that are not on the mesh yet, as the documentation says."""
    everywhere = NamedSharding(mesh, P())

    def leaf(x):
        placed = isinstance(x.sharding, NamedSharding)
        return x if placed else jax.device_put(x, everywhere)

    return jax.tree.map(leaf, state)


class Run:
    """One of ``RUNS`` on one of ``PLACES``."""

    def __init__(self, name: str, place: Place):
        model = model_of("mlp")
        wide = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
        init, step = RUNS[name](place)
        self.step = jax.jit(step)
        self.batch = place.put(wide(model.batches["small"]), model.batch_names)
        state = init(place.put(wide(model.params), model.names))
        self.start = on_the_mesh(state, place.mesh) if place.mesh else state

    def train(self, state: Any) -> Any:
        for _ in range(STEPS):
            state = self.step(state, self.batch)
        return state


def manager(directory: pathlib.Path) -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise Skip("orbax is not installed") from None
    return ocp.CheckpointManager(directory), ocp.args


@functools.cache
def saved(name: str) -> Any:
    """The directory of the checkpoint, and the parameters of the whole run."""
    directory = pathlib.Path(tempfile.mkdtemp())
    run = Run(name, place_of("fsdp8", "auto"))
    checkpoints, args = manager(directory)
    state = run.train(run.start)
    with checkpoints:
        checkpoints.save(STEPS, args=args.StandardSave(state))
        checkpoints.wait_until_finished()
    return directory, run.train(state)


def restored(name: str, where: str) -> None:
    with enable_x64(True):
        directory, expected = saved(name)
        run = Run(name, place_of(*PLACES[where]))
        checkpoints, args = manager(directory)
        with checkpoints:
            state = checkpoints.restore(STEPS, args=args.StandardRestore(run.start))
        for got, wanted in zip(
            jax.tree.leaves(state), jax.tree.leaves(run.start), strict=True
        ):
            assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)
        found = run.train(state)
        check("the state", arrays(found), arrays(expected), LIMIT)


# Methods that are restored everywhere; the others on one mesh of each kind.
EVERYWHERE = ("pcgrad", "famo", "moco")


def cases():
    for name, where in itertools.product(RUNS, PLACES):
        if name not in EVERYWHERE and where not in ("tp42-auto", "two42-explicit"):
            continue
        yield Case(f"{name}-{where}", functools.partial(restored, name, where), True)


CASES = list(cases())
