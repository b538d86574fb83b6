"""Time of one solve for task weights, compared with other libraries.

``python -m benchmarks.solvers`` (some minutes on two CPU cores, with the extra
``bench``) takes random Gramians of T = 3, 11, 40 and 128 tasks. The measurements are
interleaved so that drift affects all equally:

- Ours, jitted: one call with its dispatch, one problem after the other inside one
  program by ``lax.map``, and per problem in a batch by ``vmap``. The time by
  ``lax.map`` is closer to the cost of a solve in a compiled training step.
- TorchJD's weightings of a Gramian, with their defaults.
- The solvers of reference codes: ECOS through CVXPY for Nash-MTL (successive programs,
  at most 20, in TorchJD's copy of the reference), SLSQP of SciPy for CAGrad,
  ``least_squares`` for FairGrad, and quadprog for the QPs of UPGrad and DualProj.

The error measures the quality of the solution. For quadratic programs it is the
distance of the update from a float64 solution by another algorithm (non-negative least
squares on the gradients), relative to the size of the gradients. For Nash-MTL and
FairGrad it is the largest residual of the equations ``w_i^(1/α) (Gw)_i = 1``. For
CAGrad it is the relative difference of the worst task's gain to the best of all
solutions.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from mtljax.methods._cagrad import cagrad_weights
from mtljax.methods._dualproj import dualproj_weights
from mtljax.methods._upgrad import upgrad_weights
from mtljax.solvers import min_norm_point, solve_bargaining

OUT = pathlib.Path(__file__).parent / "results" / "solvers.json"
TASKS = (3, 11, 40, 128)
BATCH = {3: 256, 11: 256, 40: 64, 128: 16}
C = 0.5
PATIENCE = 10.0  # maximum seconds of one solver for one T, twice
BATCHED = ("mtljax, lax.map", "mtljax, vmap")


def jacobians(tasks: int, count: int) -> np.ndarray:
    """Returns rows of unequal norm with a common part and full rank."""
    rng = np.random.default_rng(tasks)
    dim = 2 * tasks + 8
    rows = rng.normal(size=(count, tasks, dim)) + 0.3 * rng.normal(size=(count, 1, dim))
    return rows * 10 ** rng.uniform(-0.5, 0.5, (count, tasks, 1))


# --- references and errors ----------------------------------------------------------


def _cone(matrix: np.ndarray, center: np.ndarray) -> np.ndarray:
    slack, _ = scipy.optimize.nnls(matrix.T, -matrix.T @ center, maxiter=100_000)
    return matrix.T @ (center + slack)


def exact_update(method: str, matrix: np.ndarray) -> np.ndarray:
    """Computes the update in float64 by non-negative least squares on the gradients."""
    tasks = len(matrix)
    shares = np.eye(tasks) / tasks
    if method == "UPGrad":
        return sum((_cone(matrix, share) for share in shares), np.zeros(len(matrix.T)))
    if method == "DualProj":
        return _cone(matrix, shares.sum(0))
    stacked = np.vstack([matrix.T / np.linalg.norm(matrix), np.ones(tasks)])
    x, _ = scipy.optimize.nnls(stacked, np.eye(len(stacked))[-1], maxiter=100_000)
    return matrix.T @ (x / x.sum())


def error_of(method: str, matrix: np.ndarray, weights: np.ndarray, best: Any) -> float:
    """Computes the error of the module docstring. ``best`` is the reference."""
    gramian = matrix @ matrix.T
    if method in ("Nash-MTL", "FairGrad"):
        power = 1.0 if method == "Nash-MTL" else 0.5
        return float(np.abs(weights**power * (gramian @ weights) - 1).max())
    if method == "CAGrad":
        scale = np.linalg.norm(matrix) * np.linalg.norm(matrix.mean(0))
        return float((best - worst_gain(matrix, weights)) / scale)
    return float(np.linalg.norm(matrix.T @ weights - best) / np.linalg.norm(matrix))


def worst_gain(matrix: np.ndarray, weights: np.ndarray) -> float:
    """Computes min_i <g_i, d> after projecting the update into CAGrad's ball."""
    mean = matrix.mean(0)
    step = matrix.T @ weights - mean
    radius = C * np.linalg.norm(mean)
    step *= min(1.0, radius / max(np.linalg.norm(step), 1e-300))
    return float((matrix @ (mean + step)).min())


# --- what reference codes call ------------------------------------------------------


def slsqp_cagrad(gramian: np.ndarray) -> np.ndarray:
    """Solves the dual problem over the simplex, as the authors do."""
    tasks = len(gramian)
    mean = np.full(tasks, 1 / tasks)
    radius = C * np.sqrt(mean @ gramian @ mean + 1e-8)

    def objective(w):
        return w @ gramian @ mean + radius * np.sqrt(w @ gramian @ w + 1e-8)

    found = scipy.optimize.minimize(
        objective,
        mean,
        bounds=[(0, 1)] * tasks,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum()},
    ).x
    return mean + radius * found / np.sqrt(found @ gramian @ found + 1e-8)


