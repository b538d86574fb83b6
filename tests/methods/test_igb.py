"""IGB against the paper's numbers: vectors, the agent in float64, a whole training."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtljax
from mtljax.methods import _sac
from mtljax.methods._igb_v1 import igb_v1_log_weights
from mtljax.methods._igb_v2 import igb_v2_reward

BASE = jnp.array([1.95, 0.85, 0.28])
ALL = jnp.ones(3, bool)


# --- vectors ------------------------------------------------------------------------


def test_weights_of_the_gaps():
    losses = jnp.array([1.5, 0.7, 0.22])
    share = igb_v1_log_weights(losses / BASE)
    np.testing.assert_allclose(share, [0.976429, 1.030914, 0.992657], atol=5e-7)
    np.testing.assert_allclose(share @ jnp.log(losses), -1.474803, atol=1e-6)


def test_reward():
    before, after = jnp.array([1.6, 0.72, 0.23]), jnp.array([1.5, 0.75, 0.22])
    reward = functools.partial(igb_v2_reward, before, after, BASE)
    np.testing.assert_allclose(reward(multiplier=2.0), -0.0705882, atol=5e-8)
    drops = np.array([0.1 / 1.95, -0.03 / 0.85, 0.01 / 0.28])
    np.testing.assert_allclose(reward(reduce="mean"), drops.mean(), rtol=1e-4)
    some = jnp.array([True, False, True])
    np.testing.assert_allclose(reward(mask=some), drops[2], rtol=1e-4)
    np.testing.assert_allclose(
        reward(mask=some, reduce="mean"), drops[[0, 2]].mean(), rtol=1e-4
    )
    assert reward(mask=~ALL) == 0


MEAN, LOG_STD = jnp.array([0.1, -0.2, 0.3]), jnp.array([-0.5, 0.0, 0.2])
NOISE = jnp.array([0.3, -1.0, 0.5])


def test_action_and_the_density_of_the_authors_code():
    weights, log_prob = _sac.squash(MEAN, LOG_STD, NOISE, ALL, "tanh_compat")
    np.testing.assert_allclose(weights, [0.96698, 0.21969, 1.81333], atol=5e-6)
    np.testing.assert_allclose(log_prob, -1.125921, atol=1e-6)


SUBSETS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("present", SUBSETS)
def test_logistic_normal_is_the_density_of_the_action(present):
    """Against the Jacobian of the map, by central differences in float64."""
    weights, log_prob = _sac.squash(
        MEAN, LOG_STD, NOISE, jnp.array(present), "logistic_normal"
    )
    tasks = np.flatnonzero(present)
    assert (np.asarray(weights) > 0).tolist() == list(present)
    np.testing.assert_allclose(weights.sum(), len(tasks), rtol=1e-6)
    free = tasks[:-1]
    mean, std = (np.asarray(x, np.float64) for x in (MEAN, np.exp(LOG_STD)))
    noise = np.asarray(NOISE, np.float64)[free]
    drawn = mean[free] + std[free] * noise

    def action(u):
        e = np.exp(np.append(u, 0.0))
        return (len(tasks) * e / e.sum())[:-1]

    h = 1e-6 * np.eye(len(free))
    jacobian = np.array([(action(drawn + d) - action(drawn - d)) / 2e-6 for d in h])
    normal = -0.5 * noise**2 - np.log(std[free]) - 0.5 * math.log(2 * math.pi)
    volume = np.linalg.slogdet(jacobian)[1] if len(free) else 0.0
    np.testing.assert_allclose(log_prob, normal.sum() - volume, atol=2e-5)
    if len(free):
        np.testing.assert_allclose(np.asarray(weights)[free], action(drawn), rtol=1e-5)


def test_actions_sum_to_the_number_of_present_tasks():
    rng = np.random.default_rng(0)
    mean, log_std, noise = (10 * rng.normal(size=(200, 5)) for _ in range(3))
    present = rng.random((200, 5)) < 0.6
    rows = [jnp.asarray(x, jnp.float32) for x in (mean, log_std.clip(-20, 2), noise)]
    for density in ("tanh_compat", "logistic_normal"):
        weights, log_prob = _sac.squash(*rows, jnp.asarray(present), density)
        np.testing.assert_allclose(weights.sum(-1), present.sum(-1), rtol=1e-5)
        assert (np.asarray(weights)[~present] == 0).all()
        assert np.isfinite(log_prob).all()


# --- one update of the agent, in float64 --------------------------------------------

TASKS, ROWS, HIDDEN = 2, 6, (4, 3)
SETTINGS = {"discount": 0.9, "tau": 0.1}


def network(layers, x):
    for i, layer in enumerate(layers):
        x = (np.maximum(x, 0) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def policy(actor, losses, noise):
    """Action and the code's log-density, with every task present."""
    mean, log_std = np.split(network(actor, losses), 2, -1)
    log_std = log_std.clip(-20, 2)
    u = mean + np.exp(log_std) * noise
    e = np.exp(u - u.max(-1, keepdims=True))
    normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
    slope = 2 * (np.log(2) - u - np.logaddexp(0, -2 * u))
    weights = TASKS * e / e.sum(-1, keepdims=True)
    return weights, (normal - slope).sum(-1)


