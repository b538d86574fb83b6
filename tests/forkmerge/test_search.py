"""The search: published rules against a float64 loop, and what it promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forkmerge.problem import VALIDATION, score, trained

from mtljax import forkmerge
from mtljax.forkmerge._search import simplex_points


def near(goal):
    return lambda w, *_: -jnp.square(w - goal)


@pytest.mark.parametrize(
    ("branches", "goal", "weights", "value"),
    [
        ([0.0, 1.0, 3.0], 0.8, [1 / 6, 5 / 6, 0], -0.001111),
        ([0.0, 1.0, 3.0, 0.5], 0.9, [0, 5 / 6, 0, 1 / 6], -0.000278),
    ],
)
def test_greedy_vectors(branches, goal, weights, value):
    found = forkmerge.search_merge(jnp.array(branches), near(goal))
    np.testing.assert_allclose(found.weights, weights, atol=1e-4)
    np.testing.assert_allclose(found.score, value, atol=1e-6)
    np.testing.assert_allclose(found.state, np.dot(weights, branches), atol=1e-4)
    np.testing.assert_allclose(
        found.branch_scores, [-((b - goal) ** 2) for b in branches], rtol=1e-5
    )


def greedy_reference(branches, performance):
    """Algorithm 3 as it is written, in float64."""
    count = len(branches)
    order = sorted(range(count), key=lambda b: -performance(branches[b]))
    theta = [branches[b] for b in order]
    raw, best = np.eye(count)[0], -np.inf
    for b in range(1, count):
        mean = raw[:b].mean()
        keep = 0.0
        for alpha in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
            raw[b] = alpha * mean
            value = performance(
                sum(raw[m] * theta[m] for m in range(count)) / raw.sum()
            )
            if value > best:
                best, keep = value, alpha * mean
        raw[b] = keep
    weights = np.zeros(count)
    weights[order] = raw / raw.sum()
    return weights, best


METRIC = np.diag([1.0, 4.0, 0.3])


@functools.cache
def greedy_program():
    def performance(state, goal):
        d = state - goal
        return -d @ jnp.asarray(METRIC, d.dtype) @ d

    def run(branches, goal):
        return forkmerge.search_merge(branches, performance, goal, method="greedy")

    return jax.jit(jax.vmap(run))


def test_greedy_is_algorithm_3(deep_run):
    rng = np.random.default_rng(0)
    cases = 500 if deep_run else 100
    branches = rng.normal(size=(cases, 4, 3)).astype(np.float32)
    goals = 0.5 * rng.normal(size=(cases, 3)).astype(np.float32)
    found = greedy_program()(branches, goals)
    assert found.scores.shape == (cases, 4 + 5 * 3)  # 5 (B - 1) + B passes
    moved = 0
    for i in range(cases):
        wide, goal = branches[i].astype(np.float64), goals[i].astype(np.float64)
        value = lambda w, goal=goal: -(w - goal) @ METRIC @ (w - goal)
        weights, best = greedy_reference(wide, value)
        np.testing.assert_allclose(found.score[i], best, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.weights[i], weights, atol=1e-5)
        moved += weights.max() < 1
    assert moved > cases / 2  # or the test says nothing


def test_merged_is_never_worse_than_the_best_branch():
    rng = np.random.default_rng(1)
    branches = rng.normal(size=(100, 4, 3)).astype(np.float32)
    goals = rng.normal(size=(100, 3)).astype(np.float32)
    found = greedy_program()(branches, goals)
    assert (found.score >= found.branch_scores.max(1)).all()
    assert (found.score == found.scores.max(1)).all()
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-5)
    assert (found.weights >= 0).all()


def test_the_grid_of_algorithm_1():
    branches = jnp.array([0.0, 1.0])
    for goal, weight in [(0.75, 0.8), (5.0, 1.0), (-3.0, 0.0), (0.45, 0.4)]:
        found = forkmerge.search_merge(branches, near(goal))  # the default for two
        np.testing.assert_allclose(found.weights, [1 - weight, weight], atol=1e-6)
        assert found.scores.shape == (6,)
    greedy = forkmerge.search_merge(branches, near(0.3), method="greedy")
    # The better branch keeps at least a half: 2/7 and 3/8 are next to 0.3.
    np.testing.assert_allclose(greedy.weights, [5 / 7, 2 / 7], atol=1e-5)


def test_methods_on_a_network():
    branches, _ = trained()
    scores = {}
    for method in ("greedy", "simplex"):
        found = forkmerge.search_merge(
            branches,
            score,
            VALIDATION,
            method=method,
            policies={"opt_state": "keep"},
        )
        scores[method] = float(found.score)
        assert found.score >= found.branch_scores.max()
        at_merged = score(found.state, VALIDATION)
        np.testing.assert_allclose(at_merged, found.score, rtol=1e-5)
        again = forkmerge.merge(branches, found.weights)
        np.testing.assert_allclose(
            again.params["trunk"]["w"], found.state.params["trunk"]["w"], atol=1e-6
        )
    # Greedy points are not all on the grid, but the grid is hard to beat.
    assert scores["simplex"] >= scores["greedy"] - 0.01


def test_random_candidates():
    branches = jnp.array([0.0, 1.0, 3.0])
    run = lambda seed: forkmerge.search_merge(
        branches,
        near(0.8),
        method=forkmerge.Search("random", num_samples=20),
        key=jax.random.key(seed),
    )
    found = run(0)
    np.testing.assert_array_equal(found.candidates[:3], np.eye(3))
    np.testing.assert_allclose(found.candidates.sum(1), 1, rtol=1e-5)
    assert found.scores.shape == (23,)
    assert found.score > found.branch_scores.max()
    assert (run(1).candidates[3:] != found.candidates[3:]).all()


def test_points_of_the_simplex():
    for count, number in [(2, 6), (3, 21), (4, 56), (6, 252)]:
        points = np.array(simplex_points(count, 5))
        assert points.shape == (number, count)
        assert len(np.unique(points.round(6), axis=0)) == number
        np.testing.assert_allclose(points.sum(1), 1)
        np.testing.assert_array_equal(points[:count], np.eye(count))
        np.testing.assert_allclose(points * 5, np.round(points * 5), atol=1e-12)


def test_errors_are_minimised_on_request_and_negative_scores_are_fine():
    branches = jnp.array([0.0, 1.0, 3.0])
    error = lambda w: jnp.square(w - 0.8) + 7
    found = forkmerge.search_merge(branches, error, direction="min")
    np.testing.assert_allclose(found.weights, [1 / 6, 5 / 6, 0], atol=1e-4)
    np.testing.assert_allclose(found.score, 7.001111, rtol=1e-5)
    np.testing.assert_allclose(found.branch_scores, [7.64, 7.04, 11.84], rtol=1e-5)


@pytest.mark.parametrize("method", ["greedy", "simplex"])
def test_a_branch_that_diverged_is_left_out(method):
    branches = jnp.array([jnp.nan, 1.0, 0.0])
    found = forkmerge.search_merge(branches, near(0.8), method=method)
    np.testing.assert_allclose(found.state, 0.8, atol=0.04)
    assert found.weights[0] == 0
    assert found.branch_scores[0] == -jnp.inf


def test_batched_passes_and_refresh():
    branches = {"w": jnp.array([0.0, 1.0]), "mean": jnp.array([5.0, 6.0])}
    refresh = lambda s: s | {"mean": 2 * s["w"]}
    worth = lambda s: -jnp.square(s["w"] - 0.8) - jnp.square(s["mean"] - 1.6)
    for evaluation in ("map", "vmap"):
        found = forkmerge.search_merge(
            branches,
            worth,
            refresh=refresh,
            method=forkmerge.Search(evaluation=evaluation),
        )
        np.testing.assert_allclose(found.weights, [0.2, 0.8], atol=1e-6)
        np.testing.assert_allclose(found.state["mean"], 1.6, rtol=1e-6)
        np.testing.assert_allclose(found.score, 0, atol=1e-10)


def test_a_search_is_compiled_once():
    traces = []

    def worth(w):
        traces.append(w)
        return -w

    forkmerge.search_merge(jnp.array([0.0, 1.0]), worth)
    first = len(traces)
    forkmerge.search_merge(jnp.array([2.0, 1.0]), worth)
    assert len(traces) == first


def test_splits_of_the_validation_set():
    validation = {"x": jnp.arange(10), "y": 10 * jnp.arange(10)}
    for share, size in [(0.4, 4), (0.01, 1)]:
        search, report = forkmerge.split_validation(
            validation, key=jax.random.key(0), report=share
        )
        assert report["x"].shape == (size,)
        both = np.concatenate([search["x"], report["x"]])
        np.testing.assert_array_equal(np.sort(both), np.arange(10))
        np.testing.assert_array_equal(report["y"], 10 * report["x"])
    some = forkmerge.subsample(validation, 4, key=jax.random.key(0))
    assert len(set(some["x"].tolist())) == 4
    np.testing.assert_array_equal(some["y"], 10 * some["x"])


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda b: forkmerge.search_merge(b, near(0), {"x": jnp.zeros((0, 3))}),
            r"the validation set is empty: array 'x' has shape \(0, 3\)",
        ),
        (lambda b: forkmerge.search_merge(b, near(0), {}), "holds no array"),
        (
            lambda b: forkmerge.search_merge(b, near(0), direction="accuracy"),
            "direction='accuracy' is not one of 'max', 'min'",
        ),
        (
            lambda b: forkmerge.search_merge(b, near(0), method="bisect"),
            "method='bisect' is not one of 'auto', 'grid', 'greedy'",
        ),
        (
            lambda b: forkmerge.search_merge(b, near(0), method="grid"),
            "for 2 branches, not 3",
        ),
        (
            lambda b: forkmerge.search_merge(b, near(0), method="random"),
            "needs key=",
        ),
        (
            lambda b: forkmerge.search_merge(
                b, near(0), method=forkmerge.Search("simplex", levels=500)
            ),
            "has 125751 points",
        ),
        (
            lambda b: forkmerge.search_merge(b, lambda w: jnp.ones(2)),
            r"must be a scalar array, .* not an array of shape \(2,\)",
        ),
        (lambda b: forkmerge.search_merge(b, lambda w: {"a": 1}), "not a dict"),
        (
            lambda b: forkmerge.split_validation(b[:1], key=jax.random.key(0)),
            "1 example cannot be split",
        ),
        (
            lambda b: forkmerge.split_validation(b, key=jax.random.key(0), report=1.0),
            "report=1.0 must lie between 0 and 1",
        ),
        (
            lambda b: forkmerge.subsample(b, 4, key=jax.random.key(0)),
            "size=4, but the validation set has 3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.array([0.0, 1.0, 2.0]))
