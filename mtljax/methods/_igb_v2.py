"""IGBv2: a soft actor-critic agent chooses the weights of the log losses."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mtljax.balancer import (
    Balancer,
    check_choice,
    check_number,
    clone_keys,
    factory,
    from_weights,
)
from mtljax.methods import _igb, _sac
from mtljax.types import Losses, Mask, Number, Scale, Weights

Reduce: TypeAlias = Literal["min", "mean"]
RewardBatch: TypeAlias = Literal["next", "same"]


@dataclasses.dataclass(frozen=True)
class IGBPhases:
    """The phases of a run of :func:`igb_v2`, in steps.

    The phases are the window, the training of the agent, and its use. Each begins at
    the end of the previous phase or later. The defaults are those of the paper
    (`2307.15429 <https://arxiv.org/abs/2307.15429>`_) for its NYUv2 runs, with 398
    steps per epoch. For n steps per epoch, use ``IGBPhases(window=(n, 2 * n))``.

    Attributes:
      window: Range ``(start, stop)`` of steps whose mean losses are ``L_base``, see
        :func:`igb_v1`. By default the second epoch.
      train_from: First step at which the agent is trained. By default one window
        length after the end of the window, the fourth epoch of the paper.
      use_from: First step at which the agent chooses the weights. By default three
        window lengths after the end of the window, the sixth epoch of the paper.
      num_steps: Number of steps of the run, if known. It is used to check the other
        values.

    Examples:
      >>> import jax, mtljax
      >>> phases = mtljax.IGBPhases(window=(100, 200), num_steps=5000)
      >>> mtljax.igb_v2(2, key=jax.random.key(0), phases=phases).num_tasks
      2
    """

    window: tuple[int, int] = (_igb.EPOCH, 2 * _igb.EPOCH)
    train_from: int | None = None
    use_from: int | None = None
    num_steps: int | None = None


@dataclasses.dataclass(frozen=True)
class IGBAgent:
    """The soft actor-critic agent of :func:`igb_v2`.

    The paper (`2307.15429 <https://arxiv.org/abs/2307.15429>`_) states ``capacity``,
    ``period``, ``discount`` and ``optimizer``. The defaults of the other fields are
    those of the authors' code. ``discount``, ``optimizer`` (as a learning rate),
    ``initial_temperature``, ``target_entropy`` and ``tau`` may be traced.

    Attributes:
      density: Log-density of an action. ``"tanh_compat"``, as in the authors' code, is
        the density of ``tanh(u)``, although the action is a softmax.
        ``"logistic_normal"`` is the density of the action (inferred), with the logit of
        the last present task fixed at 0.
      capacity: Number of transitions in the replay buffer. It is small, because old
        losses describe an old model.
      period: Number of steps between two trainings of the agent.
      updates: Number of updates per training with an empty buffer. It increases to
        twice this number for a full buffer.
      batch_size: Number of transitions per update with an empty buffer. It increases to
        twice this number for a full buffer.
      hidden: Widths of the hidden layers of the actor and the critics.
      discount: Discount factor γ.
      optimizer: Optimizer of the actor, the critics and the temperature, as an optax
        transformation or as a learning rate of Adam. The paper uses 1e-4 with MGDA,
        PCGrad or Nash-MTL, and 3e-4 otherwise.
      initial_temperature: Initial weight of the entropy, which is learned.
      target_entropy: Target entropy H̄. By default minus the number of free logits,
        which is ``-T``, or ``-(T - 1)`` for ``"logistic_normal"``.
      tau: Rate of the moving average of the target critics.

    Examples:
      >>> import jax, mtljax
      >>> agent = mtljax.IGBAgent(capacity=5_000, optimizer=1e-4)
      >>> mtljax.igb_v2(3, key=jax.random.key(0), agent=agent).needs
      'losses'

      To inject a field as a hyper-parameter, define a factory with this argument:

      >>> import optax
      >>> def igb(num_tasks, *, key, tau=0.005):
      ...     agent = mtljax.IGBAgent(tau=tau, hidden=(8,), capacity=100)
      ...     return mtljax.igb_v2(num_tasks, key=key, agent=agent)
      >>> schedule = optax.linear_schedule(0.01, 0.001, 1000)
      >>> balancer = mtljax.inject_hyperparams(igb)(
      ...     3, key=jax.random.key(0), tau=schedule)
      >>> float(balancer.init({}).hyperparams["tau"].round(6))
      0.01
    """

    density: _sac.Density = "tanh_compat"
    capacity: int = 10_000
    period: int = 50
    updates: int = 25
    batch_size: int = 128
    hidden: Sequence[int] = (128, 128)
    discount: Number = 0.99
    optimizer: optax.GradientTransformation | Number = 3e-4
    initial_temperature: Number = 0.2
    target_entropy: Number | None = None
    tau: Number = 0.005


PHASES, AGENT = IGBPhases(), IGBAgent()


class IGBv2State(NamedTuple):
    """State of :func:`igb_v2`."""

    key: PRNGKeyArray  # consumed by the next update
    step: Int[Array, ""]
    base: _igb.ReferenceLosses
    previous: Losses  # losses of the last batch in which each task was present
    average: Losses  # their moving average; equal to them with ema=0
    present: Mask  # tasks in the last batch
    log_weights: Weights  # λ of the last batch, the action of the agent
    reward: Float[Array, ""]  # last reward
    observed: Bool[Array, ""]  # whether it was measured on the same batch
    memory: _sac.Memory
    agent: _sac.Agent
    task_weights: Weights  # λ_i / L_i

    @property
    def temperature(self) -> Float[Array, "..."]:
        """Returns the entropy temperature of the agent."""
        return jnp.exp(self.agent.log_temperature)


def igb_v2_reward(
    before: Losses,
    after: Losses,
    base: Losses,
    *,
    multiplier: Number = 1.0,
    mask: Mask | None = None,
    reduce: Reduce = "min",
) -> Float[Array, ""]:
    """Computes ``r = α min_i (before_i - after_i) / L_base,i`` (Eq. 4).

    The minimum is over the tasks of the mask. The reward is 0 if the mask is empty.
    """
    mask = jnp.ones(before.shape, bool) if mask is None else mask
    drop = (before - after) / jnp.where(mask, base, 1)
    if reduce == "min":
        reward = jnp.where(mask, drop, jnp.inf).min()
    else:
        reward = jnp.where(mask, drop, 0).sum() / jnp.maximum(mask.sum(), 1)
    return jnp.where(mask.any(), multiplier * reward, 0)


@factory
def igb_v2(
    num_tasks: int,
    *,
    key: PRNGKeyArray,
    phases: IGBPhases = PHASES,
    base: ArrayLike | None = None,
    schedule: optax.ScalarOrSchedule | None = None,
    lr_multiplier: bool | None = None,
    reward: Reduce = "min",
    reward_batch: RewardBatch = "next",
    ema: Number = 0.0,
    agent: IGBAgent = AGENT,
    scale: Scale = "native",
) -> Balancer:
    """Improvable gap balancing by reinforcement learning (IGBv2).

    The update descends ``Σ_i λ_i log L_i``, as in :func:`igb_v1`. A soft actor-critic
    agent chooses the positive weights λ, whose sum is the number n of present tasks.
    The state of its environment is the vector of the batch losses L. Its action is
    ``λ = n softmax(u)`` with ``u ~ N(μ(L), σ(L)²)``. Its reward is
    ``α_k min_i (L_i(k-1) - L_i(k)) / L_base,i``, the smallest relative decrease of a
    loss from one batch to the next. The factor ``α_k`` is the initial learning rate
    divided by the current one. The run is one trajectory without a terminal state.

    Before step ``phases.use_from``, the weights are sampled: ``λ = n softmax(z)`` with
    ``z ~ N(0, I)``. Transitions are stored after the end of the window. The training of
    the agent starts at step ``phases.train_from`` and takes place every
    ``agent.period`` steps. It consists of ``⌊updates k⌋`` updates with
    ``⌊batch_size k⌋`` transitions each, where ``k = 1 + stored / capacity``. This rule
    is that of the authors' code. The paper does not state it.

    Absent tasks are not in the paper, and their treatment is inferred. The actor reads
    their last losses. λ and the densities are those of the present tasks. The reward is
    that of the present tasks, each relative to its own last loss.

    Args:
      num_tasks: Number of tasks T, or a sequence of T task names.
      key: Key of ``jax.random`` for networks, exploration and replay, stored in the
        state.
      phases: The window whose mean losses are ``L_base``, and the first steps of the
        training and the use of the agent, see :class:`IGBPhases`.
      base: Reference losses ``L_base``, shape ``[T]``, if known.
      schedule: Learning rate of the model for the factor α, a number or an optax
        schedule. The step is the number of updates of this balancer. The first value
        must be positive. With a warm-up from small values α is small, which is probably
        not intended.
      lr_multiplier: Whether rewards are multiplied by α. By default they are if
        ``schedule`` is given, as in the paper. The authors' code has α = 1 on QM9,
        probably by mistake.
      reward: ``"min"`` uses the smallest decrease. ``"mean"`` uses the mean over the
        tasks, an ablation of the paper.
      reward_batch: ``"next"`` compares the losses of two batches, as in the paper.
        ``"same"`` compares the losses of one batch before and after the step, and is
        not in the paper. It requires a call of :func:`mtljax.observe` with the losses
        after the step, which costs one more forward pass. Without this call a step is
        rewarded as with ``"next"``.
      ema: Decay of a moving average of the losses for ``"next"`` rewards. The paper has
        none, which corresponds to 0.
      agent: Networks, replay and training of the agent, see :class:`IGBAgent`.
      scale: ``"native"``, or effective weights ``λ_i / L_i`` normalised to the
        ``"sum"`` or ``"mean"`` scale.

    Returns:
      A :class:`mtljax.Balancer` that reads ``losses``, which must be positive. A step
      costs one backward pass, and one more forward pass with ``reward_batch="same"``.
      Every ``period`` steps the agent is trained in addition. The state has
      ``capacity (5 T + 1)`` numbers and the networks. To avoid a copy of the replay
      buffer in every step, donate the state to the compiled step or use a scan. Under
      ``vmap`` over runs, the agents of all runs are trained in the same steps.

    Raises:
      ValueError: If the window is empty, a phase does not begin inside the run,
        ``lr_multiplier=True`` is given without a schedule, a number is out of range, or
        a shape or a type is wrong.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax, optax
      >>> n = 4  # steps per epoch
      >>> balancer = mtljax.igb_v2(
      ...     2, key=jax.random.key(0),
      ...     phases=mtljax.IGBPhases(window=(n, 2 * n), num_steps=10 * n),
      ...     schedule=optax.cosine_decay_schedule(1e-3, 20 * n),
      ...     agent=mtljax.IGBAgent(hidden=(8,)))
      >>> grads = {"w": jnp.eye(2)}
      >>> update = jax.jit(balancer.update, donate_argnums=1)
      >>> state = balancer.init(grads)
      >>> for _ in range(6 * n):
      ...     _, state = update(grads, state, losses=jnp.array([0.5, 2.0]))
      >>> float(state.log_weights.sum()), int(state.memory.written)
      (2.0, 16)

    References:
      Dai et al., `Improvable Gap Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2307.15429>`_, 2023; Haarnoja et al., `Soft Actor-Critic
      Algorithms and Applications <https://arxiv.org/abs/1812.05905>`_, 2018.
    """
    name = "igb_v2"
    _check_type(name, "phases", phases, IGBPhases)
    _check_type(name, "agent", agent, IGBAgent)
    window, num_steps = phases.window, phases.num_steps
    reference = _igb.make_window(name, num_tasks, window, base, num_steps)
    train_from, use_from = _first_steps(name, reference, phases)
    multiplier = _make_multiplier(name, schedule, lr_multiplier)
    check_choice(name, "reward", reward, Reduce)
    check_choice(name, "reward_batch", reward_batch, RewardBatch)
    _igb.check_decay(name, ema)
    optimizer = _check_agent(name, agent)
    rule = _Rule(
        reference=reference,
        train_from=train_from,
        use_from=use_from,
        multiplier=multiplier,
        reward=reward,
        ema=ema,
        options=agent,
        optimizer=optimizer,
    )

    def init():
        # The clone allows several calls of init, which return the same state.
        agent_key, next_key = jax.random.split(clone_keys(key))
        networks = _sac.init_agent(
            agent_key,
            num_tasks,
            agent.hidden,
            agent.initial_temperature,
            optimizer,
        )
        return rule.init(num_tasks, next_key, networks)

    return from_weights(
        name,
        num_tasks,
        init=init,
        weigh=rule.choose,
        needs="losses",
        native="free",
        scale=scale,
        reads_losses=True,
        positive_losses=True,
        observe=rule.look_again if reward_batch == "same" else None,
    )


class _Rule(NamedTuple):
    """The settings of :func:`igb_v2` and the functions of a step."""

    reference: _igb.Window
    train_from: int
    use_from: int
    multiplier: Callable[[Any], Any]
    reward: Reduce
    ema: Number
    options: IGBAgent
    optimizer: optax.GradientTransformation

    def init(self, num_tasks: int, key: PRNGKeyArray, agent: _sac.Agent) -> IGBv2State:
        """Returns the state before the first batch."""
        zeros = jnp.zeros(num_tasks, jnp.float32)
        return IGBv2State(
            key=key,
            step=jnp.int32(0),
            base=self.reference.init(num_tasks),
            previous=zeros,
            average=zeros,
            present=jnp.zeros(num_tasks, bool),
            log_weights=zeros + 1,
            reward=jnp.float32(0),
            observed=jnp.zeros((), bool),
            memory=_sac.init_memory(num_tasks, self.options.capacity),
            agent=agent,
            task_weights=zeros + 1,
        )

    def comparable(self, state: IGBv2State, mask: Mask) -> Mask:
        """Returns the tasks of the mask with a reference loss and a previous loss."""
        return mask & self.reference.ready(state.base) & (state.base.steps > 0)

    def remember(self, state: IGBv2State, losses: Losses, mask: Mask) -> IGBv2State:
        """Stores the transition of the last step, with the reward of the new losses."""
        tasks = self.comparable(state, mask)
        first = state.base.steps == 0
        average = _igb.smoothed(state.average, losses, first, mask, self.ema)
        found = igb_v2_reward(
            state.average,
            average,
            state.base.mean,
            multiplier=self.multiplier(state.step),
            mask=tasks,
            reduce=self.reward,
        )
        found = jnp.where(state.observed, state.reward, found).astype(jnp.float32)
        keep = tasks.any() | state.observed
        row = _sac.Transition(
            losses=state.previous,
            weights=jnp.where(state.present, state.log_weights, 0),
            reward=found,
            next_losses=jnp.where(mask, losses, state.previous),
            present=state.present,
            next_present=mask,
        )
        return state._replace(
            memory=_sac.write(state.memory, row, keep),
            reward=jnp.where(keep, found, state.reward),
            observed=jnp.zeros((), bool),
            average=average,
        )

    def look_again(
        self, state: IGBv2State, *, losses: Losses, mask: Mask
    ) -> IGBv2State:
        """Computes the reward of the last step from the losses after it."""
        losses = jax.lax.stop_gradient(losses).astype(jnp.float32)
        tasks = self.comparable(state, mask & state.present)
        found = igb_v2_reward(
            state.previous,
            losses,
            state.base.mean,
            multiplier=self.multiplier(state.step - 1),  # factor of the last step
            mask=tasks,
            reduce=self.reward,
        )
        keep = tasks.any()
        return state._replace(
            reward=jnp.where(keep, found, state.reward).astype(jnp.float32),
            observed=state.observed | keep,
        )

    def learn(self, state: IGBv2State, key: PRNGKeyArray) -> _sac.Agent:
        """Trains the agent every ``period`` steps."""
        options = self.options
        size = _sac.stored(state.memory)
        due = state.step >= self.train_from
        due = due & (state.step % options.period == 0) & (size > 0)
        number = options.updates + options.updates * size // options.capacity
        rows = options.batch_size + options.batch_size * size // options.capacity

        def train():
            return _sac.train(
                state.agent,
                state.memory,
                key,
                jnp.where(due, number, 0),
                rows,
                max_updates=2 * options.updates,
                max_rows=2 * options.batch_size,
                optimizer=self.optimizer,
                discount=options.discount,
                tau=options.tau,
                density=options.density,
                target_entropy=options.target_entropy,
            )

        return jax.lax.cond(_sac.any_run(due), train, lambda: state.agent)

    def choose(
        self, state: IGBv2State, *, losses: Losses, gramian: Any, mask: Mask
    ) -> tuple[Weights, IGBv2State]:
        """Stores the last transition, trains the agent and chooses λ."""
        del gramian
        losses = jax.lax.stop_gradient(losses)
        state = self.remember(state, losses.astype(jnp.float32), mask)
        next_key, train_key, draw_key = jax.random.split(state.key, 3)
        agent = self.learn(state, train_key)
        seen = jnp.where(mask, losses, state.previous).astype(jnp.float32)
        noise = jax.random.normal(draw_key, losses.shape, jnp.float32)
        chosen, _ = _sac.act(agent.actor, seen, mask, noise, self.options.density)
        drawn = mask.sum() * jax.nn.softmax(noise, where=mask)
        share = jnp.where(state.step >= self.use_from, chosen, drawn)
        return _igb.effective_weights(share, losses), state._replace(
            key=next_key,
            step=state.step + 1,
            base=self.reference.update(state.base, losses, mask),
            previous=seen,
            present=mask,
            log_weights=jnp.where(mask, share, state.log_weights),
            agent=agent,
        )


def _check_type(name: str, argument: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"{name}: {argument} must be an instance of mtljax.{kind.__name__}, not "
            f"{type(value).__name__}."
        )


def _check_agent(name: str, agent: IGBAgent) -> optax.GradientTransformation:
    """Checks the fields and returns the optimizer as a transformation."""
    check_choice(name, "agent.density", agent.density, _sac.Density)
    positive = ("capacity", "period", "updates", "batch_size")
    positive += ("initial_temperature", "tau")
    numbers = {field: getattr(agent, field) for field in positive}
    numbers |= {f"hidden[{i}]": width for i, width in enumerate(agent.hidden)}
    optimizer = agent.optimizer
    if not isinstance(optimizer, optax.GradientTransformation):
        numbers["optimizer"] = optimizer
        optimizer = optax.adam(optimizer)
    for field, value in numbers.items():
        check_number(name, f"agent.{field}", value, above=0.0)
    check_number(name, "agent.discount", agent.discount, at_least=0.0, at_most=1.0)
    return optimizer


def _first_steps(
    name: str, reference: _igb.Window, phases: IGBPhases
) -> tuple[int, int]:
    """Returns the first steps of training and use, after checking the phases."""
    length = reference.stop - reference.start
    train_from, use_from = phases.train_from, phases.use_from
    train_from = reference.stop + length if train_from is None else train_from
    use_from = reference.stop + 3 * length if use_from is None else use_from
    num_steps = phases.num_steps
    start = 1 if reference.given is not None else reference.stop
    if train_from < start:
        raise ValueError(
            f"{name}: train_from={train_from} lies before step {start}, the step of "
            f"the first reward. Pass train_from >= {start}."
        )
    if use_from < train_from:
        raise ValueError(
            f"{name}: use_from={use_from} lies before train_from={train_from}, so the "
            "agent would be used before its training."
        )
    if num_steps is not None and use_from >= num_steps:
        raise ValueError(
            f"{name}: use_from={use_from} does not lie inside the run of "
            f"num_steps={num_steps}, so the agent would never be used."
        )
    return train_from, use_from


def _make_multiplier(
    name: str, schedule: optax.ScalarOrSchedule | None, wanted: bool | None
) -> Callable[[Any], Any]:
    """Returns a function of the step that computes α.

    α is the initial learning rate divided by the current one.
    """
    if schedule is None:
        if wanted:
            raise ValueError(
                f"{name}: lr_multiplier=True multiplies rewards by the initial "
                "learning rate divided by the current one, so it needs schedule=, the "
                "learning rate of the model (a number or an optax schedule)."
            )
        return lambda _: 1.0
    if wanted is False or not callable(schedule):
        return lambda _: 1.0
    first = jnp.asarray(schedule(0), jnp.float32)
    if not isinstance(first, Tracer) and not first > 0:
        raise ValueError(
            f"{name}: schedule(0) is {float(first):.6g}, but a positive learning rate "
            "is required to scale the rewards. Pass a schedule that starts above zero, "
            "or lr_multiplier=False."
        )

    def multiplier(step):
        rate = jnp.asarray(schedule(step), jnp.float32)
        # A step with learning rate 0 changes nothing, so its reward is 0.
        return jnp.where(rate > 0, first / jnp.where(rate > 0, rate, 1), 0)

    return multiplier