def both(critics, losses, weights):
    pair = np.concatenate([losses, weights], -1)
    return np.stack([network(critic, pair)[:, 0] for critic in critics])


def slopes(function, tree, h=1e-5):
    """Gradient by central differences of every number of a tree of float64 arrays."""
    leaves, structure = jax.tree.flatten(tree)
    found = []
    for i, leaf in enumerate(leaves):
        grad = np.zeros_like(leaf)
        for at in np.ndindex(leaf.shape):
            ends = []
            for sign in (1, -1):
                moved = leaf.copy()
                moved[at] += sign * h
                new = [*leaves[:i], moved, *leaves[i + 1 :]]
                ends.append(function(jax.tree.unflatten(structure, new)))
            grad[at] = (ends[0] - ends[1]) / (2 * h)
        found.append(grad)
    return jax.tree.unflatten(structure, found)


def reference_update(agent, batch, noise, rate):
    """The five parts of an update, written from the paper's code's description."""
    temperature = np.exp(agent.log_temperature)
    weights, log_prob = policy(agent.actor, batch.next_losses, noise[0])
    value = both(agent.targets, batch.next_losses, weights).min(0)
    target = batch.reward + SETTINGS["discount"] * (value - temperature * log_prob)

    def critic_loss(critics):
        errors = both(critics, batch.losses, batch.weights) - target
        return (errors**2).mean(1).sum()

    descend = lambda x, g: x - rate * g
    critics = jax.tree.map(descend, agent.critics, slopes(critic_loss, agent.critics))

    def actor_loss(actor):
        weights, log_prob = policy(actor, batch.losses, noise[1])
        value = both(critics, batch.losses, weights).min(0)
        return (temperature * log_prob - value).mean()

    actor = jax.tree.map(descend, agent.actor, slopes(actor_loss, agent.actor))
    _, log_prob = policy(agent.actor, batch.losses, noise[1])
    log_temperature = agent.log_temperature + rate * (log_prob - TASKS).mean()
    tau = SETTINGS["tau"]
    mix = lambda q, t: tau * q + (1 - tau) * t
    return agent._replace(
        actor=actor,
        critics=critics,
        targets=jax.tree.map(mix, critics, agent.targets),
        log_temperature=log_temperature,
    )


