"""A soft actor-critic whose action is a vector of task weights, for IGBv2.

Everything is a pure function of pytrees. One state of the environment is the vector
of task losses ``[T]``; one action ``[T]`` is positive and sums to the number of
present tasks, ``n softmax(u)`` with ``u`` Gaussian.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Scalar

from mtljax.types import Number

Density: TypeAlias = Literal["tanh_compat", "logistic_normal"]
Layers: TypeAlias = tuple[dict[str, Array], ...]

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Transition(NamedTuple):
    """One step of the environment; with a leading axis, many."""

    losses: Float[Array, "*rows tasks"]
    weights: Float[Array, "*rows tasks"]
    reward: Float[Array, "*rows"]
    next_losses: Float[Array, "*rows tasks"]
    present: Array  # bool: tasks that `weights` weigh
    next_present: Array  # bool: tasks that the next action weighs


class Memory(NamedTuple):
    """A ring of transitions."""

    rows: Transition  # every leaf leads with the capacity
    written: Int[Array, ""]  # transitions ever written


class Agent(NamedTuple):
    """Networks, temperature and the three optimisers of the agent."""

    actor: Layers  # T -> 2 T: means and log standard deviations
    critics: tuple[Layers, Layers]  # 2 T -> 1
    targets: tuple[Layers, Layers]
    log_temperature: Float[Array, ""]
    actor_opt: Any
    critic_opt: Any
    temperature_opt: Any


def init_mlp(key: PRNGKeyArray, sizes: Sequence[int]) -> Layers:
    """Dense layers that start uniform in ``±1/√fan_in``, as in PyTorch."""
    pairs = list(itertools.pairwise(sizes))
    # One draw for all of them: it is drawing that takes time to compile.
    total = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairs)
    numbers = jax.random.uniform(key, (total,), jnp.float32, -1, 1)
    layers, at = [], 0
    for fan_in, fan_out in pairs:
        stop = at + (fan_in + 1) * fan_out
        block = numbers[at:stop].reshape(fan_in + 1, fan_out) / math.sqrt(fan_in)
        layers.append({"kernel": block[:-1], "bias": block[-1]})
        at = stop
    return tuple(layers)


def mlp(
    layers: Layers, x: Float[Array, "*rows inputs"]
) -> Float[Array, "*rows outputs"]:
    """Applies the layers, with ReLU between them."""
    for i, layer in enumerate(layers):
        x = jnp.matmul(jax.nn.relu(x) if i else x, layer["kernel"])
        x = x + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
    return x


# One program for all agents of a shape, where steps are not jitted either.
@functools.partial(jax.jit, static_argnames=("num_tasks", "hidden"))
def init_networks(
    key: PRNGKeyArray, num_tasks: int, hidden: tuple[int, ...]
) -> tuple[Layers, Layers, Layers]:
    """The actor and two critics."""
    keys = jax.random.split(key, 3)
    outgoing = (num_tasks, *hidden, 2 * num_tasks)
    sizes = (outgoing, *2 * ((2 * num_tasks, *hidden, 1),))
    actor, first, second = (
        init_mlp(k, size) for k, size in zip(keys, sizes, strict=True)
    )
    return actor, first, second


def init_agent(
    key: PRNGKeyArray,
    num_tasks: int,
    hidden: Sequence[int],
    initial_temperature: Number,
    optimizer: optax.GradientTransformation,
) -> Agent:
    """A fresh agent; the targets start as the critics."""
    actor, *critics = init_networks(key, num_tasks, tuple(hidden))
    critics = (critics[0], critics[1])
    log_temperature = jnp.log(jnp.asarray(initial_temperature, jnp.float32))
    return Agent(
        actor=actor,
        critics=critics,
        targets=critics,
        log_temperature=log_temperature,
        actor_opt=optimizer.init(actor),
        critic_opt=optimizer.init(critics),
        temperature_opt=optimizer.init(log_temperature),
    )


def init_memory(num_tasks: int, capacity: int) -> Memory:
    """An empty ring of ``capacity`` transitions, ``capacity (5 T + 1)`` numbers."""
    zeros = jnp.zeros((capacity, num_tasks), jnp.float32)
    nobody = jnp.zeros((capacity, num_tasks), bool)
    reward = jnp.zeros(capacity, jnp.float32)
    rows = Transition(zeros, zeros, reward, zeros, nobody, nobody)
    return Memory(rows, jnp.int32(0))


def write(memory: Memory, row: Transition, keep: Scalar) -> Memory:
    """Writes one transition over the oldest, if ``keep``.

    The choice is made on the row: a choice between two whole rings would copy one.
    """
    at = memory.written % memory.rows.reward.shape[0]
    rows = jax.tree.map(
        lambda ring, new: ring.at[at].set(jnp.where(keep, new, ring[at])),
        memory.rows,
        row,
    )
    return Memory(rows, memory.written + keep.astype(jnp.int32))


def stored(memory: Memory) -> Int[Array, ""]:
    """Transitions in the ring."""
    return jnp.minimum(memory.written, memory.rows.reward.shape[0])


def draw(
    key: PRNGKeyArray, memory: Memory, shape: tuple[int, ...]
) -> Int[Array, "..."]:
    """Indices of stored transitions, uniformly with replacement."""
    # Of 2^32 numbers the remainder favours no row by more than capacity / 2^32.
    bits = jax.random.bits(key, shape, jnp.uint32)
    at = bits % jnp.maximum(stored(memory), 1).astype(jnp.uint32)
    return at.astype(jnp.int32)


def take(memory: Memory, at: Int[Array, " rows"]) -> Transition:
    """The transitions at these indices of the ring."""
    return jax.tree.map(
        lambda ring: ring.at[at].get(mode="promise_in_bounds"), memory.rows
    )


def free_logits(present: Array, density: Density) -> Array:
    """The logits that are drawn: all of the present tasks, or all but the last."""
    if density == "tanh_compat":
        return present
    later = jnp.flip(jnp.cumsum(jnp.flip(present, -1), -1), -1)
    return present & (later > 1)


def squash(
    mean: Array, log_std: Array, noise: Array, present: Array, density: Density
) -> tuple[Array, Array]:
    """Action ``n softmax(u)``, ``u = μ + σ ε``, and its log-density.

    ``"tanh_compat"`` is what the authors' code computes: the density of ``tanh(u)``,
    though the action is a softmax. ``"logistic_normal"`` is the density of the action:
    the last present logit is fixed at 0, the others are free, and
    ``log p(a) = log N(u) - Σ_j log softmax(u)_j - (n - 1) log n``.

    Args:
      mean: μ, ``[..., T]``.
      log_std: log σ, ``[..., T]``.
      noise: ε, ``[..., T]``, standard normal.
      present: Tasks that are weighed, bool ``[..., T]``; n of them.
      density: Which log-density.

    Returns:
      Weights ``[..., T]``, zero where absent, and the log-density ``[...]``.
    """
    free = free_logits(present, density)
    drawn = mean + jnp.exp(log_std) * noise
    logits = jnp.where(free, drawn, 0)
    count = jnp.maximum(present.sum(-1, keepdims=True), 1).astype(mean.dtype)
    total = jax.nn.logsumexp(logits, axis=-1, where=present, keepdims=True)
    log_share = jnp.where(present, logits - jnp.where(present, total, 0), 0)
    weights = jnp.where(present, count * jnp.exp(log_share), 0)
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = jnp.where(free, log_normal, 0).sum(-1)
    if density == "tanh_compat":
        slope = 2 * (math.log(2) - drawn - jax.nn.softplus(-2 * drawn))
        return weights, log_prob - jnp.where(free, slope, 0).sum(-1)
    volume = (count - 1) * jnp.log(count)
    return weights, log_prob - log_share.sum(-1) - volume[..., 0]


def act(
    actor: Layers, losses: Array, present: Array, noise: Array, density: Density
) -> tuple[Array, Array]:
    """The action at ``losses`` ``[..., T]`` for a normal ``noise``; its log-density."""
    mean, log_std = jnp.split(mlp(actor, losses), 2, axis=-1)
    log_std = jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)
    return squash(mean, log_std, noise, present, density)


def smaller_value(
    critics: tuple[Layers, Layers], losses: Array, weights: Array
) -> Array:
    """The smaller of the two critics' values, ``[...]``."""
    pair = jnp.concatenate([losses, weights], axis=-1)
    first, second = (mlp(critic, pair)[..., 0] for critic in critics)
    return jnp.minimum(first, second)


