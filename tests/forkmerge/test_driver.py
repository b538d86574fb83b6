"""The driver: rounds from the pieces, resumption to the bit, targets, sources."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax import forkmerge

CENTRES = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [3.0, 3.0, 3.0]])
NOISE = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
VALIDATION = (CENTRES[0] + np.array([[0.3, 0.4, 0.1], [0.2, 0.5, 0.3]])).astype("f4")
REPORT = (CENTRES[0] + np.array([[0.1, 0.2, 0.3]])).astype("f4")


class State(NamedTuple):
    w: Any
    momentum: Any
    count: Any


START = State(jnp.full(3, -1.0), jnp.zeros(3), jnp.int32(0))


def step(state, weights, batch):
    """SGD with momentum on ``½ Σ ν_k ‖w − c_k‖²``, with noise."""
    centres = jnp.asarray(CENTRES, jnp.float32)
    grad = weights.sum() * state.w - weights @ centres + 0.3 * batch
    momentum = 0.8 * state.momentum + grad
    losses = jnp.square(state.w[None] - centres).sum(-1)
    state = State(state.w - 0.05 * momentum, momentum, state.count + 1)
    return state, {"losses": losses}


def drawn_step(state, task, batch):
    return step(state, jax.nn.one_hot(task, 3), batch)


def score(state, validation):
    return -jnp.square(state.w[None] - validation).sum(-1).mean()


def batches(step, n):
    return jnp.asarray(NOISE[step : step + n])


@functools.cache
def driver(**options):
    options = {"interval": 4, **options}
    return forkmerge.ForkMerge(
        step, score, forkmerge.target_plus_each(3), policies=KEEP, **options
    )


KEEP = {"momentum": "keep"}


def run(d, state, num_steps=10, **options):
    return d.run(state, batches, num_steps, validation=VALIDATION, **options)


def equal(a, b, exact=True):
    check = np.testing.assert_array_equal if exact else close
    for x, y in zip(saved(a), saved(b), strict=True):
        check(x, y)


def close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_run_is_its_pieces():
    seen = []
    found = run(driver(), driver().init(START), on_merge=lambda s, i: seen.append(i))
    branches = forkmerge.fork(START, 3)
    nu = forkmerge.target_plus_each(3)
    for i, (start, n) in enumerate([(0, 4), (4, 4), (8, 2)]):  # the last is short
        branches, _ = forkmerge.train_branches(step, branches, nu, batches(start, n))
        merged = forkmerge.search_merge(branches, score, VALIDATION, policies=KEEP)
        branches = forkmerge.refork(branches, merged.state, policies=KEEP)
        close(seen[i].weights, merged.weights)
        close(seen[i].score, merged.score)
        close(seen[i].branch_scores, merged.branch_scores)
    equal(found.branches, branches, exact=False)
    equal(driver().result(found), merged.state, exact=False)
    assert (int(found.step), int(found.round), int(found.merged_at)) == (10, 3, 10)
    # Moments stay a branch's own, weights are the same in all.
    assert np.ptp(found.branches.momentum, axis=0).max() > 1e-3
    assert np.ptp(found.branches.w, axis=0).max() == 0
    np.testing.assert_array_equal(found.branches.count, [10, 10, 10])
    assert any(0 < i.weights.max() < 1 for i in seen)


def saved(state):
    """What a checkpoint keeps: host arrays, in the structure of a new state."""
    return [
        np.asarray(jax.random.key_data(x) if is_key(x) else x)
        for x in jax.tree.leaves(state)
    ]


def restored(leaves, like):
    new = [
        jax.random.wrap_key_data(x) if is_key(old) else jnp.asarray(x)
        for x, old in zip(leaves, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), new)


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def drawing_driver():
    return forkmerge.ForkMerge(
        drawn_step,
        score,
        forkmerge.target_plus_each(3),
        interval=4,
        training=forkmerge.BranchTraining("sample"),
        method=forkmerge.Search("random", num_samples=8),
        merge_source=forkmerge.Snapshots("best_in_round", 2),
        final="best",
        policies={"momentum": "reset"},
    )


@pytest.mark.parametrize("kind", ["plain", "everything drawn and remembered"])
def test_a_killed_run_goes_on_to_the_same_bits(kind):
    d = driver() if kind == "plain" else drawing_driver()
    init = lambda: d.init(START, key=jax.random.key(7))  # first draws differ
    kept = []
    on_chunk = lambda state, _: kept.append((int(state.step), saved(state)))
    on_merge = lambda state, _: kept.append((int(state.step), saved(state)))
    whole = run(d, init(), chunk=2, on_chunk=on_chunk, on_merge=on_merge)
    # Inside rounds, at their end before the merge, and right after it.
    assert [s for s, _ in kept] == [2, 4, 4, 6, 8, 8, 10, 10]
    for _, leaves in kept:
        equal(run(d, restored(leaves, init()), chunk=2), whole)
    # One that was finished goes on too, as if it had been meant to be longer.
    if kind == "plain":
        longer = run(d, run(d, init(), 8), 12)
        equal(longer, run(d, init(), 12), exact=False)
    else:  # What is drawn depends on the step of the run, not on that of the chunk.
        equal(run(d, init(), chunk=1), whole, exact=False)


@pytest.mark.deep
def test_a_state_survives_a_checkpoint(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    from mtljax import training

    d = drawing_driver()
    init = lambda: d.init(START, key=jax.random.key(5))
    state = run(d, init(), 6, chunk=2)
    with training.Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(6, state, {})
        checkpoints.wait()
        again = checkpoints.restore(init()).state
    equal(again, state)
    equal(run(d, again, 10, chunk=2), run(d, state, 10, chunk=2))


def test_a_step_for_scan():
    d = driver()

    @jax.jit
    def scan(state):
        one = lambda s, x: d.advance(s, x, validation=jnp.asarray(VALIDATION))
        return jax.lax.scan(one, state, batches(0, 8))

    state, metrics = scan(d.init(START))
    assert metrics["losses"].shape == (8, 3, 3)
    equal(state, run(d, d.init(START), 8), exact=False)


@pytest.mark.parametrize("over", ["vmap", "map"])
def test_several_targets_are_a_mapped_axis(over):
    """A driver for each row of branch weights, made inside the mapped function."""
    nu = jnp.stack([forkmerge.target_vs_all(3, target=t) for t in (0, 2)])
    goals = jnp.asarray(CENTRES[[0, 2]], jnp.float32)

    def toward(goal):
        return lambda state: -jnp.square(state.w - goal - 0.3).sum()

    def trained(args):
        nu, goal = args
        d = forkmerge.ForkMerge(step, toward(goal), nu, interval=3)
        state = d.init(START)
        for start in (0, 3):
            state, _ = d.train(state, batches(start, 3))
            state, info = d.merge(state)
        return state, info

    mapped = jax.vmap(trained) if over == "vmap" else lambda x: jax.lax.map(trained, x)
    state, info = jax.jit(mapped)((nu, goals))
    for g in range(2):
        one = forkmerge.ForkMerge(step, toward(goals[g]), nu[g], interval=3)
        alone = one.run(one.init(START), batches, 6)
        close(state.merged.w[g], alone.merged.w)
        close(info.weights[g], alone.info.weights)
        close(info.score[g], alone.info.score)
    assert np.abs(state.merged.w[0] - state.merged.w[1]).max() > 0.1


def test_a_new_state_may_be_donated():
    """No buffer twice, and none of the caller's."""
    d = drawing_driver()
    start, key = jax.tree.map(jnp.copy, START), jax.random.key(1)
    state = d.init(start, key=key)
    leaves = [x for x in jax.tree.leaves(state) if not is_key(x)]
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    pointers += [x.unsafe_buffer_pointer() for x in jax.tree.leaves(start)]
    assert len(set(pointers)) == len(pointers)
    assert state.key is not key


