"""A trunk and three heads, and the same gradients by ``jax.jacrev``."""

import jax
import jax.numpy as jnp
import numpy as np

TASKS = 3
LABELS = {"trunk": "shared", "heads": "own"}


def params(seed=0, tasks=TASKS):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "trunk": {"kernel": normal(4, 6), "bias": normal(6)},
        "heads": [{"kernel": normal(6)} for _ in range(tasks)],
    }


def batch(seed=1, tasks=TASKS, size=8):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, 4)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(tasks, size)), jnp.float32)


def hidden(params, x):
    return jnp.tanh(x @ params["trunk"]["kernel"] + params["trunk"]["bias"][None])


def task_losses(params, batch):
    x, targets = batch
    h = hidden(params, x)
    losses = [
        jnp.mean((h @ head["kernel"] - y) ** 2) + 0.1
        for head, y in zip(params["heads"], targets, strict=True)
    ]
    return jnp.stack(losses)


jacobian = jax.jit(jax.jacrev(task_losses))


@jax.jit
def own_gradient(params, batch, weights=None):
    """Of every head, the gradient of its own loss (times a weight)."""
    weights = jnp.ones(len(params["heads"])) if weights is None else weights

    def total(heads):
        losses = task_losses({**params, "heads": heads}, batch)
        return sum(w * loss for w, loss in zip(weights, losses, strict=True))

    return jax.grad(total)(params["heads"])


def close(got, expected, rtol=1e-5):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)

    def compare(path, have, want):
        have, want = np.asarray(have), np.asarray(want)
        assert have.shape == want.shape, path
        atol = rtol * np.abs(want).max(initial=0) + 1e-30
        np.testing.assert_allclose(have, want, rtol=0, atol=atol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, got, expected)
