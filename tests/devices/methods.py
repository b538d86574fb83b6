"""Every method's ``update`` on rows that are split over a mesh."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from devices import hlo
from devices.compare import check, check_placed, numbers
from devices.harness import Case
from devices.layouts import BY_NAME, Place, make_mesh
from devices.manual import unkeyed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from registry import CASES as METHODS
from registry import CLASSICS, arguments

import mtljax

TASKS = 4
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LOSSES = np.array([0.7, 1.3, 0.4, 2.1])
# One leaf is split in its columns, one in its rows, one is whole.
SPECS = {"column": P(None, None, "model"), "row": P(None, "model"), "whole": P()}


def rows(dtype: Any, seed: int) -> Any:
    """Stacked gradients of full rank, whose norms differ by factors of about two."""
    rng = np.random.default_rng(seed)
    sizes = {"column": (12, 16), "row": (8, 10), "whole": (6,)}
    norms = np.array([1.0, 0.5, 2.0, 1.4])
    return {
        name: jnp.asarray(
            rng.normal(size=(TASKS, *shape)) * norms.reshape(TASKS, *[1] * len(shape)),
            dtype,
        )
        for name, shape in sizes.items()
    }


def steps(balancer: Any, mask: Any) -> Any:
    """Two steps, so that the second one reads a state that the first has written."""

    def run(state, first, second, losses):
        update, state = balancer.update(first, state, losses=losses, mask=mask)
        again, state = balancer.update(second, state, losses=losses * 0.9, mask=mask)
        return update, again, state

    return jax.jit(run)


def run(method: Any, kind: str, masked: bool, dtype: str) -> None:
    mesh = make_mesh(BY_NAME["tp42"], kind)
    balancer = method.build(TASKS)
    mask = np.array([True, True, False, True]) if masked else None
    grads = [rows(DTYPES[dtype], seed) for seed in (1, 2)]
    losses = jnp.asarray(LOSSES, jnp.float32)
    start = balancer.init(jax.tree.map(lambda g: g[0], grads[0]))
    expected = steps(balancer, mask)(start, *grads, losses)

    places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    everywhere = NamedSharding(mesh, P())
    split = [jax.device_put(tree, places) for tree in grads]
    # A state that is made from split parameters is split like them.
    params = {name: tree[0] for name, tree in split[0].items()}
    start, losses = balancer.init(params), jax.device_put(losses, everywhere)
    compiled = steps(balancer, mask).lower(start, *split, losses).compile()
    *found, state = compiled(start, *split, losses)

    # A bfloat16 result may be rounded the other way; its weights are in float32.
    limit = 1e-5 if dtype == "float32" else 2.0**-7
    for name, got, want in zip(("first", "second"), found, expected, strict=False):
        if method.stable:
            check(f"the {name} update", got, want, limit)
        else:
            assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(got))
    if method.stable and dtype == "float32":
        check("the state", unkeyed(numbers(state)), unkeyed(numbers(expected[-1])))
    if kind == "explicit":
        wanted = {
            name: NamedSharding(mesh, P(*spec[1:])) for name, spec in SPECS.items()
        }
        for update in found:
            check_placed("the update", update, wanted)
    for one in hlo.collectives(compiled.as_text()):
        if one.kind == "all-gather" and method.rotation:
            # A method that reads the Gramian exchanges T x T numbers.
            assert one.size <= 4 * TASKS**2, f"all-gather of {one.shape}"


def numbers_of(method: Any) -> dict[str, float]:
    """The float hyper-parameters of a method, with their values."""
    factory = mtljax.get_method(method.name).factory
    return {
        name: method.options.get(name, default)
        for name, default, _ in arguments(factory)
        if isinstance(method.options.get(name, default), float) and "." not in name
    }


def arrays_outside(method: Any, traced: bool) -> None:
    """A rule that reads arrays on Explicit axes from its closure.

    They are traced hyper-parameters, which are replicated on the mesh, or constants
    that a factory makes in the context of the mesh.
    """
    mesh = make_mesh(BY_NAME["tp42"], "explicit")
    everywhere = NamedSharding(mesh, P())
    grads, losses = rows(jnp.float32, 1), jnp.asarray(LOSSES, jnp.float32)
    balancer = method.build(TASKS)
    start = balancer.init(jax.tree.map(lambda g: g[0], grads))
    expected, _ = jax.jit(balancer.update)(grads, start, losses=losses)

    def build(values):
        return method.build(TASKS, **values)

    def update(values, grads, losses):
        inside = build(values) if traced else outside
        state = inside.init(jax.tree.map(lambda g: g[0], grads))
        return inside.update(grads, state, losses=losses)[0]

    place = Place(BY_NAME["tp42"], mesh, "explicit", True)
    with place.context:
        outside = build({})
        values = numbers_of(method) if traced else {}
        values = jax.device_put(jax.tree.map(jnp.float32, values), everywhere)
        places = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
        losses = jax.device_put(losses, everywhere)
        found = jax.jit(update)(values, jax.device_put(grads, places), losses)
    if method.stable:
        check("the update", found, expected)


# In the normal suite, with Explicit axes: a method of each kind of rule, and those that
# contract or count entries of gradients themselves.
NORMAL = {
    *("mgda", "cagrad", "nash_mtl", "pcgrad", "upgrad", "gradnorm", "db_mtl"),
    *("excess_mtl", "graddrop", "trimmed_mean", "gradvac"),
}


def cases():
    for method, kind, masked, dtype in itertools.product(
        METHODS, ("auto", "explicit"), (False, True), DTYPES
    ):
        if masked and (not method.maskable or method.min_tasks > 3):
            continue
        part = "masked" if masked else "all"
        deep = method.options or kind == "auto" or dtype != "float32"
        deep = deep or method.name not in NORMAL
        deep = deep or masked != (method.maskable and method.name in CLASSICS)
        name = f"{method.id}-{kind}-{part}-{dtype}"
        case = functools.partial(run, method, kind, masked, dtype)
        yield Case(name, case, bool(deep))
    for method in METHODS:
        plain = not method.options
        if numbers_of(method):
            case = functools.partial(arrays_outside, method, True)
            deep = not plain or method.name not in ("cagrad", "imtl_l")
            yield Case(f"{method.id}-traced", case, deep)
        case = functools.partial(arrays_outside, method, False)
        deep = not plain or method.name not in ("uncertainty", "igb_v1")
        yield Case(f"{method.id}-context", case, deep)


CASES = list(cases())
