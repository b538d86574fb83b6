"""Random Gramians, and float64 references that share no idea with the solvers."""

import itertools

import numpy as np
import scipy.optimize

SIZES = [2, 3, 11, 40]


def gramians(tasks, count, *, dim=None, spread=1.0, seed=0):
    """Gramians ``[count, T, T]`` of rows with a common part, as float32 values.

    Lengths spread over ``2 * spread`` decades; the last quarter of the batch is
    scaled by powers of ten from 1e-6 to 1e6.
    """
    rng = np.random.default_rng([seed, tasks])
    dim = tasks + 8 if dim is None else dim
    rows = rng.normal(size=(count, tasks, dim))
    rows += rng.uniform(0, 1, (count, 1, 1)) * rng.normal(size=(count, 1, dim))
    rows *= 10.0 ** rng.uniform(-spread, spread, (count, tasks, 1))
    gram = rows @ rows.swapaxes(1, 2)
    quarter = count // 4
    gram[-quarter:] *= (10.0 ** rng.uniform(-6, 6, quarter))[:, None, None]
    return gram.astype(np.float32)


def nonnegative_qp(quadratic, linear):
    """``½‖Lᵀx + L⁻¹q‖²`` over ``x ≥ 0``, by Lawson and Hanson."""
    factor = np.linalg.cholesky(quadratic)
    return scipy.optimize.nnls(factor.T, -np.linalg.solve(factor, linear))[0]


def min_norm(gramian):
    """The best of the stationary points on every face of the simplex."""
    tasks = len(gramian)
    best, answer = np.inf, None
    for size in range(1, tasks + 1):
        for face in itertools.combinations(range(tasks), size):
            part = gramian[np.ix_(face, face)]
            raw = np.linalg.solve(part, np.ones(size))
            if (raw >= 0).all() and 1 / raw.sum() < best:
                best, answer = 1 / raw.sum(), np.zeros(tasks)
                answer[list(face)] = raw / raw.sum()
    return answer


def ball_value(gramian, center, radius):
    """``min over the simplex of <g_w, g_c> + r ‖g_w‖``, by SLSQP from many starts."""
    tasks = len(gramian)

    def dual(w):
        return w @ gramian @ center + radius * np.sqrt(max(w @ gramian @ w, 0))

    def slope(w):
        length = np.sqrt(max(w @ gramian @ w, 1e-300))
        return gramian @ center + radius * (gramian @ w) / length

    starts = np.vstack([np.full(tasks, 1 / tasks), 0.9 * np.eye(tasks) + 0.1 / tasks])
    results = [
        scipy.optimize.minimize(
            dual,
            start / start.sum(),
            jac=slope,
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        for start in starts
    ]
    return min(r.fun for r in results)
