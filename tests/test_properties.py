"""What every method promises, over random inputs: one property per column of the table.

The table is ``tests/registry.py``; a property runs for every case that promises it.
``make test`` takes a few inputs of three tasks, ``make test-deep`` many of 2, 3 and 5,
and the run's last lines count them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import enable_x64
from programs import DIM, PARAMS, built, flat, run, tree
from registry import CASES, Case

ALL = np.ones(3, bool)


class Problem(NamedTuple):
    """Gradients [T, DIM] and losses [T], and where further numbers come from."""

    matrix: np.ndarray
    losses: np.ndarray
    rng: np.random.Generator

    @property
    def tasks(self) -> int:
        return len(self.matrix)


def make_problem(seed: int, tasks: int, decades: float) -> Problem:
    """Full-rank rows of unequal length, with a common part so that few conflict."""
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(tasks, DIM)) + rng.uniform(0, 1) * rng.normal(size=DIM)
    matrix *= 10.0 ** rng.uniform(-decades / 2, decades / 2, size=(tasks, 1))
    return Problem(matrix, rng.uniform(0.5, 2.0, size=tasks), rng)


def unit(vector):
    return vector / max(np.linalg.norm(vector), 1e-30)


def close(a, b, tolerance=3e-3):
    scale = max(np.linalg.norm(a), np.linalg.norm(b), 1e-30)
    np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


# --- the properties: each asserts one example --------------------------------------


def rotation(case: Case, p: Problem):
    """A(JQ) = A(J)Q for orthogonal Q: the proof that the Gramian is enough."""
    turn, _ = np.linalg.qr(p.rng.normal(size=(DIM, DIM)))
    plain, _ = run(case, p.matrix, p.losses)
    turned, _ = run(case, p.matrix @ turn, p.losses)
    close(plain @ turn, turned)


def degree(case: Case, p: Problem):
    """A(cJ) = c^degree A(J), over eight decades of c."""
    factor = 10.0 ** p.rng.uniform(-4, 4)
    plain, _ = run(case, p.matrix, p.losses)
    scaled, _ = run(case, factor * p.matrix, p.losses)
    assert case.degree is not None
    close(plain * factor**case.degree, scaled)


def permutation(case: Case, p: Problem):
    """Relabelling the tasks changes nothing."""
    order = p.rng.permutation(p.tasks)
    plain, _ = run(case, p.matrix, p.losses)
    relabelled, _ = run(case, p.matrix[order], p.losses[order])
    close(plain, relabelled)


def non_conflicting(case: Case, p: Problem):
    """<g_i, D> >= 0: no task gets worse."""
    mask = np.arange(p.tasks) < case.non_conflicting
    update, _ = run(case, p.matrix, p.losses, mask=mask)
    rows = p.matrix / np.linalg.norm(p.matrix, axis=1, keepdims=True)
    assert (rows[mask] @ update).min() >= -1e-4 * np.linalg.norm(update)


def task_scale(case: Case, p: Problem):
    """The direction does not depend on the unit of a task's loss."""
    factors = 10.0 ** p.rng.uniform(-2, 2, size=(p.tasks, 1))
    plain, _ = run(case, p.matrix, p.losses)
    scaled, _ = run(case, factors * p.matrix, p.losses)
    close(unit(plain), unit(scaled))


def row_linear(case: Case, p: Problem):
    """A(diag(a + b)J) = A(diag(a)J) + A(diag(b)J) for positive a, b."""
    a, b = 10.0 ** p.rng.uniform(-1, 1, size=(2, p.tasks, 1))
    parts = [run(case, c * p.matrix, p.losses)[0] for c in (a, b)]
    whole, _ = run(case, (a + b) * p.matrix, p.losses)
    scale = max(map(np.linalg.norm, (*parts, whole)))
    np.testing.assert_allclose(whole / scale, sum(parts) / scale, atol=3e-3)


def simplex(case: Case, p: Problem):
    """Weights are not negative and sum to one."""
    _, state = run(case, p.matrix, p.losses)
    assert (state.task_weights >= 0).all()
    np.testing.assert_allclose(state.task_weights.sum(), 1, rtol=1e-5)


def stationary(case: Case, p: Problem):
    """D = 0 where a positive combination of the gradients vanishes."""
    weights = p.rng.uniform(0.5, 2, p.tasks - 1)
    rows = p.matrix[:-1] / np.linalg.norm(p.matrix[:-1], axis=1, keepdims=True)
    update, _ = run(case, np.vstack([rows, -(weights @ rows)]), p.losses)
    assert np.linalg.norm(update) <= 3e-3


def alive(case: Case, p: Problem):
    """D != 0 where only the opposed pair is stationary, and the others can gain."""
    rows = p.matrix / np.linalg.norm(p.matrix, axis=1, keepdims=True)
    if p.tasks > 2:  # a third task, orthogonal to the two that oppose each other
        rows[1] = -rows[0]
        rows[2] -= (rows[2] @ rows[0]) * rows[0]
        rows[2] /= np.linalg.norm(rows[2])
        rows[3:] = rows[2]
    update, _ = run(case, rows, p.losses)
    assert np.linalg.norm(update) >= 5e-3


def zero_row(case: Case, p: Problem):
    """A task whose gradient is zero changes nothing but the length of D."""
    matrix = p.matrix.copy()
    matrix[-1] = 0
    mask = np.arange(p.tasks) < p.tasks - 1
    beside, _ = run(case, matrix, p.losses)
    without, _ = run(case, matrix, p.losses, mask=mask)
    close(unit(beside), unit(without))


