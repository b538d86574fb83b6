"""Batch statistics measured anew."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import forkmerge

X = np.random.default_rng(0).normal(3, 2, (4, 8, 5)).astype(np.float32)


def update(momentum):
    def moved(statistics, x):
        new = {"mean": x.mean(0), "var": x.var(0)}
        return {
            k: momentum * statistics[k] + (1 - momentum) * new[k] for k in statistics
        }

    return moved


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_the_mean_over_batches(momentum):
    stale = {"mean": jnp.full(5, 100.0), "var": jnp.full(5, -1.0)}
    found = forkmerge.recompute_statistics(
        update(momentum), stale, jnp.asarray(X), momentum=momentum
    )
    np.testing.assert_allclose(found["mean"], X.mean(1).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], X.var(1).mean(0), rtol=1e-4)


@pytest.mark.usefixtures("as_users")
def test_errors():
    run = forkmerge.recompute_statistics
    with pytest.raises(ValueError, match=r"momentum=1\.0 must be at least 0"):
        run(update(0.9), {}, jnp.ones((2, 3)), momentum=1.0)
    for batches in ({}, jnp.ones((0, 3))):
        with pytest.raises(ValueError, match="no batch to measure on"):
            run(update(0.9), {}, batches, momentum=0.9)
