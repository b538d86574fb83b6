"""Gradient similarity: its null, both estimators' bias, and what one Gramian says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from precision import enable_x64
from trajectory import lab

import mtljax
from mtljax import trajectory


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_gramian_by_layer_sums_to_the_total():
    grads = lab.task_gradients()
    with enable_x64(True):
        p, whole = lab.wide(lab.params()), lab.wide(lab.data())
        rows = jax.jit(mtljax.value_and_task_grads(lab.task_losses))(p, whole)[1]
        found = {
            by: jax.tree.map(np.asarray, trajectory.gradient_gram(rows, by=by))
            for by in ("leaf", "block", "total")
        }
    np.testing.assert_allclose(found["total"], grads @ grads.T, rtol=1e-11)
    assert list(found["leaf"]) == ["a/b", "a/w", "c/b", "c/w"]
    assert list(found["block"]) == ["a", "c"]
    for by in ("leaf", "block"):
        np.testing.assert_allclose(sum(found[by].values()), grads @ grads.T, rtol=1e-11)


def test_what_a_gramian_says():
    grads = lab.task_gradients()
    weights = np.array([1.0, 2.0, 0.5])
    found = trajectory.conflict_matrix(
        jnp.asarray(grads @ grads.T, jnp.float32), jnp.asarray(weights, jnp.float32)
    )
    total = weights @ grads
    for k in range(3):
        expected = cosine(grads[k], total)
        np.testing.assert_allclose(found.similarity[k], expected, rtol=1e-4, atol=1e-5)
    norms = np.linalg.norm(grads, axis=1)
    null = weights * norms / np.sqrt(((weights * norms) ** 2).sum())
    np.testing.assert_allclose(found.null, null, rtol=1e-5)
    pairs = [cosine(grads[i], grads[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(pairs) < 0  # so that the next line says something
    np.testing.assert_allclose(found.conflict_fraction, np.mean(np.array(pairs) < 0))
    np.testing.assert_allclose(found.mean_cosine, np.mean(pairs), rtol=1e-4)
    # ‖mean of unit gradients‖² = 1/T + (T − 1)/T · mean pairwise cosine
    unit = grads / norms[:, None]
    np.testing.assert_allclose(
        (unit.mean(0) ** 2).sum(), 1 / 3 + 2 / 3 * found.mean_cosine, rtol=1e-4
    )


@pytest.mark.parametrize("tasks", [2, 5, 20])
def test_the_null_of_orthogonal_gradients_falls_with_their_number(tasks):
    found = trajectory.conflict_matrix(jnp.eye(tasks))
    np.testing.assert_allclose(found.similarity, tasks**-0.5, rtol=1e-6)
    np.testing.assert_allclose(found.null, tasks**-0.5, rtol=1e-6)


def test_one_task_has_no_pair_and_says_so():
    found = trajectory.conflict_matrix(jnp.array([[4.0]]))
    assert found.pairs == 0
    assert np.isnan(found.conflict_fraction)
    assert np.isnan(found.mean_cosine)
    assert found.similarity.tolist() == found.null.tolist() == [1.0]


DIM = 200


def noisy(ratio, estimator, batches, key, truth=0.5):
    """Two tasks of cosine ``truth`` and noise b/B = ratio; a batch is its gradients."""
    signal = np.zeros((2, DIM), np.float32)
    signal[0, 0], signal[1, :2] = 1, (truth, (1 - truth**2) ** 0.5)
    scale = (ratio / DIM) ** 0.5
    grads = signal[None] + scale * jax.random.normal(key, (batches, 2, DIM))
    return trajectory.gradient_similarity(
        lambda w, g: g @ w, jnp.zeros(DIM), grads, estimator=estimator
    )


@pytest.mark.deep
def test_noise_shortens_the_naive_cosine_and_not_the_split_one():
    """The spec's .249 at b/B = 1 and .045 at 10, where the truth is .50."""
    key = jax.random.key(0)
    for ratio, attenuated in ((1.0, 0.25), (10.0, 0.5 / 11)):
        naive = noisy(ratio, "naive", 600, key)
        np.testing.assert_allclose(naive.cosine[0, 1], attenuated, atol=0.03)
        split = noisy(ratio, "split", 1200, key)
        np.testing.assert_allclose(split.cosine[0, 1], 0.5, atol=0.06)
        truth = cosine(np.array([1, 0.0]), np.array([1.5, 0.75**0.5]))
        low, high = split.interval[0]
        assert low < truth < high
        assert high - low < 0.25
    # Towards the null of equal noise, whatever the angle.
    assert abs(float(naive.similarity[0]) - 0.5**0.5) < abs(
        float(naive.similarity[0]) - truth
    )


