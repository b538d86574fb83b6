"""The gradients of one device by ``jax.jacrev``, and comparison with them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from devices.layouts import Place
from devices.models import MODELS, TASKS, Model

import mtljax

LIMIT = 1e-5  # relative to the largest entry of a leaf, in float32


def difference(got: Any, expected: Any) -> float:
    """The largest difference of two trees, relative to the largest entry of a leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected), (
        f"structures differ: {jax.tree.structure(got)}, {jax.tree.structure(expected)}"
    )
    worst = 0.0
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for pair in pairs:
        have, want = (np.asarray(leaf, np.float64) for leaf in pair)
        assert have.shape == want.shape, f"shapes {have.shape}, {want.shape}"
        assert np.isfinite(have).all(), "a value is not finite"
        largest = np.abs(want).max(initial=0) + 1e-30
        worst = max(worst, float(np.abs(have - want).max(initial=0) / largest))
    return worst


def check(what: str, got: Any, expected: Any, limit: float = LIMIT) -> None:
    """Raises if a tree differs from the expected one."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(expected)
    ]
    assert jax.tree.structure(got) == jax.tree.structure(expected), (
        f"{what}: {jax.tree.structure(got)} instead of {jax.tree.structure(expected)}"
    )
    pairs = zip(paths, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for path, have, want in pairs:
        error = difference([have], [want])
        assert error <= limit, f"{what} {path!r} is off by {error:.2g} (relative)"


def stack_update(balancer: Any, losses: Any, rows: Any, mask: Any = None) -> Any:
    """The update of stacked gradients, without any engine."""
    state = balancer.init(jax.tree.map(lambda g: g[0], rows))
    return balancer.update(rows, state, losses=losses, mask=mask)


def balance_rows(model: Model, balancer: Any, losses: Any, rows: Any) -> Any:
    """One gradient from the Jacobian of all parameters; own ones get the sum."""
    if model.labels is None:
        return stack_update(balancer, losses, rows)
    shared = {"trunk": rows["trunk"]}
    update, state = stack_update(balancer, losses, shared)
    heads = jax.tree.map(lambda g: g.sum(0), rows["heads"])
    return {**update, "heads": heads}, state


def numbers(state: Any) -> dict[str, Any]:
    """The fields of a state; residuals of solvers are roundings, and left out."""
    return {name: x for name, x in state._asdict().items() if name != "solver"}


@functools.cache
def model_of(name: str) -> Model:
    """A model, made once."""
    return MODELS[name]()


@functools.cache
def jacobian(name: str, size: str) -> Any:
    """Losses and the stacked gradients of one device, by ``jax.jacrev``."""
    model = model_of(name)
    losses, batch = model.losses(Place()), model.batches[size]
    return jax.jit(lambda p: (losses(p, *batch), jax.jacrev(losses)(p, *batch)))(
        model.params
    )


@functools.cache
def one_device(name: str, size: str, method: str) -> Any:
    """``(losses, gradient, state)`` on one device."""
    model = model_of(name)
    losses, rows = jacobian(name, size)
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))
    update, state = jax.jit(
        lambda losses, rows: balance_rows(model, balancer, losses, rows)
    )(losses, rows)
    return losses, update, state


def check_placed(what: str, got: Any, shardings: Any) -> None:
    """Raises if an array of a tree does not lie where the sharding says."""
    paths = jax.tree_util.tree_leaves_with_path(got)
    wanted = jax.tree.leaves(shardings)
    assert len(paths) == len(wanted), f"{what}: {len(paths)} leaves, {len(wanted)}"
    for (path, leaf), want in zip(paths, wanted, strict=True):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        assert leaf.sharding.is_equivalent_to(want, jnp.ndim(leaf)), (
            f"{what} {where!r} lies as {leaf.sharding}, not {want}"
        )