def scripted(source, **options):
    """A step that puts every branch where the batch says."""
    return forkmerge.ForkMerge(
        lambda w, weights, batch: (batch, {}),
        lambda w: -jnp.abs(w - 1),
        forkmerge.target_vs_all(2),
        interval=3,
        training=forkmerge.BranchTraining(per_branch=True),
        merge_source=source,
        **options,
    )


# The target-only branch is best in the middle of the first round, then worse.
SCRIPT = jnp.array([[0.0, 5], [1, 6], [3, 7], [2, 9], [2, 9], [2.5, 9]])


@pytest.mark.parametrize(
    ("source", "first", "second"),
    [("last", 3, 2.5), ("best_in_round", 1, 2), ("best_ever", 1, 1)],
)
def test_what_is_merged(source, first, second):
    d = scripted(source if source == "last" else forkmerge.Snapshots(source, 1))
    found = []
    script = lambda step, n: SCRIPT[step : step + n]
    keep = lambda state, info: found.append(float(d.result(state)))
    state = d.run(d.init(0.0), script, 6, on_merge=keep)
    assert found == [first, second]
    np.testing.assert_array_equal(state.branches, [second, second])


def test_the_end_of_a_round_counts_as_well():
    d = scripted("best_in_round")  # never evaluated in between
    state = d.run(d.init(0.0), lambda step, n: SCRIPT[step : step + n], 3)
    assert float(d.result(state)) == 3
    _, scores = d.evaluate(state)
    np.testing.assert_allclose(scores, [-2, -2])