def zero_row_stops(case: Case, p: Problem):
    """A task whose gradient is zero is stationary, and so is the whole."""
    matrix = p.matrix.copy()
    matrix[-1] = 0
    update, _ = run(case, matrix, p.losses)
    assert np.linalg.norm(update) <= 1e-5 * np.linalg.norm(matrix)


def duplicate_row(case: Case, p: Problem):
    """Two equal tasks are interchangeable, and nothing becomes singular."""
    matrix, losses = p.matrix.copy(), p.losses.copy()
    matrix[-1], losses[-1] = matrix[0], losses[0]
    update, state = run(case, matrix, losses)
    assert np.isfinite(update).all()
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert jnp.isfinite(leaf).all()
    if case.permutation:
        order = np.arange(p.tasks)
        order[[0, -1]] = order[[-1, 0]]
        swapped, _ = run(case, matrix[order], losses[order])
        close(update, swapped)


def masked(case: Case, p: Problem):
    """A masked task is a dropped task, whatever it holds."""
    kept = np.sort(p.rng.permutation(p.tasks)[:-1])
    mask = np.isin(np.arange(p.tasks), kept)
    gone, lost = p.matrix.copy(), p.losses.copy()
    gone[~mask], lost[~mask] = np.nan, np.nan
    beside, _ = run(case, gone, lost, mask=mask)
    without, _ = run(case, p.matrix[kept], p.losses[kept])
    close(beside, without, 1e-3)


BATCH = 8


@functools.cache
def batched(case_id, tasks):
    balancer, _ = built(case_id, tasks)

    def update(grads, losses):
        state = balancer.init(PARAMS)
        mask = jnp.ones(tasks, bool)
        return balancer.update(grads, state, losses=losses, mask=mask)[0]

    return jax.jit(jax.vmap(update))


def vmapped(case: Case, p: Problem):
    """vmap is the loop."""
    matrices = p.matrix * 10.0 ** p.rng.uniform(-2, 2, size=(BATCH, 1, 1))
    matrices += 0.1 * p.matrix.std() * p.rng.normal(size=matrices.shape)
    grads = jax.tree.map(lambda *x: jnp.stack(x), *map(tree, matrices))
    losses = jnp.asarray(np.tile(p.losses, (BATCH, 1)), jnp.float32)
    together = batched(case.id, p.tasks)(grads, losses)
    for i, matrix in enumerate(matrices):
        alone, _ = run(case, matrix, p.losses)
        close(flat(jax.tree.map(lambda x, i=i: x[i], together)), alone, 1e-3)


@functools.cache
def doubled(case_id, tasks):
    case = next(c for c in CASES if c.id == case_id)
    balancer = case.build(tasks)
    return balancer, jax.jit(balancer.update)


def precise(case: Case, p: Problem):
    """float32 gives what float64 gives."""
    single, _ = run(case, p.matrix, p.losses)
    with enable_x64(True):
        balancer, update = doubled(case.id, p.tasks)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        grads = tree(p.matrix.astype(np.float32), jnp.float64)
        losses = jnp.asarray(p.losses.astype(np.float32), jnp.float64)
        mask = jnp.ones(p.tasks, bool)
        double, _ = update(grads, balancer.init(params), losses=losses, mask=mask)
    assert case.precision is not None
    close(single, flat(double), case.precision)


class Property(NamedTuple):
    """A column of the table."""

    check: Callable[[Case, Problem], None]
    promised: Callable[[Case], Any]
    deep: bool = False  # needs a program of its own
    decades: float = 1.0  # spread of the lengths of the gradients
    fewest: int = 2
    drops: int = 0  # tasks it takes away

    @property
    def name(self) -> str:
        return self.check.__name__


PROPERTIES = [
    Property(rotation, lambda c: c.rotation),
    Property(degree, lambda c: c.degree is not None),
    Property(permutation, lambda c: c.permutation),
    Property(non_conflicting, lambda c: c.non_conflicting, decades=3),
    Property(task_scale, lambda c: c.task_scale),
    Property(row_linear, lambda c: c.row_linear),
    Property(simplex, lambda c: c.simplex, decades=4),
    Property(stationary, lambda c: c.stationary),
    Property(alive, lambda c: c.stationary == "strong", fewest=3),
    Property(zero_row, lambda c: c.zero_row == "dropped"),
    Property(zero_row_stops, lambda c: c.zero_row == "stops"),
    Property(duplicate_row, lambda c: True),
    Property(masked, lambda c: c.maskable, deep=True, fewest=3, drops=1),
    Property(vmapped, lambda c: c.stable, deep=True),
    Property(precise, lambda c: c.precision is not None, deep=True),
]


def table():
    """All promises, those of a case on one worker together with its programs."""
    for case in CASES:
        for p in PROPERTIES:
            if p.promised(case):
                marks = [pytest.mark.xdist_group(case.id)]
                marks += [pytest.mark.deep] * p.deep
                yield pytest.param(case, p, id=f"{case.id}-{p.name}", marks=marks)


@pytest.mark.parametrize(("case", "prop"), list(table()))
def test_promise(case: Case, prop: Property, deep_run, record_property):
    fewest = max(prop.fewest, case.min_tasks + prop.drops)
    numbers = [t for t in (2, 3, 5) if t >= fewest] if deep_run else [3]
    count = 0

    @settings(
        max_examples=60 if deep_run else 8,
        deadline=None,
        derandomize=True,
        database=None,
    )
    @given(
        seed=st.integers(0, 2**31),
        tasks=st.sampled_from(numbers),
        decades=st.floats(0, prop.decades),
    )
    def check(seed, tasks, decades):
        nonlocal count
        count += 1
        prop.check(case, make_problem(seed, tasks, decades))

    try:
        check()
    finally:
        record_property("property_cases", count)
