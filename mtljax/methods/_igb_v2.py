"""IGBv2: a soft actor-critic agent weighs the log losses, inside the compiled step."""

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

    Each phase begins at the end of the previous one or later: the window, the training
    of the agent, its use. The defaults are those of the paper (`2307.15429
    <https://arxiv.org/abs/2307.15429>`_) for its NYUv2 runs, with 398 steps per epoch.
    The paper's values for n steps per epoch are ``IGBPhases(window=(n, 2 * n))``.

    Attributes:
      window: ``(start, stop)``: the steps whose mean losses are ``L_base``, see
        :func:`igb_v1`. By default the second epoch.
      train_from: First step at which the agent is trained. None is one length of the
        window after its end (the paper's fourth epoch).
      use_from: First step at which the agent chooses the weights. None is three
        lengths of the window after its end (the paper's sixth epoch).
      num_steps: Number of steps of the run, if known. The other values are checked
        against it.

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

    The paper (`2307.15429 <https://arxiv.org/abs/2307.15429>`_) gives ``capacity``,
    ``period``, ``discount`` and ``optimizer``. The defaults of the other fields are
    those of the authors' code. ``discount``, ``optimizer`` (as a learning rate),
    ``initial_temperature``, ``target_entropy`` and ``tau`` may be traced.

    Attributes:
      density: Log-density of an action. ``"tanh_compat"``, as in the authors' code, is
        that of ``tanh(u)``, although the action is a softmax. ``"logistic_normal"`` is
        that of the action (inferred; the logit of the last present task is fixed at 0).
      capacity: Number of transitions in the replay ring. It is small on purpose:
        old losses describe an old model.
      period: Number of steps between trainings of the agent.
      updates: Number of updates per training with an empty ring; twice as many with a
        full one.
      batch_size: Number of transitions per update with an empty ring; twice as many
        with a full one.
      hidden: Widths of the hidden layers of the actor and the critics.
      discount: γ.
      optimizer: Optimizer of the actor, the critics and the temperature: a learning
        rate of Adam, or a transformation. The paper uses 1e-4 with MGDA, PCGrad or
        Nash-MTL, and 3e-4 otherwise.
      initial_temperature: Initial weight of the entropy, which is then learned.
      target_entropy: H̄. None is minus the number of free logits: ``-T``, or
        ``-(T - 1)`` for ``"logistic_normal"``.
      tau: Share of the critics that their targets take over at each update.

    Examples:
      >>> import jax, mtljax
      >>> agent = mtljax.IGBAgent(capacity=5_000, optimizer=1e-4)
      >>> mtljax.igb_v2(3, key=jax.random.key(0), agent=agent).needs
      'losses'

      A factory of your own makes a field a hyper-parameter that can be injected:

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
    average: Losses  # their moving average; the same numbers with ema=0
    present: Mask  # tasks in the last batch
    log_weights: Weights  # λ of the last batch: the agent's action
    reward: Float[Array, ""]  # the last one
    observed: Bool[Array, ""]  # it was measured on the same batch, for the next row
    memory: _sac.Memory
    agent: _sac.Agent
    task_weights: Weights  # λ_i / L_i

    @property
    def temperature(self) -> Float[Array, "..."]:
        """The agent's entropy temperature."""
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
    """``r = α min_i (before_i - after_i) / L_base,i`` over the mask's tasks (Eq. 4).

    The mask may be empty; the reward is then 0.
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

    Descends ``Σ_i λ_i log L_i`` as :func:`igb_v1` does, with the weights λ (positive,
    of sum n) chosen by a soft actor-critic. Its state is the vector of the raw batch
    losses, its action ``λ = n softmax(u)``, ``u ~ N(μ(L), σ(L)²)``, its reward
    ``α_k min_i (L_i(k-1) - L_i(k)) / L_base,i``: the relative fall of the task that
    fell least, between one batch and the next, times initial over current learning
    rate. Training is one trajectory without an end.

    Steps before ``phases.use_from`` sample ``λ = n softmax(z)``, ``z ~ N(0, I)``.
    Transitions are stored in a ring from the end of the window on. From
    ``phases.train_from`` on, every ``agent.period`` steps, the agent makes
    ``⌊updates k⌋`` updates on ``⌊batch_size k⌋`` transitions each, with
    ``k = 1 + stored / capacity`` (the authors' code; the paper does not say).

    Args:
      num_tasks: T, length of the leading axis of every leaf of the gradients.
      key: Seeds networks, exploration and replay; lives in the state.
      phases: The window whose mean losses are ``L_base``, and the first steps of the
        agent's training and use, see :class:`IGBPhases`.
      base: ``L_base`` itself ``[T]``, if it is known.
      schedule: Learning rate of the model, a number or an optax schedule of the step,
        for α: initial over current. Counted in updates of this balancer. One that
        warms up from small values makes α small, and is probably not what is meant.
      lr_multiplier: Whether rewards are multiplied by α; None where a schedule is
        given. The paper does; the authors' code has α = 1 on QM9 by a slip.
      reward: ``"min"``, or ``"mean"`` over tasks (an ablation of the paper).
      reward_batch: ``"next"`` compares two batches, as the paper does. ``"same"`` (not
        in the paper) compares the losses of one batch before and after the step, which
        :func:`mtljax.observe` must be given: one more forward pass. A step without it
        is rewarded as with ``"next"``.
      ema: Decay of a moving average of the losses that ``"next"`` rewards are taken of.
        Not in the paper (0).
      agent: Networks, replay and training of the agent, see :class:`IGBAgent`.
      scale: ``"native"``, or effective weights ``λ_i / L_i`` normalised to the
        ``"sum"`` or ``"mean"`` scale.

    Returns:
      A balancer; needs ``losses``, all positive. One backward pass (and one forward
      with ``reward_batch="same"``); every ``period`` steps the training of the agent.
      State: ``capacity (5 T + 1)`` numbers and the networks; jit your step with its
      state donated, or in a scan, or every step copies the ring. ``vmap`` over runs
      trains the agents of all in the same step. With absent tasks (inferred; the paper
      has none) the actor sees their last losses, λ and the densities are those of the
      present tasks, and a reward is that of the tasks that are present, each against
      its own last loss.

    Raises:
      ValueError: If the window is empty or a phase does not begin inside the run,
        ``lr_multiplier`` has no schedule, a number is out of range, or a shape
        or a type is wrong.

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
        agent_key, next_key = jax.random.split(key)
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
    """The settings of :func:`igb_v2`, and what is done with them in a step."""

    reference: _igb.Window
    train_from: int
    use_from: int
    multiplier: Callable[[Any], Any]
    reward: Reduce
    ema: Number
    options: IGBAgent
    optimizer: optax.GradientTransformation

    def init(self, num_tasks: int, key: PRNGKeyArray, agent: _sac.Agent) -> IGBv2State:
        """Before the first batch."""
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
        """Tasks of the mask that have a reference and a loss to compare with."""
        return mask & self.reference.ready(state.base) & (state.base.steps > 0)

    def remember(self, state: IGBv2State, losses: Losses, mask: Mask) -> IGBv2State:
        """Ends the transition of the last step, which the new losses reward."""
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
        """Rewards the step just made by the same batch's losses after it."""
        losses = jax.lax.stop_gradient(losses).astype(jnp.float32)
        tasks = self.comparable(state, mask & state.present)
        found = igb_v2_reward(
            state.previous,
            losses,
            state.base.mean,
            multiplier=self.multiplier(state.step - 1),  # of the step just made
            mask=tasks,
            reduce=self.reward,
        )
        keep = tasks.any()
        return state._replace(
            reward=jnp.where(keep, found, state.reward).astype(jnp.float32),
            observed=state.observed | keep,
        )

    def learn(self, state: IGBv2State, key: PRNGKeyArray) -> _sac.Agent:
        """Trains the agent, once in a period."""
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
        """λ of this batch, after the transition that its losses end is stored."""
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
            f"of {type(value).__name__}."
        )


def _check_agent(name: str, agent: IGBAgent) -> optax.GradientTransformation:
    """Checks the fields, and returns the optimizer as a transformation."""
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
    """Of training and use, which follow the window and lie inside the run."""
    length = reference.stop - reference.start
    train_from, use_from = phases.train_from, phases.use_from
    train_from = reference.stop + length if train_from is None else train_from
    use_from = reference.stop + 3 * length if use_from is None else use_from
    num_steps = phases.num_steps
    start = 1 if reference.given is not None else reference.stop
    if train_from < start:
        raise ValueError(
            f"{name}: train_from={train_from} lies before step {start}, where the "
            "first reward is measured."
        )
    if use_from < train_from:
        raise ValueError(
            f"{name}: use_from={use_from} lies before train_from={train_from}; the "
            "agent would be used untrained."
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
    """α of a step: initial over current learning rate."""
    if schedule is None:
        if wanted:
            raise ValueError(
                f"{name}: lr_multiplier=True multiplies rewards by initial over "
                "current learning rate, so it needs schedule=, the model's learning "
                "rate (a number or an optax schedule)."
            )
        return lambda _: 1.0
    if wanted is False or not callable(schedule):
        return lambda _: 1.0
    first = jnp.asarray(schedule(0), jnp.float32)
    if not isinstance(first, Tracer) and not first > 0:
        raise ValueError(
            f"{name}: schedule(0) is {float(first):.6g}, and rewards are multiplied by "
            "initial over current learning rate; give a schedule that starts above "
            "zero, or lr_multiplier=False."
        )

    def multiplier(step):
        rate = jnp.asarray(schedule(step), jnp.float32)
        # A step of rate 0 moves nothing, and earns nothing.
        return jnp.where(rate > 0, first / jnp.where(rate > 0, rate, 1), 0)

    return multiplier
