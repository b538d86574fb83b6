"""Forks, merges and rounds of ForkMerge with sharded parameters."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from devices.compare import check, check_placed, model_of
from devices.harness import Case
from devices.hlo import collectives
from devices.layouts import BY_NAME, Place, make_mesh
from devices.loops import several, stacked_names
from devices.models import TASKS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtljax import forkmerge

BRANCHES = 5  # no other axis of a model or mesh has this length
INTERVAL = 2
NU = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [1, 0.5, 2]], jnp.float32)
LAMBDA = jnp.array([0.1, 0.2, 0.0, 0.3, 0.4], jnp.float32)
OPTIMIZER = optax.sgd(0.01, momentum=0.9)
POLICIES = {"opt_state": "keep"}
METHODS = {"greedy": "greedy", "random": forkmerge.Search("random", num_samples=3)}


def place_of(layout: str, kind: str) -> Place:
    return Place(BY_NAME[layout], make_mesh(BY_NAME[layout], kind), kind, True)


def start(place: Place) -> dict[str, Any]:
    """Parameters, momentum and a counter, with the momentum where parameters are."""
    model = model_of("mlp")
    params = place.put(model.params, model.names)
    state = OPTIMIZER.init(params)
    if place.mesh is not None:
        check_placed("the momentum", state[0].trace, place.shardings(model.names))
    return {"params": params, "opt_state": state, "count": jnp.int32(0)}


def branched(place: Place) -> dict[str, Any]:
    """Branches that differ."""
    scale = 1 + jnp.arange(BRANCHES) / BRANCHES

    def differ(leaf):
        if leaf.dtype == jnp.int32:
            return leaf
        return leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree.map(differ, forkmerge.fork(start(place), BRANCHES))


def check_state(what: str, state: Any, place: Place, *, branches: bool) -> None:
    """Raises if parameters or momentum are not sharded like the parameters."""
    shardings = place.shardings(model_of("mlp").names)
    if branches:
        add = lambda s: NamedSharding(s.mesh, P(None, *s.spec))
        shardings = jax.tree.map(add, shardings)
    check_placed(f"{what}, parameters", state["params"], shardings)
    check_placed(f"{what}, momentum", state["opt_state"][0].trace, shardings)


def forked(layout: str, kind: str) -> None:
    """A fork has the shardings of the state, in ``jit`` and outside."""
    place = place_of(layout, kind)
    expected = forkmerge.fork(start(Place()), BRANCHES)
    state = start(place)
    make = functools.partial(forkmerge.fork, num_branches=BRANCHES)
    for function in (make, jax.jit(make)):
        found = function(state)
        check("the branches", found, expected)
        check_state("fork", found, place, branches=True)


def merged(layout: str, kind: str) -> None:
    """A mean of branches and the next fork need no communication."""
    place = place_of(layout, kind)

    def both(branches):
        found = forkmerge.merge(branches, LAMBDA, policies=POLICIES)
        again = forkmerge.refork(branches, found, policies=POLICIES)
        return found, again, forkmerge.take_branches(branches, (3, 0))

    branches = branched(place)
    expected = both(branched(Place()))
    compiled = jax.jit(both).lower(branches).compile()
    for function in (both, compiled):
        found = function(branches)
        check("the merge", found, expected)
        check_state("merge", found[0], place, branches=False)
        check_state("refork", found[1], place, branches=True)
        check_state("take_branches", found[2], place, branches=True)
    assert not collectives(compiled.as_text()), collectives(compiled.as_text())


def make_driver(place: Place, method: str, strategy: Any) -> Any:
    model = model_of("mlp")
    task_losses = model.losses(place)

    def step(state, weights, batch):
        def objective(params):
            losses = task_losses(params, *batch)
            return forkmerge.weighted_sum(losses, weights), losses

        grad, losses = jax.grad(objective, has_aux=True)(state["params"])
        updates, opt_state = OPTIMIZER.update(grad, state["opt_state"])
        params = optax.apply_updates(state["params"], updates)
        count = state["count"] + 1
        new = {"params": params, "opt_state": opt_state, "count": count}
        return new, {"losses": losses}

    return forkmerge.ForkMerge(
        step,
        lambda state, batch: -task_losses(state["params"], *batch)[0],
        NU,
        interval=INTERVAL,
        training=forkmerge.BranchTraining(strategy=strategy),
        method=METHODS[method],
        policies=POLICIES,
        merge_source="best_in_round" if method == "random" else "last",
    )


batches_of_run = functools.cache(several)


def run(place: Place, method: str, strategy: str) -> Any:
    """Two rounds: the driver, its state and the validation set."""
    model = model_of("mlp")
    driver = make_driver(place, method, strategy)
    batches = place.put(batches_of_run(), stacked_names(model.batch_names))
    take = lambda at, n: jax.tree.map(lambda x: x[at : at + n], batches)
    validation = place.put(model.batches["small"], model.batch_names)
    state = driver.init(start(place), key=jax.random.key(0))
    state = driver.run(state, take, 2 * INTERVAL, validation=validation)
    return driver, state, validation, take(0, INTERVAL)


@functools.cache
def one_device(method: str) -> Any:
    return run(Place(), method, "map")[1]


def rounds(layout: str, kind: str, method: str, strategy: str) -> None:
    """Two rounds give the numbers of one device, and keep all shardings."""
    place = place_of(layout, kind)
    expected = one_device(method)  # first: the model may not be made in a context
    with place.context:
        driver, state, validation, batches = run(place, method, strategy)
        programs = []
        if strategy == "map":  # batched products need the parameters of all branches
            programs = [
                jax.jit(driver._merge).lower(state, validation, None),
                jax.jit(driver._train).lower(state, batches, None),
            ]
    for name in ("branches", "merged"):
        found, wanted = getattr(state, name), getattr(expected, name)
        check(f"{name}, parameters", found["params"], wanted["params"])
        # A gradient is a difference of predictions and targets, which cancel.
        check(f"{name}, momentum", found["opt_state"], wanted["opt_state"], 1e-4)
    check("the score", state.merged_score, expected.merged_score)
    check("the merge weights", state.info.weights, expected.info.weights)
    check_state("the branches", state.branches, place, branches=True)
    check_state("the merged model", state.merged, place, branches=False)
    for program in programs:
        found = collectives(program.compile().as_text())
        moved = [c for c in found if c.kind != "all-reduce"]
        stacked = [c for c in moved if c.shape[:1] == (BRANCHES,)]
        assert not stacked, f"stacked branches are communicated: {stacked}"


def cases():
    part = functools.partial
    for key in itertools.product(("fsdp8", "tp42"), ("auto", "explicit")):
        name = "-".join(key)
        yield Case(f"fork-{name}", part(forked, *key))
        yield Case(f"merge-{name}", part(merged, *key))
        for method, strategy in (("greedy", "map"), ("random", "vmap")):
            case = part(rounds, *key, method, strategy)
            yield Case(f"round-{name}-{method}-{strategy}", case)


CASES = list(cases())
assert NU.shape == (BRANCHES, TASKS)
