"""What belongs to a batch happens once a batch, whatever the number of inner steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from alternating.problem import TASKS

from mtljax.alternating import StepOptions, alternate

KEY = jax.random.key(1)
LABELS = {"w": "shared", "h": "own"}
START = {"w": jnp.zeros(()), "h": jnp.zeros(TASKS)}
RATES = jnp.array([1.0, 0.1, 0.01, 0.001])


def ramp(params, task, batch):
    del task, batch
    return params["w"] + params["h"]


def lr(count):
    return RATES[jnp.minimum(count, 3)]


OPTIMIZERS = {
    "schedule": optax.sgd(lr),
    "injected": optax.inject_hyperparams(optax.sgd)(lr),
}


def moves(steps, batches=4, params=START):
    """Displacements of w and of the heads in every batch."""
    step = jax.jit(lambda p, s: steps.step(ramp, p, s, None))
    state, found = steps.init(params), []
    for _ in range(batches):
        _, new, state = step(params, state)
        found.append(jax.tree.map(lambda n, o: np.asarray(n - o), new, params))
        params = new
    return np.array([f["w"] for f in found]), np.stack([f["h"] for f in found]), state


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("schedule", {"state": "shared"}),
        ("injected", {"state": "shared"}),
        ("schedule", {"schedule": "per_batch"}),
    ],
)
def test_learning_rates_follow_the_batches(kind, options):
    steps = alternate(OPTIMIZERS[kind], TASKS, order="fixed", labels=LABELS, **options)
    w, h, _ = moves(steps)
    count = steps.cost.backward
    assert count == (1 if "schedule" in options else TASKS)
    np.testing.assert_allclose(w, -count * RATES, rtol=1e-3)
    active = np.eye(TASKS)[:4] if "schedule" in options else np.ones((4, TASKS))
    np.testing.assert_allclose(h, -active * RATES[:, None], rtol=1e-3)


@pytest.mark.parametrize("schedule", ["same_batch", "per_batch"])
def test_decay_once_a_batch(schedule):
    decay = optax.chain(
        optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(lr)
    )
    steps = alternate(
        optax.sgd(0.0),
        TASKS,
        schedule=schedule,
        order="fixed",
        labels=LABELS,
        options=StepOptions(decay=decay),
    )
    params = {"w": jnp.ones(()), "h": jnp.ones(TASKS)}
    w, h, _ = moves(steps, 3, params)
    factors = 1 - 0.5 * np.asarray(RATES[:3])
    values = np.cumprod(factors)
    np.testing.assert_allclose(1 + np.cumsum(w), values, rtol=1e-6)
    # Heads decay with their batches, that is, where they step.
    if schedule == "per_batch":
        expected = -np.eye(TASKS)[:3] * 0.5 * RATES[:3, None]
    else:
        expected = np.diff(values, prepend=1)[:, None] * np.ones(TASKS)
    np.testing.assert_allclose(h, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "groups"),
    [("last", TASKS), ("scaled", TASKS), ("scaled", 2), ("batch", 2)],
)
def test_running_averages_move_once_a_batch(policy, groups):
    decay = 0.9
    steps = alternate(
        optax.sgd(0.1),
        TASKS,
        key=KEY,
        groups=groups,
        labels=LABELS,
        options=StepOptions(batch_norm=policy, batch_norm_decay=decay),
    )

    def loss(params, task, batch, *, batch_stats):
        seen = batch + params["w"]
        new = {
            "mean": decay * batch_stats["mean"] + (1 - decay) * seen,
            "count": batch_stats["count"] + 1,
        }
        return ramp(params, task, batch), new

    stats = {"mean": jnp.zeros(()), "count": jnp.int32(0)}
    step = jax.jit(lambda p, s, x, b: steps.step(loss, p, s, x, batch_stats=b))
    (losses, new), _, _ = step(START, steps.init(START), 2.0, stats)
    assert losses.shape == (TASKS,)
    # Where θ was in the passes, from the sizes of the groups before.
    sizes = np.asarray(steps.plan(steps.init(START)).members < TASKS).sum(1)
    seen = 2.0 - 0.1 * np.concatenate([[0], np.cumsum(sizes)[:-1]])
    if policy == "last":
        expected, count = (1 - decay) * seen[-1], 1
    elif policy == "scaled":
        each, expected, count = decay ** (1 / groups), 0.0, groups
        for value in seen:
            expected = each * expected + (1 - each) * value
    else:
        expected, count = 0.0, 0
    np.testing.assert_allclose(new["mean"], expected, rtol=1e-5, atol=1e-7)
    assert int(new["count"]) == count


def test_dropout_keys_are_fresh_for_every_inner_step():
    steps = alternate(optax.sgd(0.0), TASKS, groups=3, key=KEY, labels=LABELS)

    def loss(params, task, batch, *, key):
        return ramp(params, task, batch) * 0 + jax.random.uniform(key)

    step = jax.jit(lambda p, s: steps.step(loss, p, s, None, with_key=True))
    state, seen = steps.init(START), []
    for _ in range(2):
        members = np.asarray(steps.plan(state).members)
        losses, _, state = step(START, state)
        for group in members:  # one forward pass, one key
            (value,) = set(np.asarray(losses)[group[group < TASKS]].tolist())
            seen.append(value)
    assert len(set(seen)) == 6
