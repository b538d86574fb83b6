"""IGBv2 against a float64 reference: ring, rewards, networks and temperature.

The reference is written in NumPy from the paper (arXiv 2307.15429) and from the
description of the authors' code: 0-based steps, n steps an epoch, gradients derived by
hand. It shares with the implementation the first weights and the random numbers only.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtljax

TASKS, EPOCH, STEPS, PERIOD = 3, 4, 60, 4
CAPACITY, UPDATES, BATCH, HIDDEN, RATE = 20, 3, 8, (16, 12), 1e-3
DISCOUNT, TAU, TEMPERATURE = 0.99, 0.005, 0.2
SCHEDULE = optax.piecewise_constant_schedule(0.1, {20: 0.5, 40: 0.5})
KEY = jax.random.key(3)


def losses_of_a_run():
    """Falling losses of three scales, with noise of batches."""
    rng = np.random.default_rng(0)
    fall = np.exp(-np.arange(STEPS)[:, None] / np.array([15.0, 60.0, 200.0]))
    noise = rng.uniform(0.8, 1.2, (STEPS, TASKS))
    return (np.array([2.0, 0.9, 0.3]) * (0.1 + fall) * noise).astype(np.float32)


# --- networks and their gradients -----------------------------------------------------


def forward(layers, x):
    """The output, and the input of every layer."""
    inputs = []
    for i, (kernel, bias) in enumerate(layers):
        x = np.maximum(x, 0) if i else x
        inputs.append(x)
        x = x @ kernel + bias
    return x, inputs


def backward(layers, inputs, slope):
    """Gradients of the layers and of the input, from the slope of the output."""
    grads = []
    for i in reversed(range(len(layers))):
        grads.append((inputs[i].T @ slope, slope.sum(0)))
        slope = slope @ layers[i][0].T
        if i:
            slope = slope * (inputs[i] > 0)
    return grads[::-1], slope


def softmax(u):
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Policy:
    """Actions at losses ``s``: ``n softmax(u)``, ``u = μ + σ ε``, density of tanh."""

    def __init__(self, actor, s, noise):
        self.actor, self.noise = actor, noise
        out, self.inputs = forward(actor, s)
        mean, raw = np.split(out, 2, -1)
        log_std = raw.clip(-20, 2)
        self.inside = (raw > -20) & (raw < 2)
        self.std = np.exp(log_std)
        self.u = mean + self.std * noise
        self.action = TASKS * softmax(self.u)
        normal = -0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi)
        tanh = 2 * (np.log(2) - self.u - np.logaddexp(0, -2 * self.u))
        self.log_prob = (normal - tanh).sum(-1)

    def gradients(self, slope_action, slope_log_prob):
        """Of the actor, from the slopes of the actions and of their log π."""
        a = self.action
        inner = (slope_action * a).sum(-1, keepdims=True) / TASKS
        slope_u = a * (slope_action - inner)
        slope_u = slope_u + slope_log_prob[:, None] * 2 * np.tanh(self.u)
        slope_log_std = slope_u * self.std * self.noise - slope_log_prob[:, None]
        both = np.concatenate([slope_u, slope_log_std * self.inside], -1)
        return backward(self.actor, self.inputs, both)[0]


class Adam:
    """Kingma and Ba, with the usual constants."""

    def __init__(self):
        self.count, self.moments = 0, {}

    def step(self, name, value, grad):
        m, v = self.moments.get(name, (np.zeros_like(value), np.zeros_like(value)))
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        self.moments[name] = m, v
        m, v = m / (1 - 0.9**self.count), v / (1 - 0.999**self.count)
        return value - RATE * m / (np.sqrt(v) + 1e-8)

    def layers(self, name, layers, grads):
        return [
            tuple(
                self.step((name, i, j), *pair)
                for j, pair in enumerate(zip(layer, grad, strict=True))
            )
            for i, (layer, grad) in enumerate(zip(layers, grads, strict=True))
        ]


@dataclasses.dataclass
class Agent:
    """Soft actor-critic with two critics, their targets and a learned temperature."""

    actor: list
    critics: list
    log_temperature: float

    def __post_init__(self):
        self.targets = [[*critic] for critic in self.critics]
        self.adams = {name: Adam() for name in ("actor", "critics", "temperature")}
        self.updates = 0

    def update(self, batch, noise):
        """One update on ``(s, a, r, s')``; noise ``[2, B, n]``."""
        s, a, r, after = batch
        temperature = np.exp(self.log_temperature)
        for adam in self.adams.values():
            adam.count += 1
        self.updates += 1

        ahead = Policy(self.actor, after, noise[0])
        pair = np.concatenate([after, ahead.action], -1)
        value = np.min([forward(t, pair)[0][:, 0] for t in self.targets], 0)
        wanted = r + DISCOUNT * (value - temperature * ahead.log_prob)
        pair, fresh = np.concatenate([s, a], -1), []
        for k, critic in enumerate(self.critics):
            out, inputs = forward(critic, pair)
            slope = 2 * (out - wanted[:, None]) / len(s)
            grads = backward(critic, inputs, slope)[0]
            fresh.append(self.adams["critics"].layers(k, critic, grads))
        self.critics = fresh

        policy = Policy(self.actor, s, noise[1])
        pair = np.concatenate([s, policy.action], -1)
        found = [forward(critic, pair) for critic in self.critics]
        first = found[0][0] <= found[1][0]
        slope_action = 0.0
        for critic, (_, inputs), chosen in zip(
            self.critics, found, (first, ~first), strict=True
        ):
            slope = backward(critic, inputs, -1.0 * chosen / len(s))[1]
            slope_action = slope_action + slope[:, TASKS:]
        slope_log_prob = np.full(len(s), temperature / len(s))
        grads = policy.gradients(slope_action, slope_log_prob)
        self.actor = self.adams["actor"].layers("actor", self.actor, grads)

        grad = -np.mean(policy.log_prob - TASKS)  # the target entropy is -n
        self.log_temperature = self.adams["temperature"].step(
            "temperature", self.log_temperature, grad
        )
        self.targets = [
            [
                tuple(TAU * q + (1 - TAU) * t for q, t in zip(new, old, strict=True))
                for new, old in zip(critic, target, strict=True)
            ]
            for critic, target in zip(self.critics, self.targets, strict=True)
        ]


# --- a run ----------------------------------------------------------------------------


def wide(layers):
    return [
        (np.asarray(x["kernel"], np.float64), np.asarray(x["bias"], np.float64))
        for x in layers
    ]


def reference_run(losses, state, numbers):
    """Weights, rewards, temperatures and the ring after every step."""
    losses = np.asarray(losses, np.float64)
    agent = Agent(
        actor=wide(state.agent.actor),
        critics=[wide(critic) for critic in state.agent.critics],
        log_temperature=np.log(TEMPERATURE),
    )
    base, ring, written = None, [None] * CAPACITY, 0
    before, action, found = None, None, []
    for t, loss in enumerate(losses):
        reward = None
        if t == 2 * EPOCH:  # the mean over the second epoch
            base = losses[EPOCH : 2 * EPOCH].mean(0)
        if base is not None:
            alpha = 0.1 / (0.1, 0.05, 0.025)[(t >= 20) + (t >= 40)]
            reward = alpha * ((before - loss) / base).min()
            ring[written % CAPACITY] = (before, action, reward, loss)
            written += 1
        size = min(written, CAPACITY)
        rows, noise, drawn = numbers(t, size)
        if t >= 3 * EPOCH and t % PERIOD == 0:
            share = 1 + size / CAPACITY
            count = int(BATCH * share)
            for k in range(int(UPDATES * share)):
                chosen = [ring[i] for i in rows[k, :count]]
                batch = [np.array(column) for column in zip(*chosen, strict=True)]
                agent.update(batch, noise[k, :, :count])
        if t < 5 * EPOCH:
            action = TASKS * softmax(drawn)
        else:
            action = Policy(agent.actor, loss[None], drawn[None]).action[0]
        before = loss
        found.append((action, reward, agent.log_temperature, written, [*ring]))
    return found, agent


def test_fifty_updates_of_the_agent_equal_the_reference():
    phases = mtljax.IGBPhases((EPOCH, 2 * EPOCH), 3 * EPOCH, 5 * EPOCH, STEPS)
    balancer = mtljax.igb_v2(
        TASKS,
        key=KEY,
        phases=phases,
        schedule=SCHEDULE,
        agent=mtljax.IGBAgent(
            capacity=CAPACITY,
            period=PERIOD,
            updates=UPDATES,
            batch_size=BATCH,
            hidden=HIDDEN,
            optimizer=RATE,
            discount=DISCOUNT,
            tau=TAU,
            initial_temperature=TEMPERATURE,
        ),
    )
    losses, start = losses_of_a_run(), balancer.init({})

    def numbers_of(key):
        """The random numbers of a step: rows of the ring, ε of updates, ε of λ."""
        _, train_key, draw_key = jax.random.split(key, 3)
        row_key, noise_key = jax.random.split(train_key)
        bits = jax.random.bits(row_key, (2 * UPDATES, 2 * BATCH), jnp.uint32)
        noise = jax.random.normal(noise_key, (2 * UPDATES, 2, 2 * BATCH, TASKS))
        return bits, noise, jax.random.normal(draw_key, (TASKS,))

    def step(state, x):
        weights, new = balancer.weigh(state, losses=x)
        names = ("log_weights", "reward", "memory", "temperature")
        logged = {name: getattr(new, name) for name in names}
        return new, logged | {"weights": weights, "numbers": numbers_of(state.key)}

    state, logged = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(start, losses)
    logged = jax.tree.map(np.asarray, logged)

    def numbers(t, size):
        bits, noise, drawn = (x[t] for x in logged["numbers"])
        return bits % max(size, 1), noise.astype(float), drawn.astype(float)

    wanted, agent = reference_run(losses, start, numbers)
    assert agent.updates >= 50
    actions, rewards, log_temperatures, written, rings = zip(*wanted, strict=True)
    np.testing.assert_allclose(logged["log_weights"], actions, rtol=2e-4)
    np.testing.assert_allclose(logged["weights"], actions / losses, rtol=2e-4)
    temperatures = np.exp(log_temperatures)
    np.testing.assert_allclose(logged["temperature"], temperatures, rtol=1e-6)
    first = 2 * EPOCH
    assert rewards[first - 1] is None
    rewards = np.array(rewards[first:])
    np.testing.assert_allclose(logged["reward"][first:], rewards, rtol=1e-4, atol=1e-6)
    memory = logged["memory"]
    np.testing.assert_array_equal(memory.written, written)
    assert written[-1] > CAPACITY  # the ring went round
    for t in range(first, STEPS):
        size = min(written[t], CAPACITY)
        columns = zip(*rings[t][:size], strict=True)
        names = ("losses", "weights", "reward", "next_losses")
        for name, column in zip(names, columns, strict=True):
            stored = getattr(memory.rows, name)[t, :size]
            np.testing.assert_allclose(stored, column, rtol=2e-4, atol=1e-6)

    found, fresh = state.agent, start.agent
    networks = [
        (found.actor, fresh.actor, agent.actor),
        *zip(found.critics, fresh.critics, agent.critics, strict=True),
        *zip(found.targets, fresh.targets, agent.targets, strict=True),
    ]
    for now, before, reference in networks:
        pairs = zip(wide(now), wide(before), reference, strict=True)
        for layer, old, new in pairs:
            for a, b, c in zip(layer, old, new, strict=True):
                np.testing.assert_allclose(a, c, atol=1e-5)
                assert np.abs(a - b).max() > 1e-3  # it moved