@pytest.mark.deep
def test_the_split_interval_covers_as_often_as_it_says():
    truth = cosine(np.array([1, 0.0]), np.array([1.5, 0.75**0.5]))
    keys = jax.random.split(jax.random.key(7), 300)
    run = lambda k: noisy(1.0, "split", 40, k).interval[0]
    found = np.asarray(jax.jit(lambda: jax.lax.map(run, keys))())
    covered = ((found[:, 0] < truth) & (truth < found[:, 1])).mean()
    assert 0.88 < covered < 0.99


def test_pure_noise_is_reported_and_not_dressed_up():
    """A squared length that comes out negative has no direction: NaN."""
    a = np.array([[[1.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    halves = jnp.asarray(np.concatenate([a, a]), jnp.float32)
    found = trajectory.gradient_similarity(
        lambda w, g: g @ w, jnp.zeros(2), halves, estimator="split"
    )
    assert (np.asarray(found.signal) < 0).all()
    assert np.isnan(found.similarity).all()
    assert np.isnan(found.interval).all()


@pytest.mark.deep
def test_on_a_network_it_is_the_mean_of_the_batch_cosines():
    p, tree = jax.tree.map(jnp.float32, lab.params()), lab.batches(6)
    counter = lab.Counter(lab.task_losses)
    run = lambda: trajectory.gradient_similarity(counter, p, tree)
    found = jax.jit(run)()
    assert counter.during(run) == 4
    with enable_x64(True):
        rows = jax.jit(
            lambda: jax.lax.map(
                lambda b: jax.jacrev(lab.task_losses)(lab.wide(lab.params()), b),
                lab.batches(6),
            )
        )()
        grads = np.concatenate(
            [np.asarray(x).reshape(4, 3, -1) for x in jax.tree.leaves(rows)], -1
        )
    expected = [[cosine(g[k], g.sum(0)) for k in range(3)] for g in grads]
    np.testing.assert_allclose(found.similarity, np.mean(expected, 0), rtol=1e-3)
    half = 1.96 * np.std(expected, 0, ddof=1) / 2
    np.testing.assert_allclose(
        found.interval[:, 1] - found.interval[:, 0], 2 * half, rtol=1e-2
    )


@pytest.mark.deep
def test_affinity_is_its_definition_and_its_first_order():
    grads = lab.task_gradients()
    with enable_x64(True):
        p, whole = lab.wide(lab.params()), lab.wide(lab.data())
        run = lambda lr: trajectory.task_affinity(lab.task_losses, p, whole, lr=lr)
        tiny, large = jax.jit(lambda: (run(1e-6), run(0.5)))()
        losses = np.asarray(lab.task_losses(p, whole))
        _, unravel = jax.flatten_util.ravel_pytree(p)
        moved = unravel(jnp.asarray(lab.ravel(p) - 0.5 * grads[0]))
        after = np.asarray(lab.task_losses(moved, whole))
    first_order = grads @ grads.T / losses[None]
    np.testing.assert_allclose(np.asarray(tiny) / 1e-6, first_order, rtol=1e-4)
    np.testing.assert_allclose(large[0], 1 - after / losses, rtol=1e-9)
    counter = lab.Counter(lab.task_losses)
    p = jax.tree.map(jnp.float32, lab.params())
    run = lambda: trajectory.task_affinity(counter, p, lab.wide(lab.data()), lr=0.1)
    assert counter.during(run) == 4


def test_mistakes_are_named(as_users):
    run = lambda **kw: trajectory.gradient_similarity(
        lab.task_losses, lab.params(), lab.batches(8), **kw
    )
    with pytest.raises(ValueError, match="even number of at least 4, not 3"):
        run(estimator="split")
    with pytest.raises(ValueError, match="confidence=2 must lie"):
        run(confidence=2)
    with pytest.raises(ValueError, match="must be \\[T\\]"):
        trajectory.task_affinity(lab.loss, lab.params(), lab.data(), lr=0.1)


def test_named_tasks_have_the_bits_of_unnamed_ones():
    key = jax.random.key(0)
    p, grads = jnp.ones(3), jax.random.normal(key, (4, 2, 3))
    weights = jnp.array([1.0, 2.0])

    def losses(w, g):
        return (g @ w) ** 2

    def named(w, g):
        return dict(zip(("seg", "depth"), losses(w, g), strict=True))

    np.testing.assert_array_equal(
        trajectory.task_affinity(named, p, grads[0], lr=0.1),
        trajectory.task_affinity(losses, p, grads[0], lr=0.1),
    )
    for estimator in ("naive", "split"):
        run = lambda f, w, e=estimator: trajectory.gradient_similarity(
            f, p, grads, estimator=e, weights=w
        )
        found = run(named, {"depth": weights[1], "seg": weights[0]})
        jax.tree.map(np.testing.assert_array_equal, found, run(losses, weights))
    with pytest.raises(ValueError, match="the tasks are"):
        trajectory.gradient_similarity(named, p, grads, weights={"other": 1.0})
