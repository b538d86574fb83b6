"""Training steps on a mesh: donated buffers, a scan of steps, seeds over devices."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from devices.compare import check, check_placed, model_of, numbers
from devices.harness import DEVICES, Case, Skip
from devices.layouts import BY_NAME, Place, make_mesh
from devices.models import TASKS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtljax

ENGINES = {
    "losses": ("uncertainty", "losses"),
    "gramian": ("cagrad", "gramian"),
    "stacked": ("cagrad", "stacked"),
    "nash": ("nash_mtl", "auto"),
}
STEPS = 4
RATE = 0.05


def make_step(place: Place, engine: str) -> tuple[Any, Any]:
    """A balancer and ``step((params, state), batch) -> (carry, losses)``."""
    model = model_of("mlp")
    method, how = ENGINES[engine]
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    options = {}
    if place.mesh is not None and place.kind == "auto":
        options["grad_shardings"] = place.shardings(model.names)
    grad_fn = mtljax.value_and_balanced_grad(
        model.losses(place), balancer, labels=model.labels, engine=how, **options
    )

    def step(carry, batch):
        params, state = carry
        losses, grad, state = grad_fn(params, state, *batch)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grad)
        return (params, state), losses

    return balancer, step


def several() -> Any:
    """A batch for every step."""
    x, y = model_of("mlp").batches["small"]
    shifts = jnp.arange(STEPS) / STEPS
    many = x[None] + shifts[:, None, None]
    return many, [t[None] * (1 + shifts[:, None]) for t in y]


def stacked_names(names: Any) -> Any:
    """Names of axes with a leading one that is whole."""
    return jax.tree.map(
        lambda axes: (None, *axes),
        names,
        is_leaf=lambda x: isinstance(x, tuple) and x[0] == "batch",
    )


@functools.cache
def one_device(engine: str) -> Any:
    """Parameters, state and losses after all steps."""
    balancer, step = make_step(Place(), engine)
    params = model_of("mlp").params
    carry = (params, balancer.init(params))
    return jax.jit(lambda c, b: jax.lax.scan(step, c, b))(carry, several())


def place_of(layout: str, kind: str) -> Place:
    return Place(BY_NAME[layout], make_mesh(BY_NAME[layout], kind), kind, True)


def scanned(layout: str, kind: str, engine: str) -> None:
    """``lax.scan`` of steps keeps shardings, and the numbers."""
    place, model = place_of(layout, kind), model_of("mlp")
    balancer, step = make_step(place, engine)
    with place.context:
        params = place.put(model.params, model.names)
        carry = (params, place.replicate(balancer.init(params)))
        batches = place.put(several(), stacked_names(model.batch_names))
        run = jax.jit(lambda c, b: jax.lax.scan(step, c, b))
        (params, state), losses = run(carry, batches)
    (expected, expected_state), expected_losses = one_device(engine)
    check("the losses", losses, expected_losses, 1e-4)
    check("the parameters", params, expected, 1e-4)
    check("the state", numbers(state), numbers(expected_state), 1e-4)
    if kind == "explicit":
        check_placed("the parameters", params, place.shardings(model.names))


def donated(layout: str, kind: str, engine: str) -> None:
    """Parameters and state may be donated in every step."""
    place, model = place_of(layout, kind), model_of("mlp")
    balancer, step = make_step(place, engine)
    wanted = place.shardings(model.names)
    batches = several()
    with place.context:
        params = jax.tree.map(jnp.copy, place.put(model.params, model.names))
        state = jax.tree.map(jnp.copy, place.replicate(balancer.init(params)))
        everywhere = NamedSharding(place.mesh, P())
        out = ((wanted, everywhere), everywhere)
        run = jax.jit(step, donate_argnums=0, out_shardings=out)
        for i in range(STEPS):
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            batch = place.put(batch, model.batch_names)
            before = params
            (params, state), _ = run((params, state), batch)
    for leaf in jax.tree.leaves(before):
        assert leaf.is_deleted(), "a donated parameter was kept"
    (expected, expected_state), _ = one_device(engine)
    check("the parameters", params, expected, 1e-4)
    check("the state", numbers(state), numbers(expected_state), 1e-4)


@functools.cache
def loops_over_explicit_axes() -> bool:
    """Whether JAX can ``vmap`` a ``while_loop`` over an Explicit axis at all."""
    mesh = make_mesh(BY_NAME["dp8"], "explicit")
    many = jax.device_put(jnp.arange(8.0) + 1, NamedSharding(mesh, P("data")))

    def double(x):
        return jax.lax.while_loop(lambda y: y < 10 * x, lambda y: 2 * y, x)

    try:
        jax.eval_shape(jax.vmap(double), many)
    except ValueError:
        return False
    return True


def seeds(kind: str, engine: str) -> None:
    """``vmap`` over seeds, one on each device, is a loop over them."""
    model = model_of("mlp")
    solves = engine != "losses"
    if kind == "explicit" and solves and not loops_over_explicit_axes():
        raise Skip("jax.vmap of a while_loop over an Explicit axis fails")
    place = place_of("dp8", kind)  # vmap of a loop needs the mesh as the context
    balancer, step = make_step(Place(), engine)
    scale = 1 + jnp.arange(DEVICES) / DEVICES
    params = jax.tree.map(
        lambda p: p[None] * scale.reshape(-1, *[1] * p.ndim), model.params
    )
    state = jax.vmap(balancer.init)(params)
    batch = model.batches["small"]
    expected = [
        jax.jit(step)(jax.tree.map(lambda x, i=i: x[i], (params, state)), batch)
        for i in range(DEVICES)
    ]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    over = NamedSharding(place.mesh, P("data"))
    carry = jax.device_put((params, state), over)
    with place.context:
        run = jax.jit(jax.vmap(step, (0, None)))
        (params, state), losses = run(carry, place.replicate(batch))
    check("the losses", losses, expected[1])
    check("the parameters", params, expected[0][0])
    check("the state", numbers(state), numbers(expected[0][1]))
    for leaf in jax.tree.leaves(params):
        assert leaf.sharding.is_equivalent_to(over, leaf.ndim), leaf.sharding


def cases():
    part = functools.partial
    layouts = ("dp8", "fsdp8", "tp42", "two42", "three222")
    kinds = ("auto", "explicit")
    normal = {
        ("dp8", "explicit", "gramian"),
        ("fsdp8", "auto", "stacked"),
        ("tp42", "explicit", "losses"),
    }
    for key in itertools.product(layouts, kinds, ENGINES):
        name = "-".join(key)
        yield Case(f"scan-{name}", part(scanned, *key), key not in normal)
        deep = key not in (("fsdp8", "explicit", "nash"), ("tp42", "auto", "gramian"))
        yield Case(f"donate-{name}", part(donated, *key), deep)
    for kind, engine in itertools.product(kinds, ENGINES):
        deep = engine not in ("gramian", "losses")
        yield Case(f"seeds-{kind}-{engine}", part(seeds, kind, engine), deep)


CASES = list(cases())