def masked_mean(values: Array, valid: Array) -> Array:
    """Mean of the valid rows."""
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def critic_loss(
    critics: tuple[Layers, Layers], batch: Transition, target: Array, valid: Array
) -> Array:
    """Sum of the two critics' mean squared errors to the target ``[rows]``."""
    pair = jnp.concatenate([batch.losses, batch.weights], axis=-1)
    errors = [jnp.square(mlp(critic, pair)[..., 0] - target) for critic in critics]
    return masked_mean(errors[0] + errors[1], valid)


def update_agent(
    agent: Agent,
    batch: Transition,
    valid: Array,
    noise: Array,
    *,
    optimizer: optax.GradientTransformation,
    discount: Number,
    tau: Number,
    density: Density,
    target_entropy: Number | None,
) -> Agent:
    """One update of critics, actor, temperature and targets, in this order.

    Args:
      agent: What is updated.
      batch: Transitions ``[rows, ...]``.
      valid: Rows that count, bool ``[rows]``.
      noise: Standard normal, ``[2, rows, T]``: for the next actions, and for those
        that the actor is trained on.
      optimizer: Of each of the three.
      discount: γ.
      tau: τ, the share of the critics that their targets take over.
      density: See :func:`squash`.
      target_entropy: H̄; None is minus the number of free logits.

    Returns:
      The updated agent.
    """
    temperature = jnp.exp(agent.log_temperature)

    next_weights, next_log_prob = act(
        agent.actor, batch.next_losses, batch.next_present, noise[0], density
    )
    value = smaller_value(agent.targets, batch.next_losses, next_weights)
    target = batch.reward + discount * (value - temperature * next_log_prob)
    grad = jax.grad(critic_loss)(agent.critics, batch, target, valid)
    step, critic_opt = optimizer.update(grad, agent.critic_opt, agent.critics)
    critics: Any = optax.apply_updates(agent.critics, step)

    def actor_loss(actor):
        weights, log_prob = act(actor, batch.losses, batch.present, noise[1], density)
        value = smaller_value(critics, batch.losses, weights)
        return masked_mean(temperature * log_prob - value, valid), log_prob

    grad, log_prob = jax.grad(actor_loss, has_aux=True)(agent.actor)
    step, actor_opt = optimizer.update(grad, agent.actor_opt, agent.actor)
    actor: Any = optax.apply_updates(agent.actor, step)

    if target_entropy is None:
        wanted = -free_logits(batch.present, density).sum(-1).astype(log_prob.dtype)
    else:
        wanted = jnp.full_like(log_prob, target_entropy)
    grad = -masked_mean(log_prob + wanted, valid)  # of -log α (log π + H̄)
    step, temperature_opt = optimizer.update(
        grad.astype(agent.log_temperature.dtype),
        agent.temperature_opt,
        agent.log_temperature,
    )
    log_temperature: Any = optax.apply_updates(agent.log_temperature, step)

    def follow(critic, target):  # a wider tau does not change the dtype
        return (tau * critic + (1 - tau) * target).astype(target.dtype)

    targets = jax.tree.map(follow, critics, agent.targets)
    return Agent(
        actor=actor,
        critics=critics,
        targets=targets,
        log_temperature=log_temperature,
        actor_opt=actor_opt,
        critic_opt=critic_opt,
        temperature_opt=temperature_opt,
    )


