"""One batch of a row of the table, and its run with all seeds and learning rates."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import mtljax
from experiments.alternating.config import ROWS, SINGLE_TASK, Config, Row
from experiments.alternating.problem import SHARES, Batch, Problem
from experiments.common import runs as common
from mtljax import training
from mtljax.alternating import Cost, Groups, alternate


class Exploration(NamedTuple):
    """How the trunk travels."""

    start: Any
    last: Any  # displacement of the last batch
    path: Float[Array, ""]  # sum of the lengths of all displacements
    cosines: Float[Array, ""]  # sum over successive displacements


class State(NamedTuple):
    """Everything that changes in a run, and what tells it apart."""

    params: Any
    optimizer: Any  # of alternate, (balancer, Adam), or Adam for a single task
    exploration: Exploration
    lr: Float[Array, ""]
    scale: Float[Array, ""]  # of the last task's loss
    task: Int[Array, ""]  # of a single-task network
    step: Int[Array, ""]


class Program(NamedTuple):
    """A row on a problem: its first state around a model, its step, and its price."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    cost: Cost


class Run(NamedTuple):
    """One entry of the vmapped axis."""

    seed: int
    lr: float
    task: int = -1  # of a single-task network
    scale: float = 1.0

    def label(self) -> dict[str, Any]:
        """What tells this run apart in the rows."""
        return self._asdict()


def row_of(name: str) -> Row:
    """The row of a name."""
    return Row("single task") if name == SINGLE_TASK else ROWS[name]


def _dot(tree: Any, other: Any) -> Array:
    pairs = jax.tree.map(jnp.vdot, tree, other)
    return jax.tree.reduce(jnp.add, pairs)


def travel(old: Exploration, before: Any, after: Any) -> Exploration:
    """After one batch more."""
    moved = jax.tree.map(jnp.subtract, after, before)
    length = jnp.sqrt(_dot(moved, moved))
    scale = length * jnp.sqrt(_dot(old.last, old.last))
    cosine = _dot(moved, old.last) / jnp.where(scale > 0, scale, 1)
    return Exploration(old.start, moved, old.path + length, old.cosines + cosine)


def measures(state: State) -> dict[str, Array]:
    """Distance from the start, path, their ratio, mean cosine of successive batches."""
    trip = state.exploration
    away = jax.tree.map(jnp.subtract, state.params["trunk"], trip.start)
    distance = jnp.sqrt(_dot(away, away))
    return {
        "distance": distance,
        "path": trip.path,
        "straightness": distance / jnp.maximum(trip.path, 1e-12),
        "turning": trip.cosines / jnp.maximum(state.step - 1, 1),
    }


