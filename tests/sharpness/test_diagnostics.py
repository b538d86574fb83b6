"""Conflicts from Gramians, and sharpness, against loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients.problem import LABELS, task_losses
from sharpness import reference
from sharpness.reference import BATCH, PARAMS

from mtljax.sharpness import (
    SamGrads,
    flat_conflicts,
    flat_gramians,
    surrogate_sharpness,
)

RNG = np.random.default_rng(0)
G, H = RNG.normal(size=(2, 4, 6))
GRADS = SamGrads(
    *({"a": jnp.asarray(x[:, :2]), "b": jnp.asarray(x[:, 2:])} for x in (G, H))
)


def test_gramians():
    for got, want in zip(
        flat_gramians(GRADS), (G @ G.T, H @ H.T, G @ H.T), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [0, 2, 3], [1], []])
def test_conflicts_are_counted(present):
    def rate(matrix):
        pairs = [(i, j) for i in present for j in present if i < j]
        return np.mean([matrix[p] < 0 for p in pairs]) if pairs else 0

    mask = jnp.isin(jnp.arange(4), jnp.array(present, int))
    found = flat_conflicts(flat_gramians(GRADS), mask)
    np.testing.assert_allclose(found.inter_loss, rate(G @ G.T), rtol=1e-6)
    np.testing.assert_allclose(found.inter_flat, rate(H @ H.T), rtol=1e-6)
    inside = [G[i] @ H[i] < 0 for i in present]
    np.testing.assert_allclose(found.intra, np.mean(inside or [0]), rtol=1e-6)
    for got, rows in ((found.loss_norms, G), (found.flat_norms, H)):
        want = np.where(mask, np.linalg.norm(rows, axis=1), 0)
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_all_tasks_by_default():
    found = flat_conflicts(flat_gramians(GRADS))
    expected = flat_conflicts(flat_gramians(GRADS), jnp.ones(4, bool))
    chex.assert_trees_all_equal(found, expected)


def test_gramians_need_the_flat_part():
    with pytest.raises(ValueError, match="no flat part; call sam_task_grads with"):
        flat_gramians(SamGrads(GRADS.loss, None))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        pytest.param("unrolled", {}, marks=pytest.mark.deep),
        pytest.param("vmap", {"norm": "joint"}, marks=pytest.mark.deep),
        (2, {"adaptive": True}),
    ],
)
def test_surrogate_sharpness(strategy, options):
    radii = [0.0, 0.05, 0.5]
    function = surrogate_sharpness(
        task_losses, radii, labels=LABELS, strategy=strategy, **options
    )
    mask = jnp.array([True, True, False])
    losses, gaps = jax.jit(function)(PARAMS, BATCH, mask=mask)
    np.testing.assert_allclose(losses, task_losses(PARAMS, BATCH), rtol=1e-5)
    assert gaps.shape == (3, 3)
    assert (gaps[0] == 0).all()
    assert (gaps[:, 2] == 0).all()
    theirs = {"adaptive": options.get("adaptive", False), "joint": "norm" in options}
    for r, rho in enumerate(radii):
        if not rho:
            continue
        for task, found in enumerate(reference.sam(rho, **theirs)[:2]):
            kernel = PARAMS["heads"][task]["kernel"] + found["delta"][0]
            heads = list(PARAMS["heads"])
            heads[task] = {"kernel": jnp.asarray(kernel, jnp.float32)}
            bias, weights = (
                jnp.asarray(PARAMS["trunk"][k] + e, jnp.float32)
                for k, e in zip(("bias", "kernel"), found["eps"], strict=True)
            )
            there = {"trunk": {"bias": bias, "kernel": weights}, "heads": heads}
            rise = task_losses(there, BATCH)[task] - losses[task]
            np.testing.assert_allclose(gaps[r, task], rise, rtol=2e-3, atol=1e-5)
            assert rise > 0


@pytest.mark.usefixtures("as_users")
def test_radii_are_checked():
    with pytest.raises(ValueError, match="radii is empty"):
        surrogate_sharpness(task_losses, [])
    with pytest.raises(ValueError, match="a radius must be a finite number >= 0"):
        surrogate_sharpness(task_losses, [0.1, -0.1])
