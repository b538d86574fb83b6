"""Soft actor-critic with task weights as actions, for IGBv2.

All functions are pure functions of pytrees. A state of the environment is the vector of
the task losses ``[T]``. An action is ``n softmax(u)`` with Gaussian ``u``, a positive
vector ``[T]`` that sums to the number n of present tasks.
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
    """One step of the environment, or several with a leading axis."""

    losses: Float[Array, "*rows tasks"]
    weights: Float[Array, "*rows tasks"]
    reward: Float[Array, "*rows"]
    next_losses: Float[Array, "*rows tasks"]
    present: Array  # bool: present tasks, to which `weights` apply
    next_present: Array  # bool: present tasks of the next action


class Memory(NamedTuple):
    """A replay buffer of transitions."""

    rows: Transition  # every leaf has a leading axis of length capacity
    written: Int[Array, ""]  # number of transitions ever written


class Agent(NamedTuple):
    """Networks, temperature and the three optimizer states of the agent."""

    actor: Layers  # T -> 2 T: means and log standard deviations
    critics: tuple[Layers, Layers]  # 2 T -> 1
    targets: tuple[Layers, Layers]
    log_temperature: Float[Array, ""]
    actor_opt: Any
    critic_opt: Any
    temperature_opt: Any


def init_mlp(key: PRNGKeyArray, sizes: Sequence[int]) -> Layers:
    """Initialises dense layers uniformly in ``±1/√fan_in``, as in PyTorch."""
    pairs = list(itertools.pairwise(sizes))
    # One call for all layers, because sampling dominates the compile time.
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


# One program for all agents of a shape, also if the caller does not use jit.
@functools.partial(jax.jit, static_argnames=("num_tasks", "hidden"))
def init_networks(
    key: PRNGKeyArray, num_tasks: int, hidden: tuple[int, ...]
) -> tuple[Layers, Layers, Layers]:
    """Initialises the actor and two critics."""
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
    """Initialises an agent. The target critics are equal to the critics."""
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
    """Returns an empty replay buffer with ``capacity (5 T + 1)`` numbers."""
    zeros = jnp.zeros((capacity, num_tasks), jnp.float32)
    nobody = jnp.zeros((capacity, num_tasks), bool)
    reward = jnp.zeros(capacity, jnp.float32)
    rows = Transition(zeros, zeros, reward, zeros, nobody, nobody)
    return Memory(rows, jnp.int32(0))


def write(memory: Memory, row: Transition, keep: Scalar) -> Memory:
    """Replaces the oldest transition by a new one, if ``keep``.

    The selection is between two rows, because a selection between two buffers would
    copy one of them.
    """
    at = memory.written % memory.rows.reward.shape[0]
    rows = jax.tree.map(
        lambda ring, new: ring.at[at].set(jnp.where(keep, new, ring[at])),
        memory.rows,
        row,
    )
    return Memory(rows, memory.written + keep.astype(jnp.int32))


def stored(memory: Memory) -> Int[Array, ""]:
    """Returns the number of stored transitions."""
    return jnp.minimum(memory.written, memory.rows.reward.shape[0])


def draw(
    key: PRNGKeyArray, memory: Memory, shape: tuple[int, ...]
) -> Int[Array, "..."]:
    """Samples indices of stored transitions uniformly with replacement."""
    # The remainder of 32 random bits favours no row by more than capacity / 2^32.
    bits = jax.random.bits(key, shape, jnp.uint32)
    at = bits % jnp.maximum(stored(memory), 1).astype(jnp.uint32)
    return at.astype(jnp.int32)


def take(memory: Memory, at: Int[Array, " rows"]) -> Transition:
    """Returns the transitions at the given indices of the buffer."""
    return jax.tree.map(
        lambda ring: ring.at[at].get(mode="promise_in_bounds"), memory.rows
    )


def free_logits(present: Array, density: Density) -> Array:
    """Returns the sampled logits: all present tasks, or all but the last one."""
    if density == "tanh_compat":
        return present
    later = jnp.flip(jnp.cumsum(jnp.flip(present, -1), -1), -1)
    return present & (later > 1)


def squash(
    mean: Array, log_std: Array, noise: Array, present: Array, density: Density
) -> tuple[Array, Array]:
    """Computes the action ``n softmax(u)``, ``u = μ + σ ε``, and its log-density.

    ``"tanh_compat"`` is the density in the authors' code, that of ``tanh(u)``, although
    the action is a softmax. ``"logistic_normal"`` is the density of the action. The
    logit of the last present task is then fixed at 0, the others are free, and
    ``log p(a) = log N(u) - Σ_j log softmax(u)_j - (n - 1) log n``.

    Args:
      mean: Mean μ, shape ``[..., T]``.
      log_std: Logarithm of σ, shape ``[..., T]``.
      noise: Standard normal noise ε, shape ``[..., T]``.
      present: The n present tasks, booleans of shape ``[..., T]``.
      density: Name of the log-density.

    Returns:
      The weights of shape ``[..., T]``, zero for absent tasks, and the log-density of
      shape ``[...]``.
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
    """Computes the action and its log-density for losses of shape ``[..., T]``."""
    mean, log_std = jnp.split(mlp(actor, losses), 2, axis=-1)
    log_std = jnp.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)
    return squash(mean, log_std, noise, present, density)


def smaller_value(
    critics: tuple[Layers, Layers], losses: Array, weights: Array
) -> Array:
    """Returns the smaller value of the two critics, shape ``[...]``."""
    pair = jnp.concatenate([losses, weights], axis=-1)
    first, second = (mlp(critic, pair)[..., 0] for critic in critics)
    return jnp.minimum(first, second)


def masked_mean(values: Array, valid: Array) -> Array:
    """Returns the mean over the valid rows."""
    return jnp.where(valid, values, 0).sum() / jnp.maximum(valid.sum(), 1)


def critic_loss(
    critics: tuple[Layers, Layers], batch: Transition, target: Array, valid: Array
) -> Array:
    """Sums the mean squared errors of both critics. The target has shape ``[rows]``."""
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
    """Updates the critics, the actor, the temperature and the targets, in this order.

    Args:
      agent: The agent.
      batch: Transitions with leaves of shape ``[rows, ...]``.
      valid: Rows that are used, booleans of shape ``[rows]``.
      noise: Standard normal noise, shape ``[2, rows, T]``, for the next actions and for
        the actions in the loss of the actor.
      optimizer: Optimizer of the critics, the actor and the temperature.
      discount: Discount factor γ.
      tau: Rate τ of the moving average of the target critics.
      density: Name of the log-density, see :func:`squash`.
      target_entropy: Target entropy H̄. By default minus the number of free logits.

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
    grad = -masked_mean(log_prob + wanted, valid)  # gradient of -log α (log π + H̄)
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
    """Runs ``num_updates`` updates on mini-batches of ``num_rows`` transitions.

    Both numbers are traced. ``max_rows`` transitions are sampled, and those after
    ``num_rows`` are masked.
    """
    valid = jnp.arange(max_rows) < num_rows
    # One call for all random numbers. A call in the loop runs about a dozen small
    # kernels.
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
    """Returns the flag. Under ``vmap`` returns whether the flag of any run is True.

    A ``cond`` on a batched flag would compute both branches at every step, and the
    training branch costs as much as fifty steps. Each run also keeps its own flag.
    """
    return flag


@any_run.def_vmap
def _any_run_vmap(axis_size: int, in_batched: Any, flag: Any) -> tuple[Any, Any]:
    del axis_size
    return any_run(flag.any(0) if in_batched[0] else flag), False