def test_updates_of_the_agent_equal_the_reference():
    rate, rng = 0.05, np.random.default_rng(0)
    optimizer = optax.sgd(rate)  # so that differences of parameters are gradients
    agent = _sac.init_agent(jax.random.key(1), TASKS, HIDDEN, 0.2, optimizer)
    # Critics of a trained agent differ from their targets.
    agent = agent._replace(targets=jax.tree.map(lambda q: 0.7 * q, agent.critics))
    update = jax.jit(
        functools.partial(
            _sac.update_agent,
            optimizer=optimizer,
            density="tanh_compat",
            target_entropy=None,
            **SETTINGS,
        )
    )
    wide = lambda x: np.asarray(x, np.float64)
    reference = jax.tree.map(wide, agent)
    valid = jnp.arange(ROWS + 2) < ROWS
    for _ in range(2):
        n = ROWS + 2  # the last two rows do not count
        actions = rng.dirichlet(np.ones(TASKS), n) * TASKS
        here = np.ones((n, TASKS), bool)
        batch = _sac.Transition(
            losses=rng.uniform(0.1, 2, (n, TASKS)),
            weights=actions,
            reward=rng.normal(size=n),
            next_losses=rng.uniform(0.1, 2, (n, TASKS)),
            present=here,
            next_present=here,
        )
        noise = rng.normal(size=(2, n, TASKS))
        narrow = jax.tree.map(
            lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), batch
        )
        agent = update(agent, narrow, valid, jnp.asarray(noise, jnp.float32))
        counted = jax.tree.map(lambda x: x[:ROWS], batch)
        reference = reference_update(reference, counted, noise[:, :ROWS], rate)
        for found, wanted in zip(
            jax.tree.leaves(agent), jax.tree.leaves(reference), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


def test_networks_start_as_in_pytorch():
    layers = _sac.init_mlp(jax.random.key(0), (9, 400, 2))
    for layer, fan_in in zip(layers, (9, 400), strict=True):
        bound = 1 / np.sqrt(fan_in)
        both = np.concatenate([np.ravel(layer["kernel"]), layer["bias"]])
        assert np.abs(both).max() <= bound
        assert np.abs(both).max() > 0.99 * bound
        np.testing.assert_allclose(both.std(), bound / np.sqrt(3), rtol=0.06)
    shapes = jax.tree.map(jnp.shape, layers[1])
    assert shapes == {"kernel": (400, 2), "bias": (2,)}


def test_the_ring_overwrites_the_oldest_and_is_sampled_where_it_is_filled():
    memory = _sac.init_memory(1, 4)
    put = jax.jit(_sac.write)
    for i in range(6):
        x = jnp.full(1, float(i))
        here = jnp.ones(1, bool)
        row = _sac.Transition(x, x, jnp.float32(i), x, here, here)
        memory = put(memory, row, jnp.array(i != 1))
        if i == 2:
            at = _sac.draw(jax.random.key(0), memory, (64,))
            drawn = _sac.take(memory, at).reward
            assert set(np.asarray(drawn).tolist()) == {0.0, 2.0}
    assert memory.written == 5
    assert _sac.stored(memory) == 4
    np.testing.assert_array_equal(memory.rows.reward, [5, 2, 3, 4])


# --- a whole training ---------------------------------------------------------------

STEPS, START, STOP, TRAIN, USE, PERIOD, CAPACITY, UPDATES = 40, 3, 6, 9, 18, 4, 16, 2
SCHEDULE = optax.linear_schedule(0.05, 0.01, STEPS)
TARGETS = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 3)), jnp.float32)


def make_agent(key, **options):
    phases = mtljax.IGBPhases((START, STOP), TRAIN, USE, STEPS)
    agent = mtljax.IGBAgent(
        capacity=CAPACITY,
        period=PERIOD,
        updates=UPDATES,
        batch_size=4,
        hidden=(6,),
        # Counts its updates, and compiles faster than Adam.
        optimizer=optax.sgd(optax.constant_schedule(0.05)),
    )
    settings = {"phases": phases, "agent": agent, "schedule": SCHEDULE}
    return mtljax.igb_v2(3, key=key, **(settings | options))


def task_losses(params, target):
    return jnp.square(jnp.sin(params["w"]) @ params["v"] - target) + 0.05