def train(
    agent: Agent,
    memory: Memory,
    key: PRNGKeyArray,
    num_updates: Int[Array, ""],
    num_rows: Int[Array, ""],
    *,
    max_updates: int,
    max_rows: int,
    **options: Any,
) -> Agent:
    """``num_updates`` updates on fresh mini-batches of ``num_rows`` transitions.

    Both numbers are traced: ``max_rows`` are drawn and the rest is masked.
    """
    valid = jnp.arange(max_rows) < num_rows
    # All random numbers at once: in the loop each draw costs a dozen tiny kernels.
    row_key, noise_key = jax.random.split(key)
    rows = draw(row_key, memory, (max_updates, max_rows))
    num_tasks = memory.rows.losses.shape[-1]
    shape = (max_updates, 2, max_rows, num_tasks)
    noise = jax.random.normal(noise_key, shape, jnp.float32)

    def body(i, agent):
        return update_agent(agent, take(memory, rows[i]), valid, noise[i], **options)

    return jax.lax.fori_loop(0, num_updates, body, agent)


@jax.custom_batching.custom_vmap
def any_run(flag: Scalar) -> Scalar:
    """The flag itself; under ``vmap``, whether any of the runs has it.

    A ``cond`` on a batched flag would compute both branches at every step, and the
    training branch costs as much as fifty steps. Runs keep their own flag beside it.
    """
    return flag


@any_run.def_vmap
def _any_run_vmap(axis_size: int, in_batched: Any, flag: Any) -> tuple[Any, Any]:
    del axis_size
    return any_run(flag.any(0) if in_batched[0] else flag), False
