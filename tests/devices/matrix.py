"""Layouts x kinds of axes x engines x models x batch sizes, against one device."""

import functools
import itertools

import jax
from devices import hlo
from devices.compare import check, check_placed, model_of, numbers, one_device
from devices.harness import Case, Skip
from devices.layouts import BY_NAME, Place, has_set_mesh, make_mesh
from devices.models import MODELS, TASKS

import mtljax

# The method and the engine; the last four leave the choice to the library.
ENGINES = {
    "losses": ("uncertainty", "losses"),
    "gramian": ("cagrad", "gramian"),
    "stacked": ("cagrad", "stacked"),
    "cagrad": ("cagrad", "auto"),
    "mgda": ("mgda", "auto"),
    "upgrad": ("upgrad", "auto"),
}


@functools.cache
def placed(layout: str, kind: str, context: str) -> Place:
    """A layout on its mesh; with a context mesh the model constrains its values."""
    if context == "set" and not has_set_mesh():
        raise Skip("this version of JAX has no jax.set_mesh")
    found = BY_NAME[layout]
    return Place(found, make_mesh(found, kind), kind, constrain=context == "set")


@functools.cache
def arguments(layout: str, kind: str, context: str, name: str, size: str):
    """Parameters and a batch, where the layout puts them."""
    place, model = placed(layout, kind, context), model_of(name)
    params = place.put(model.params, model.names)
    return params, place.put(model.batches[size], model.batch_names)


@functools.cache
def traced_grad(layout: str, kind: str, context: str, name: str, size: str):
    """What ``jax.grad`` returns in this layout, traced only; Skip if it cannot."""
    place, model = placed(layout, kind, context), model_of(name)
    params, batch = arguments(layout, kind, context, name, size)
    losses = model.losses(place)
    with place.context:
        try:
            return jax.eval_shape(jax.grad(lambda p: losses(p, *batch).sum()), params)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise Skip(f"jax.grad does not trace this: {text}") from None


def run(key):
    *where, name, size, engine = key
    layout, kind, context = where
    grads = traced_grad(layout, kind, context, name, size)
    place, model = placed(layout, kind, context), model_of(name)
    params, batch = arguments(layout, kind, context, name, size)
    method, how = ENGINES[engine]
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    wanted = place.shardings(model.names)
    options = {}
    if kind == "explicit":
        for leaf, want in zip(
            jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True
        ):
            assert leaf.sharding.spec == want.spec, f"jax.grad returns {leaf}"
    else:
        options["grad_shardings"] = wanted
    grad_fn = mtljax.value_and_balanced_grad(
        model.losses(place), balancer, labels=model.labels, engine=how, **options
    )
    with place.context:
        state = place.replicate(balancer.init(params))
        step = jax.jit(grad_fn).lower(params, state, *batch).compile()
        losses, grad, state = step(params, state, *batch)
    expected = one_device(name, size, method)
    check("losses", losses, expected[0])
    check("the gradient", grad, expected[1])
    check("the state", numbers(state), numbers(expected[2]))
    check_placed("the gradient", grad, wanted)
    check_gathers(step.as_text(), model)


def check_gathers(text, model):
    """No device collects the T gradients of a matrix."""
    shared = model.params if model.labels is None else model.params["trunk"]
    rows = {
        tuple(sorted((TASKS, *leaf.shape)))
        for leaf in jax.tree.leaves(shared)
        if leaf.ndim > 1
    }
    for one in hlo.collectives(text):
        if one.kind == "all-gather":
            shape = tuple(sorted(n for n in one.shape if n != 1))
            assert shape not in rows, f"all-gather of T gradients: {one.shape}"


# Every layout, kind of axes and engine occurs in the normal suite, with each model
# and both sizes of batches; all combinations run in deep.
NORMAL = {
    ("dp8", "explicit", "none", "mlp", "small", "gramian"),
    ("dp8", "explicit", "set", "mlp", "small", "upgrad"),
    ("dp8", "auto", "none", "mlp", "small", "gramian"),
    ("dp8", "auto", "set", "transformer", "small", "cagrad"),
    ("dp8", "explicit", "none", "convolution", "small", "mgda"),
    ("fsdp8", "explicit", "none", "mlp", "small", "gramian"),
    ("fsdp8", "explicit", "set", "mlp", "large", "stacked"),
    ("fsdp8", "auto", "set", "mlp", "large", "gramian"),
    ("fsdp8", "auto", "none", "convolution", "large", "stacked"),
    ("tp42", "explicit", "none", "mlp", "small", "gramian"),
    ("tp42", "explicit", "set", "mlp", "large", "losses"),
    ("tp42", "auto", "none", "mlp", "large", "stacked"),
    ("tp42", "explicit", "none", "transformer", "small", "stacked"),
    ("two42", "auto", "set", "mlp", "small", "mgda"),
    ("two42", "explicit", "set", "transformer", "large", "upgrad"),
    ("two42", "explicit", "none", "mlp", "large", "cagrad"),
    ("three222", "auto", "set", "transformer", "large", "losses"),
    ("three222", "explicit", "none", "mlp", "small", "gramian"),
}


def cases():
    for key in itertools.product(
        BY_NAME,
        ("auto", "explicit"),
        ("none", "set"),
        MODELS,
        ("small", "large"),
        ENGINES,
    ):
        yield Case("-".join(key), functools.partial(run, key), deep=key not in NORMAL)


CASES = list(cases())