def train(key):
    """Forty steps of a small model; key decides model and agent."""
    model_key, agent_key = jax.random.split(key)
    first, second = jax.random.split(model_key)
    params = {"w": jax.random.normal(first, (4,)), "v": 0.5 * jnp.ones((4, 3))}
    params["v"] += 0.3 * jax.random.normal(second, (4, 3))
    balancer = make_agent(agent_key)
    step_fn = mtljax.value_and_balanced_grad(task_losses, balancer)

    def step(carry, target):
        params, state, count = carry
        losses, grad, state = step_fn(params, state, target)
        move = lambda p, g: p - SCHEDULE(count) * jnp.clip(g, -1, 1)
        logged = {
            "losses": losses,
            "share": state.log_weights,
            "effective": state.task_weights,
            "reward": state.reward,
            "written": state.memory.written,
            "temperature": state.temperature,
            "updates": optax.tree_utils.tree_get(state.agent.critic_opt, "count"),
        }
        return (jax.tree.map(move, params, grad), state, count + 1), logged

    start = (params, balancer.init(params), jnp.int32(0))
    (params, state, _), logged = jax.lax.scan(step, start, TARGETS)
    return params, state.memory, state.base, logged


@functools.cache
def single_runs():
    """Eight runs, one after the other, without a transfer between host and device."""
    run = jax.jit(train)
    keys = [jax.random.key(i) for i in range(8)]
    runs = [run(keys[0])]
    with jax.transfer_guard("disallow"):
        runs += [run(key) for key in keys[1:]]
        jax.block_until_ready(runs)
    return runs


def test_seeds_are_a_vmap_axis_of_the_whole_training():
    keys = jnp.stack([jax.random.key(i) for i in range(8)])
    together = jax.jit(jax.vmap(train))(keys)
    for i, alone in enumerate(single_runs()):
        for one, many in zip(
            jax.tree.leaves(alone), jax.tree.leaves(together), strict=True
        ):
            np.testing.assert_allclose(many[i], one, rtol=1e-3, atol=1e-4)


def test_the_phases_of_a_run():
    for _, memory, base, rows in single_runs():
        logged = {k: np.asarray(v, np.float64) for k, v in rows.items()}
        losses, share = logged["losses"], logged["share"]
        # λ sums to T, and the weights of the gradients are λ/L.
        np.testing.assert_allclose(share.sum(1), 3, rtol=1e-5)
        np.testing.assert_allclose(logged["effective"], share / losses, rtol=1e-5)
        assert (np.diff(share, axis=0) != 0).any(1).all()  # redrawn at every step
        # The reference is the mean of the window's batches, and stays.
        np.testing.assert_allclose(base.mean, losses[START:STOP].mean(0), rtol=1e-5)
        # Step t ends the transition of step t - 1, from the end of the window on.
        steps = np.arange(STEPS)
        written = np.maximum(steps - STOP + 1, 0)
        np.testing.assert_array_equal(logged["written"], written)
        alpha = SCHEDULE(0) / np.array([SCHEDULE(t) for t in steps])
        drops = (losses[:-1] - losses[1:]) / losses[START:STOP].mean(0)
        rewards = alpha[1:] * drops.min(1)
        np.testing.assert_allclose(
            logged["reward"][STOP:], rewards[STOP - 1 :], rtol=1e-3, atol=1e-4
        )
        for t in range(STEPS - CAPACITY, STEPS):
            row = (written[t] - 1) % CAPACITY
            stored = jax.tree.map(lambda ring, row=row: ring[row], memory.rows)
            for found, wanted in (
                (stored.losses, losses[t - 1]),
                (stored.weights, share[t - 1]),
                (stored.reward, rewards[t - 1]),
                (stored.next_losses, losses[t]),
            ):
                np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
        # Every PERIOD steps ⌊UPDATES (1 + stored / capacity)⌋ updates, then none.
        due = (steps >= TRAIN) & (steps % PERIOD == 0)
        filled = np.minimum(written, CAPACITY)
        number = np.where(due, UPDATES + UPDATES * filled // CAPACITY, 0)
        np.testing.assert_array_equal(logged["updates"], np.cumsum(number))
        moved = np.diff(logged["temperature"], prepend=0.2) != 0
        np.testing.assert_array_equal(moved[1:], due[1:])
