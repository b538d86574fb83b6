"""Gradient functions of the other subpackages on a mesh and in mapped regions."""

import functools
import inspect
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from devices.compare import check, model_of
from devices.harness import Case
from devices.layouts import BY_NAME, Place, make_mesh
from devices.manual import arrays
from devices.manual import run as run_region
from devices.models import TASKS

import mtljax
from mtljax import alternating, forkmerge, sharpness

LABELS = {"trunk": "shared", "heads": "own"}


def sam(place: Place, axis: Any, rho: Any = 0.05, **options: Any) -> Any:
    """Per-task gradients and their flat parts."""
    model = model_of("mlp")
    function = sharpness.sam_task_grads(
        model.losses(place), rho=rho, labels=LABELS, **options, **axis
    )
    return None, lambda params, state, *batch: function(params, *batch)


def flat(place: Place, axis: Any, mode: str) -> Any:
    """The balanced gradient with a perturbation."""
    model = model_of("mlp")
    function = sharpness.value_and_flat_grad(
        model.losses(place),
        mtljax.mgda(TASKS),
        rho=0.05,
        mode=mode,
        labels=LABELS,
        **axis,
    )
    return function.init, function


def alternate(place: Place, axis: Any, **options: Any) -> Any:
    """One batch of independent steps."""
    model = model_of("mlp")
    rule = alternating.alternate(
        # A small eps would amplify the rounding errors of small gradients.
        optax.adam(1e-2, eps=1e-4),
        TASKS,
        labels={"trunk": "shared", "heads": [0, 1, 2]},
        key=jax.random.key(0),
        **options,
        **axis,
    )
    loss = alternating.indexed(lambda p, batch: model.losses(place)(p, *batch))

    def step(params, state, *batch):
        return rule.step(loss, params, state, batch)

    return rule.init, step


def auto_lambda(place: Place, axis: Any) -> Any:
    """The gradient of the validation loss with respect to task weights."""
    model, optimizer = model_of("mlp"), optax.sgd(0.1)
    assert not axis

    def function(params, state, x, y):
        return forkmerge.hypergradient(
            model.losses(place),
            optimizer,
            params,
            state,
            jnp.ones(TASKS),
            train=(x, y),
            validation=(x, [-t for t in y]),
            primary=jnp.array([1.0, 0.0, 0.0]),
        )

    return optimizer.init, function


def arml(place: Place, axis: Any) -> Any:
    """The balancer of auxiliary weights."""
    balancer = forkmerge.arml(TASKS, update_every=1)
    function = mtljax.value_and_balanced_grad(
        model_of("mlp").losses(place), balancer, labels=LABELS, **axis
    )
    return balancer.init, function


def takes_axis_name(function: Any) -> bool:
    """Whether a function can average over a mapped axis."""
    return "axis_name" in inspect.signature(function).parameters


SAM = takes_axis_name(sharpness.sam_task_grads)
FLAT = takes_axis_name(sharpness.value_and_flat_grad)
# The radius of the experiments of FS-MTL. A small one leaves a flat part that is small
# against the two gradients whose difference it is, and so their rounding errors.
JOINT = sharpness.Ball(2.0, adaptive=True, norm="joint")
ALTERNATE = takes_axis_name(alternating.alternate)
# How to build each, and whether it takes `axis_name`.
FUNCTIONS = {
    "sam": (sam, SAM),
    "sam-global": (functools.partial(sam, perturb="global"), SAM),
    "sam-joint": (functools.partial(sam, rho=JOINT), SAM),
    "flat-split": (functools.partial(flat, mode="split"), FLAT),
    "flat-direct": (functools.partial(flat, mode="direct"), FLAT),
    "alternate": (alternate, ALTERNATE),
    "alternate-groups": (functools.partial(alternate, groups=2), ALTERNATE),
    "alternate-fixed": (functools.partial(alternate, order="fixed"), ALTERNATE),
    "hypergradient": (auto_lambda, False),
    "arml": (arml, True),
}


@functools.cache
def one_device(name: str, size: str) -> Any:
    model = model_of("mlp")
    init, function = FUNCTIONS[name][0](Place(), {})
    state = init(model.params) if init else None
    return jax.jit(function)(model.params, state, *model.batches[size])


def on_mesh(name: str, layout: str, kind: str, size: str) -> None:
    model = model_of("mlp")
    place = Place(BY_NAME[layout], make_mesh(BY_NAME[layout], kind), kind)
    init, function = FUNCTIONS[name][0](place, {})
    params = place.put(model.params, model.names)
    batch = place.put(model.batches[size], model.batch_names)
    state = place.replicate(init(model.params)) if init else None
    found = jax.jit(function)(params, state, *batch)
    check(name, arrays(found), arrays(one_device(name, size)))


def in_region(name: str, region: str, size: str) -> None:
    model = model_of("mlp")
    init, function = FUNCTIONS[name][0](Place(), {"axis_name": "data"})
    state = init(model.params) if init else None
    found = run_region(region, function, "mlp", size, model.params, state)
    check(name, arrays(found), arrays(one_device(name, size)))


def cases():
    part = functools.partial
    sizes = ("small", "large")
    normal = ("sam", "flat-split", "alternate", "hypergradient")
    for name, layout, kind, size in itertools.product(
        FUNCTIONS, ("dp8", "fsdp8", "tp42"), ("auto", "explicit"), sizes
    ):
        if layout != "dp8" and kind == "explicit" and name.startswith("alternate"):
            continue  # the states of optimisers would have to be placed by hand
        deep = (layout, kind, size) != ("dp8", "explicit", "small")
        case = part(on_mesh, name, layout, kind, size)
        yield Case(f"{name}-{layout}-{kind}-{size}", case, deep or name not in normal)
    for (name, (_, takes)), region, size in itertools.product(
        FUNCTIONS.items(), ("vma", "unchecked", "pmap"), sizes
    ):
        if takes:
            deep = (region, size) != ("vma", "small") or name not in normal
            case = part(in_region, name, region, size)
            yield Case(f"{name}-{region}-{size}", case, deep)


CASES = list(cases())
