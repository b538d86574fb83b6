"""The projection on the cone where no task gets worse."""

import jax
import jax.numpy as jnp
import numpy as np
from solvers import problems

from mtljax.solvers._cone import project_cone


def test_against_nnls():
    gramians = problems.gramians(5, 40)
    weights = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    got, status = jax.jit(jax.vmap(project_cone))(gramians, weights)
    assert status.converged.all()
    for gramian, w, v in zip(*map(np.float64, (gramians, weights, got)), strict=True):
        root = np.sqrt(np.diagonal(gramian))
        unit = gramian / root[:, None] / root[None, :]
        expected = w * root + problems.nonnegative_qp(unit, unit @ (w * root))
        size = np.abs(expected).max()
        np.testing.assert_allclose(v * root / size, expected / size, atol=1e-4)


def test_masked_tasks_do_not_constrain():
    gramian = jnp.array([[18.0, -22.0], [-22.0, 38.0]])
    mask = jnp.array([True, False])
    weights, _ = project_cone(gramian, jnp.array([-1.0, 0.0]), mask)
    np.testing.assert_allclose(weights, [0, 0], atol=1e-6)