class _Mover:
    """A row's optimiser, its first state and its move."""

    def __init__(self, problem: Problem, name: str):
        self.problem, self.row = problem, row_of(name)
        self.single = name == SINGLE_TASK
        # The key of a run lives in its state; this one is never drawn from.
        self.unused = jax.random.key(0)

    def optimizer(self, lr: Array) -> optax.GradientTransformation:
        make = optax.adam if self.row.optimizer == "adam" else optax.sgd
        return make((self.problem.num_tasks if self.row.rate == "T" else 1) * lr)

    def alternating(self, lr: Array, key: Array):
        return alternate(
            self.optimizer(lr),
            self.problem.num_tasks,
            key=key,
            labels=self.problem.labels,
            **dict(self.row.options),
        )

    def balancer(self, key: Array) -> mtljax.Balancer:
        assert self.row.balancer is not None
        method = mtljax.get_method(self.row.balancer)
        return method.build(self.problem.num_tasks, key=key)

    def init(self, params: Any, key: Array, lr: Array) -> Any:
        if self.single:
            return self.optimizer(lr).init(params)
        if self.row.balancer is None:
            return self.alternating(lr, key).init(params)
        shared = mtljax.shared_params(params, SHARES)
        return self.balancer(key).init(shared), self.optimizer(lr).init(params)

    def factor(self, state: State, task: Any) -> Array:
        last = task == self.problem.num_tasks - 1
        return jnp.where(last, state.scale, 1.0)

    def __call__(self, state: State, batch: Batch) -> tuple[Array, Any, Any]:
        """``(losses, params, optimizer)``; losses without their factor."""
        if self.single:
            return self._alone(state, batch)
        everyone = jnp.arange(self.problem.num_tasks)
        if self.row.balancer is None:
            losses, params, optimizer = self._in_turn(state, batch)
        else:
            losses, params, optimizer = self._jointly(state, batch)
        return losses / self.factor(state, everyone), params, optimizer

    def _alone(self, state: State, batch: Batch):
        def loss(params):
            return self.problem.task_loss(params, state.task, batch)

        value, grad = jax.value_and_grad(loss)(state.params)
        updates, optimizer = self.optimizer(state.lr).update(
            grad, state.optimizer, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        return value[None], params, optimizer

    def _in_turn(self, state: State, batch: Batch):
        def loss(params, task, batch):
            return self.factor(state, task) * self.problem.task_loss(
                params, task, batch
            )

        steps = self.alternating(state.lr, self.unused)
        return steps.step(loss, state.params, state.optimizer, batch)

    def _jointly(self, state: State, batch: Batch):
        def losses_of(params, batch):
            losses = self.problem.task_losses(params, batch)
            return self.factor(state, jnp.arange(len(losses))) * losses

        balancer_state, opt_state = state.optimizer
        gradient = mtljax.value_and_balanced_grad(
            losses_of, self.balancer(self.unused), labels=SHARES
        )
        losses, grad, balancer_state = gradient(state.params, balancer_state, batch)
        updates, opt_state = self.optimizer(state.lr).update(
            grad, opt_state, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        return losses, params, (balancer_state, opt_state)


def make_program(problem: Problem, name: str) -> Program:
    """Initial state and step of a row."""
    move = _Mover(problem, name)

    def init(params, key, lr, task=-1, scale=1.0):
        task = jnp.int32(task)
        if name == SINGLE_TASK:
            params = problem.alone(params, task)
        trunk = params["trunk"]
        zeros = jax.tree.map(jnp.zeros_like, trunk)
        trip = Exploration(trunk, zeros, jnp.zeros(()), jnp.zeros(()))
        lr, scale = jnp.float32(lr), jnp.float32(scale)
        optimizer = move.init(params, key, lr)
        return State(params, optimizer, trip, lr, scale, task, jnp.int32(0))

    def step(state: State, batch: Batch):
        losses, params, optimizer = move(state, batch)
        trip = travel(state.exploration, state.params["trunk"], params["trunk"])
        state = state._replace(
            params=params, optimizer=optimizer, exploration=trip, step=state.step + 1
        )
        seen = {"losses": losses}
        return state, seen if name == SINGLE_TASK else seen | measures(state)

    return Program(init, step, cost_of(name, problem.num_tasks))


def cost_of(name: str, num_tasks: int) -> Cost:
    """Passes per batch."""
    row = row_of(name)
    if name == SINGLE_TASK:
        return Cost(1, 1, 1)
    if row.balancer is None:
        key = jax.random.key(0)
        return alternate(optax.sgd(0.0), num_tasks, key=key, **dict(row.options)).cost
    method = mtljax.get_method(row.balancer)
    needs = method.build(num_tasks, key=jax.random.key(0)).needs
    return Cost(1, 1 if needs == "losses" else num_tasks, 1)


def inner_steps(name: str, num_tasks: int) -> int:
    """Steps of length eta in a batch, as a joint step with a rate T eta has."""
    row = row_of(name)
    if row.rate == "T":
        return num_tasks
    options = dict(row.options)
    if row.balancer is not None or options.get("schedule") == "per_batch":
        return 1
    # Side by side, displacements of the tasks' own optimisers add up.
    if options.get("state") == "per_task":
        return num_tasks
    groups: Any = options.get("groups", num_tasks)
    number = groups.number if isinstance(groups, Groups) else groups
    return num_tasks if number is None else number


def runs_of(config: Config, problem: Problem, name: str) -> list[Run]:
    """The vmapped axis: seeds x learning rates, and tasks for the baseline."""
    setting = config.setting(problem.name)
    lrs = setting.lrs if row_of(name).optimizer == "adam" else setting.sgd_lrs
    seeds = config.seed_range
    tasks = range(problem.num_tasks) if name == SINGLE_TASK else (-1,)
    return [Run(seed, lr, task) for task in tasks for lr in lrs for seed in seeds]


@functools.lru_cache(maxsize=4)
def _first_models(problem: Problem) -> Callable[[Array], Any]:
    """Compiled once for all rows: random numbers take XLA long."""
    return jax.jit(jax.vmap(problem.init))


def initial_state(problem: Problem, program: Program, runs: Sequence[Run]):
    """The stacked states of all runs of a row, and their keys of data order."""
    keys = common.keys_of(run.seed for run in runs)
    params = _first_models(problem)(keys.model)
    columns = [
        jnp.array([getattr(r, f) for r in runs]) for f in ("lr", "task", "scale")
    ]
    start = jax.jit(jax.vmap(program.init))
    return start(params, keys.method, *columns), keys.order


class Evaluator:
    """Evaluates stacked states; compiled once for all rows with as many runs."""

    def __init__(self, problem: Problem):
        self._all = jax.jit(jax.vmap(problem.evaluate))
        self._alone = jax.jit(jax.vmap(problem.evaluate_alone))

    def of(self, name: str) -> Callable[[State], dict[str, Array]]:
        """That of a row."""
        if name == SINGLE_TASK:
            return lambda states: self._alone(states.params, states.task)
        return lambda states: self._all(states.params)


def run_row(
    config: Config,
    problem: Problem,
    name: str,
    evaluator: Evaluator,
    *,
    runs: Sequence[Run] | None = None,
    study: str = "",
    longer: int = 1,
) -> list[dict[str, Any]]:
    """Trains all runs of a row; rows and checkpoints go below ``config.out``.

    Returns:
      The rows of the whole run. With ``config.report_only`` what an earlier call wrote,
      or none if it did not come to its end.
    """
    setting = config.setting(problem.name)
    last = "-".join([name.replace(":", "-"), *([study] if study else [])])
    folder = config.out / problem.folder / "runs" / last
    if config.report_only:
        return common.finished(folder, setting.steps * longer)
    program = make_program(problem, name)
    runs = runs_of(config, problem, name) if runs is None else runs
    state, order_keys = initial_state(problem, program, runs)
    about = dataclasses.replace(setting, rows=(), scales=(), alignment=False)
    plan = common.Plan(
        steps=setting.steps * longer,
        batch_size=setting.batch_size,
        eval_every=setting.eval_every * longer,
        log_every=config.log_every * longer,
        evaluate=evaluator.of(name),
        labels=[run.label() for run in runs],
        folder=folder,
        about={
            "set": problem.name,
            "row": name,
            "setting": training.to_json(about),
            "probe_size": config.probe_size,
        },
        title=f"{problem.name} {name} {study}".strip(),
        eval_at_start=bool(study),
    )
    return common.train(
        config,
        plan,
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
    ).rows


def make_train(config: Config, problem: Problem, name: str):
    """A pure ``train(key, lr) -> (state, metrics)``; jit it, vmap it over both."""
    program, setting = make_program(problem, name), config.setting(problem.name)

    def train(key, lr=setting.lrs[0]):
        def init(key):
            model_key, own_key = jax.random.split(key)
            return program.init(problem.init(model_key), own_key, lr)

        run = training.make_train(
            init, program.step, num_steps=setting.steps, batch_size=setting.batch_size
        )
        return run(key, problem.train)

    return train
