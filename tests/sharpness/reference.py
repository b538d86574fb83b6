"""FS-MTL task by task in float64, from gradients alone; shares no code with mtljax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from gradients.problem import batch, params, task_losses

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

PARAMS, BATCH = params(), batch()


@functools.cache
def _jacobian(function):
    return jax.jit(jax.jacrev(function))


def jacobian64(function, at, *args):
    """Leaves of the Jacobian in float64, as numpy."""
    with enable_x64(True):
        wide = jax.tree.map(
            lambda x: jnp.asarray(np.asarray(x), jnp.float64), (at, args)
        )
        return jax.tree.map(np.asarray, _jacobian(function)(wide[0], *wide[1]))


def norm(leaves):
    return np.sqrt(sum(np.square(x).sum() for x in leaves))


def ascent(gradients, weights, rho, *, adaptive, length=None):
    """ε for a list of leaves, in the ball of all of them together."""
    if adaptive:
        gradients = [np.abs(w) * g for g, w in zip(gradients, weights, strict=True)]
    length = norm(gradients) if length is None else length
    steps = [rho * g / length for g in gradients]
    if adaptive:
        steps = [np.abs(w) * e for e, w in zip(steps, weights, strict=True)]
    return steps


def sam(
    rho,
    rho_own=None,
    *,
    adaptive=False,
    joint=False,
    at=PARAMS,
    data=BATCH,
    function=task_losses,
):
    """Per task: g, h of the trunk and q^SAM of its head."""
    at = jax.tree.map(lambda x: np.asarray(x, np.float64), at)
    rho_own = rho if rho_own is None else rho_own
    first = jacobian64(function, at, data)
    trunk, treedef = jax.tree.flatten(at["trunk"])
    found = []
    for task, head in enumerate(at["heads"]):
        g = [x[task] for x in jax.tree.leaves(first["trunk"])]
        q = [x[task] for x in jax.tree.leaves(first["heads"][task])]
        w, v = trunk, jax.tree.leaves(head)
        length = None
        if joint:
            scale = [np.abs(x) if adaptive else 1.0 for x in w + v]
            length = norm([s * x for s, x in zip(scale, g + q, strict=True)])
        eps = ascent(g, w, rho, adaptive=adaptive, length=length)
        delta = ascent(q, v, rho_own, adaptive=adaptive, length=length)
        moved = {
            "trunk": jax.tree.unflatten(
                treedef, [a + b for a, b in zip(w, eps, strict=True)]
            ),
            "heads": list(at["heads"]),
        }
        moved["heads"][task] = jax.tree.unflatten(
            jax.tree.structure(head), [a + b for a, b in zip(v, delta, strict=True)]
        )
        again = jacobian64(function, moved, data)
        found.append(
            {
                "g": g,
                "h": [
                    x[task] - y
                    for x, y in zip(jax.tree.leaves(again["trunk"]), g, strict=True)
                ],
                "own": [x[task] for x in jax.tree.leaves(again["heads"][task])],
                "eps": eps,
                "delta": delta,
            }
        )
    return found


def close(grads, own, expected, tolerance=1e-4):
    """Compares the library's result; h relative to its own size."""
    for name, tree in (("g", grads.loss), ("h", grads.flat)):
        if tree is None:
            continue
        for i, leaf in enumerate(jax.tree.leaves(tree["trunk"])):
            want = np.stack([task[name][i] for task in expected])
            assert leaf.shape == want.shape
            scale = np.abs(want).max()
            np.testing.assert_allclose(leaf, want, rtol=0, atol=tolerance * scale)
    for head, task in zip(own["heads"], expected, strict=True):
        for leaf, want in zip(jax.tree.leaves(head), task["own"], strict=True):
            np.testing.assert_allclose(leaf, want, rtol=1e-4, atol=1e-5)