def least_squares_fairgrad(gramian: np.ndarray) -> np.ndarray:
    """Solves the equations by bounded least squares, as the authors do."""
    start = np.full(len(gramian), 1 / len(gramian))

    def equations(w):
        return gramian @ w - (1 / w) ** 0.5

    bounds = (1e-12, np.inf)
    return scipy.optimize.least_squares(equations, start, bounds=bounds).x


def quadprog_cones(gramian: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Sums argmin_{v >= center} vᵀGv over the centers, with the required ridge."""
    import quadprog

    trace = np.trace(gramian)
    ridged = gramian / trace + 1e-7 * np.eye(len(gramian))
    eye, zero = np.eye(len(gramian)), np.zeros(len(gramian))
    return sum(
        (quadprog.solve_qp(ridged, zero, eye, center)[0] for center in centers),
        np.zeros(len(gramian)),
    )


class Solver(NamedTuple):
    """A way to solve one problem of a method."""

    method: str
    label: str
    solve: Callable[[Any], Any]
    reads: str  # its input: "gramian", "tensor" or "jacobian"


def theirs(tasks: int) -> list[Solver]:
    """Returns the solvers of other libraries."""
    import torch
    from torchjd import aggregation as peer

    shares = np.eye(tasks) / tasks
    nash = peer.NashMTL(tasks, max_norm=0.0)

    def ecos(matrix):
        nash.reset()
        return nash(torch.tensor(matrix)).numpy()

    torchjd = {
        "UPGrad": peer.UPGradWeighting(),
        "DualProj": peer.DualProjWeighting(),
        "MGDA": peer.MGDAWeighting(),
        "CAGrad": peer.CAGradWeighting(C),
        "FairGrad": peer.FairGradWeighting(2.0),
    }
    return [
        *(Solver(name, "TorchJD", f, "tensor") for name, f in torchjd.items()),
        Solver("Nash-MTL", "ECOS (CVXPY)", ecos, "jacobian"),
        Solver("CAGrad", "SLSQP (SciPy)", slsqp_cagrad, "gramian"),
        Solver("FairGrad", "least squares (SciPy)", least_squares_fairgrad, "gramian"),
        Solver("UPGrad", "quadprog", lambda g: quadprog_cones(g, shares), "gramian"),
        Solver(
            "DualProj",
            "quadprog",
            lambda g: quadprog_cones(g, shares.sum(0)[None]),
            "gramian",
        ),
    ]


def ours(tasks: int) -> dict[str, Callable[[Any], Any]]:
    """Returns a function from a Gramian to weights for each method."""
    mean = jnp.full(tasks, 1 / tasks)
    return {
        "UPGrad": lambda g: upgrad_weights(g, mean)[0],
        "DualProj": lambda g: dualproj_weights(g, mean)[0],
        "MGDA": lambda g: min_norm_point(g)[0],
        "CAGrad": lambda g: cagrad_weights(g, C)[0],
        "Nash-MTL": lambda g: solve_bargaining(g)[0],
        "FairGrad": functools.partial(lambda g, a: solve_bargaining(g, a)[0], a=2.0),
    }


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> dict[str, float]:
    """Returns median and quartiles in milliseconds."""
    low, middle, high = np.percentile(np.array(times) * 1e3, [25, 50, 75])
    return {"median_ms": middle, "low_ms": low, "high_ms": high, "calls": len(times)}


Calls = dict[tuple[str, str], Callable[[int], Any]]


def make_calls(matrices: np.ndarray, gramians: np.ndarray) -> Calls:
    """Returns ``call(i)`` for each method and solver, on one problem or on all."""
    import torch

    tasks = matrices.shape[1]
    single = [jnp.asarray(g, jnp.float32) for g in gramians[:8]]
    batch = jnp.asarray(gramians, jnp.float32)
    inputs = {
        "gramian": list(gramians[:8]),
        "tensor": [torch.tensor(g) for g in gramians[:8]],
        "jacobian": list(matrices[:8]),
    }
    calls: Calls = {}
    for method, weigh in ours(tasks).items():
        alone = jax.jit(weigh)
        serial = jax.jit(functools.partial(jax.lax.map, weigh))
        many = jax.jit(jax.vmap(weigh))

        def one(i, alone=alone):
            return jax.block_until_ready(alone(single[i]))

        calls[method, "mtljax"] = one
        for label, program in zip(BATCHED, (serial, many), strict=True):

            def all_of_them(_, program=program):
                return jax.block_until_ready(program(batch))

            calls[method, label] = all_of_them
    for solver in theirs(tasks):

        def other(i, solver=solver):
            return solver.solve(inputs[solver.reads][i])

        calls[solver.method, solver.label] = other
    return calls


def answers_of(call: Callable[[int], Any], label: str, matrices: np.ndarray):
    """Returns the weights of the first three problems, without failed ones."""
    found, started = [], time.perf_counter()
    for i in range(3):
        with contextlib.suppress(Exception):
            raw = np.asarray(call(i), np.float64)
            if label in BATCHED:
                raw = raw[i]
            if label == "ECOS (CVXPY)":  # returns the update instead of the weights
                raw = np.linalg.lstsq(matrices[i].T, raw, rcond=None)[0]
            found.append(raw)
        if time.perf_counter() - started > PATIENCE:
            break
    return found


def errors_of(key: tuple[str, str], answers: dict[Any, Any], matrices: np.ndarray):
    """Returns the error of each solution of a solver."""
    method, _ = key
    for i, weights in enumerate(answers[key]):
        best: Any = None
        if method in ("UPGrad", "DualProj", "MGDA"):
            best = exact_update(method, matrices[i])
        elif method == "CAGrad":
            rivals = [f for (name, _), f in answers.items() if name == method]
            best = max(worst_gain(matrices[i], f[i]) for f in rivals if len(f) > i)
        yield error_of(method, matrices[i], weights, best)


def measure(tasks: int, rounds: int) -> list[dict[str, Any]]:
    """Returns a row per solver with interleaved times and errors on equal problems."""
    matrices = jacobians(tasks, BATCH[tasks])
    calls = make_calls(matrices, matrices @ matrices.swapaxes(1, 2))
    answers = {key: answers_of(call, key[1], matrices) for key, call in calls.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(rounds):
        for key, call in calls.items():
            if answers[key] and sum(times[key]) < PATIENCE / 2:
                with contextlib.suppress(Exception):
                    once = functools.partial(call, turn % 8)
                    times[key].append(seconds(once))
    rows = []
    for (method, label), measured in times.items():
        row: dict[str, Any] = {"tasks": tasks, "method": method, "solver": label}
        if measured:
            size = BATCH[tasks] if label in BATCHED else 1
            row |= spread([t / size for t in measured])
            row["error"] = max(errors_of((method, label), answers, matrices))
        rows.append(row)
    return rows


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the ratio of the peer's time to ours."""
    medians = {(r["tasks"], r["method"], r["solver"]): r.get("median_ms") for r in rows}
    for row in rows:
        key = row["tasks"], row["method"]
        if "median_ms" in row and not row["solver"].startswith("mtljax"):
            for name, label in (("call", ""), ("map", ", lax.map"), ("vmap", ", vmap")):
                row[f"ratio_{name}"] = (
                    row["median_ms"] / medians[*key, f"mtljax{label}"]
                )
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    lines = [
        "# Time of one solve",
        "",
        "`python -m benchmarks.solvers`: median and quartiles in milliseconds, and "
        "ratios to our time: for a jitted call with its dispatch, inside one program "
        "by `lax.map`, and in a batch by `vmap`. The docstring of the module defines "
        "the error.",
        "",
        "| T | method | solver | ms | / call | / lax.map | / vmap | error |",
        "|--:|:--|:--|--:|--:|--:|--:|--:|",
    ]
    order = {m: i for i, m in enumerate(ours(2))}
    for row in sorted(rows, key=lambda r: (r["tasks"], order[r["method"]])):
        head = f"| {row['tasks']} | {row['method']} | {row['solver']} |"
        if "median_ms" not in row:
            lines.append(f"{head} no answer | | | | |")
            continue
        ms = f"{row['median_ms']:.3g} ({row['low_ms']:.3g} to {row['high_ms']:.3g})"
        ratio = "| |"
        if "ratio_call" in row:
            ratio = " | ".join(
                f"{row[f'ratio_{n}']:.3g}" for n in ("call", "map", "vmap")
            )
        lines.append(f"{head} {ms} | {ratio} | {max(row['error'], 0):.0e} |")
    lines += ["", ", ".join(f"{k} {v}" for k, v in about.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = ("jax", "numpy", "scipy", "torch", "torchjd", "cvxpy", "ecos", "quadprog")
    about = {"cores": os.cpu_count(), "python": platform.python_version()}
    about |= {name: importlib.metadata.version(name) for name in names}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows, table = [], ""
    for tasks in arguments.tasks:
        start = time.perf_counter()
        rows += with_ratios(measure(tasks, arguments.rounds))
        print(f"T = {tasks}: {time.perf_counter() - start:.0f} s", flush=True)
        table = markdown(rows, about)
        whole = json.dumps({"about": about, "rows": rows}, indent=1)
        arguments.out.write_text(whole + "\n")
        arguments.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
