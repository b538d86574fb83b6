"""Named gradient matrices [T, d]: every shape of trouble, small and deterministic."""

import numpy as np

J2 = np.array([[-4.0, 1, 1], [6, 1, 1]])
J3 = np.array([[2.0, -1, 0, 1], [-1, 3, 1, 0], [0, 1, -2, 4]])
LOSSES3 = np.array([0.5, 2.0, 1.0])


def _normal(tasks, dim, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.normal(size=(tasks, dim))
    return rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, dim))


def _stationary(tasks, dim, seed=1):
    """Rows whose average with positive weights is zero."""
    rows = _normal(tasks - 1, dim, seed=seed)
    weights = np.random.default_rng(seed).uniform(0.5, 2, tasks - 1)
    return np.vstack([rows, -(weights @ rows)])


ZOO = {
    "J3": J3,
    "zero": np.zeros((3, 4)),
    "one zero row": np.vstack([J3[:2], np.zeros((1, 4))]),
    "two zero rows": np.vstack([J3[:1], np.zeros((2, 4))]),
    "duplicate": np.vstack([J3[:1], J3[:1], J3[1:2]]),
    "all equal": np.repeat(J3[:1], 3, 0),
    "opposed": np.vstack([J3[0], -J3[0], J3[1]]),
    "opposed pair of unequal length": np.vstack([J3[0], -100 * J3[0], J3[1]]),
    "rank one, one sign": np.outer([1.0, 2, 3], J3[0]),
    "rank one, mixed signs": np.outer([1.0, -2, 3], J3[0]),
    "orthogonal": np.eye(3, 4),
    "stationary": _stationary(3, 4),
    "weakly stationary": np.vstack([J3[0], -2 * J3[0], np.abs(J3[0])]),
    "more tasks than parameters": _normal(3, 2),
    "one parameter": np.array([[1.0], [-2.0], [0.5]]),
    "tiny": 1e-15 * J3,
    "huge": 1e15 * J3,
    "six decades": J3 * np.array([[1e-3], [1.0], [1e3]]),
    "twelve decades": J3 * np.array([[1e-6], [1.0], [1e6]]),
    "nearly parallel": np.repeat(J3[:1], 3, 0) + 1e-4 * _normal(3, 4),
    "nearly opposed": np.vstack([J3[0], -J3[0] + 1e-4, J3[1]]),
}