def test_the_best_of_all_merges():
    d = scripted("last", final="best")
    script = jnp.array([[0.0, 0]] * 2 + [[1.5, 9]] + [[0.0, 0]] * 2 + [[4, 9.0]])
    state = d.run(d.init(0.0), lambda step, n: script[step : step + n], 6)
    assert float(d.result(state)) == 1.5
    np.testing.assert_array_equal(state.branches, [4, 4])  # they went on
    np.testing.assert_allclose(state.merged_score, -0.5)


def test_the_gap_on_a_part_that_was_not_searched():
    d = driver()
    state, _ = d.train(d.init(START), batches(0, 4))
    branches = state.branches
    after, info = d.merge(state, VALIDATION, REPORT)
    close(info.report_score, score(d.result(after), REPORT))
    best = jax.tree.map(lambda x: x[int(info.branch_scores.argmax())], branches)
    close(info.single_report_score, score(best, REPORT))
    close(info.gap, info.score - info.report_score)
    _, without = d.merge(state, VALIDATION)
    assert np.isnan(without.gap)
    close(without.weights, info.weights)
    # An error: better is smaller, optimism is still positive.
    error = dataclasses.replace(d, score=lambda s, v: -score(s, v), direction="min")
    _, turned = error.merge(state, VALIDATION, REPORT)
    close(turned.gap, info.gap)
    close(turned.weights, info.weights)
    close(turned.score, -info.score)


def test_resets_and_heads():
    d = dataclasses.replace(
        driver(), policies={"momentum": "reset"}, heads={"w": "stacked"}
    )
    state, _ = d.train(d.init(START), batches(0, 4))
    after, info = d.merge(state, VALIDATION)
    np.testing.assert_array_equal(after.branches.momentum, np.zeros((3, 3)))
    want = forkmerge.merge(
        state.branches,
        info.weights,
        heads={"w": "stacked"},
        branch_weights=d.branch_weights,
    )
    close(d.result(after).w, want.w)


def test_pruning():
    d = driver()
    state = run(d, d.init(START), 4)
    fewer, rest = d.prune(state, keep=2)
    kept = forkmerge.prune(
        state.info.weights, state.info.branch_scores, d.branch_weights, keep=2
    )
    assert 0 in kept
    assert fewer.num_branches == len(kept) == 2
    np.testing.assert_array_equal(rest.branches.w, state.branches.w[list(kept), :])
    after = run(fewer, rest, 8)
    assert int(after.round) == 2
    assert after.info.weights.shape == (2,)
    # A process that starts anew needs the indices to know what it restores.
    again = driver().restrict(kept)
    equal(run(again, restored(saved(rest), again.init(START)), 8), after)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be a positive integer, not 0"),
        ({"direction": "higher"}, "direction='higher' is not one of 'max', 'min'"),
        ({"merge_source": "best"}, "merge_source='best' is not one of 'last'"),
        ({"final": "first"}, "final='first'"),
        (
            {"branch_weights": [1.0, 1.0]},
            r"shape \(2,\); it must be \(branches, tasks\)",
        ),
        ({"branch_weights": np.ones((2, 3, 3))}, r"must be \(branches, tasks\)"),
        (
            {"merge_source": forkmerge.Snapshots("last", 2)},
            "is only used with merge_source='best_in_round'",
        ),
        ({"method": "grid"}, "for 2 branches, not 3"),
        ({"policies": {"w": "average"}}, r"policies\['w'\]='average'"),
    ],
)
def test_errors_of_options(options, message):
    given = {
        "step": step,
        "score": score,
        "branch_weights": np.ones((3, 3)),
        "interval": 4,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        forkmerge.ForkMerge(**given)


@pytest.mark.usefixtures("as_users")
def test_errors_of_calls():
    d = driver()
    with pytest.raises(
        ValueError, match=r"ForkMerge\.merge: the validation set is emp"
    ):
        d.merge(d.init(START), VALIDATION[:0])
    with pytest.raises(
        ValueError, match=r"ForkMerge\.merge: the validation set is emp"
    ):
        d.merge(d.init(START), VALIDATION, REPORT[:0])
    with pytest.raises(ValueError, match="no merge yet"):
        d.prune(d.init(START), keep=2)
    with pytest.raises(ValueError, match="pass key="):
        drawing_driver().init(START)
    with pytest.raises(ValueError, match="'opt' matches no leaf"):
        dataclasses.replace(d, policies={"opt": "keep"}).init(START)
    with pytest.raises(ValueError, match="num_steps must be a positive"):
        run(d, d.init(START), 0)
