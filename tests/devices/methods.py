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
from devices.layouts import BY_NAME, make_mesh
from devices.manual import unkeyed
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from registry import CASES as METHODS
from registry import CLASSICS

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


CASES = list(cases())
