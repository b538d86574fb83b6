"""Training step of a table row, and its run over seeds and rates."""

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
from experiments.alternating.problem import Batch, Problem
from experiments.common import runs as common
from experiments.common.runs import LABELS
from mtljax import training
from mtljax.alternating import Cost, alternate


class Exploration(NamedTuple):
    """Statistics of the path of the trunk."""

    start: Any
    last: Any  # displacement of the last batch
    path: Float[Array, ""]  # sum of the norms of all displacements
    cosines: Float[Array, ""]  # sum over successive displacements


class State(NamedTuple):
    """All values that change in a run, and the values that identify it."""

    params: Any
    optimizer: Any  # of alternate, or Adam for a single task
    exploration: Exploration
    lr: Float[Array, ""]
    scale: Float[Array, ""]  # factor of the last task's loss
    task: Int[Array, ""]  # task of a single-task network
    split: Int[Array, ""]
    step: Int[Array, ""]


class Program(NamedTuple):
    """A row on a problem: initial state and step."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]


class Run(NamedTuple):
    """One entry of the vmapped axis."""

    seed: int
    lr: float
    task: int = -1  # task of a single-task network
    scale: float = 1.0

    def label(self) -> dict[str, Any]:
        """Returns the fields that identify this run in the rows."""
        return self._asdict()


def row_of(name: str) -> Row:
    """Returns the row with a given name."""
    return Row("single task") if name == SINGLE_TASK else ROWS[name]


def _dot(tree: Any, other: Any) -> Array:
    pairs = jax.tree.map(jnp.vdot, tree, other)
    return jax.tree.reduce(jnp.add, pairs)


def travel(old: Exploration, before: Any, after: Any) -> Exploration:
    """Updates the path statistics after one batch."""
    moved = jax.tree.map(jnp.subtract, after, before)
    length = jnp.sqrt(_dot(moved, moved))
    scale = length * jnp.sqrt(_dot(old.last, old.last))
    cosine = _dot(moved, old.last) / jnp.where(scale > 0, scale, 1)
    return Exploration(old.start, moved, old.path + length, old.cosines + cosine)


def measures(state: State) -> dict[str, Array]:
    """Returns distance, path length, their ratio and the mean successive cosine."""
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
    """The optimizer of a row, its initial state and its update."""

    def __init__(self, problem: Problem, name: str):
        self.problem, self.row = problem, row_of(name)
        self.single = name == SINGLE_TASK
        # The state holds the key of the run. This placeholder is never used for
        # sampling.
        self.unused = jax.random.key(0)

    def alternating(self, lr: Array, key: Array):
        return alternate(
            optax.adam(lr),
            self.problem.num_tasks,
            key=key,
            labels=self.problem.labels,
            **dict(self.row.options),
        )

    def balancer(self, key: Array) -> mtljax.Balancer:
        method = mtljax.METHODS[self.row.balancer or ""]
        return method.build(self.problem.num_tasks, key=key)

    def init(self, params: Any, key: Array, lr: Array) -> Any:
        if self.single:
            return optax.adam(lr).init(params)
        if self.row.balancer:
            shared = mtljax.shared_params(params, LABELS)
            return self.balancer(key).init(shared), optax.adam(lr).init(params)
        return self.alternating(lr, key).init(params)

    def factor(self, state: State, task: Any) -> Array:
        last = task == self.problem.num_tasks - 1
        return jnp.where(last, state.scale, 1.0)

    def __call__(self, state: State, batch: Batch) -> tuple[Array, Any, Any]:
        """Returns ``(losses, params, optimizer)``. The losses exclude their factor."""
        batch = self.problem.split(batch, state.split)
        if self.single:
            return self._alone(state, batch)
        everyone = jnp.arange(self.problem.num_tasks)
        if self.row.balancer:
            return self._balanced(state, batch, self.factor(state, everyone))

        def loss(params, task, batch):
            found = self.problem.task_loss(params, task, batch)
            return self.factor(state, task) * found

        steps = self.alternating(state.lr, self.unused)
        losses, params, optimizer = steps.step(
            loss, state.params, state.optimizer, batch
        )
        return losses / self.factor(state, everyone), params, optimizer

    def _balanced(self, state: State, batch: Batch, factors: Array):
        def losses(params):
            return factors * self.problem.task_losses(params, batch)

        weighting, adam = state.optimizer
        balancer = self.balancer(self.unused)
        step = mtljax.value_and_balanced_grad(losses, balancer, labels=LABELS)
        values, grad, weighting = step(state.params, weighting)
        updates, adam = optax.adam(state.lr).update(grad, adam, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return values / factors, params, (weighting, adam)

    def _alone(self, state: State, batch: Batch):
        def loss(params):
            return self.problem.task_loss(params, state.task, batch)

        value, grad = jax.value_and_grad(loss)(state.params)
        updates, optimizer = optax.adam(state.lr).update(
            grad, state.optimizer, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        return value[None], params, optimizer


def make_program(problem: Problem, name: str) -> Program:
    """Builds the initial state and the step of a row."""
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
        zero = jnp.int32(0)
        return State(params, optimizer, trip, lr, scale, task, zero, zero)

    def step(state: State, batch: Batch):
        losses, params, optimizer = move(state, batch)
        trip = travel(state.exploration, state.params["trunk"], params["trunk"])
        state = state._replace(
            params=params, optimizer=optimizer, exploration=trip, step=state.step + 1
        )
        seen = {"losses": losses}
        return state, seen if name == SINGLE_TASK else seen | measures(state)

    return Program(init, step)


def cost_of(name: str, num_tasks: int) -> Cost:
    """Returns the passes per batch."""
    if name == SINGLE_TASK:
        return Cost(1, 1, 1)
    row, key = row_of(name), jax.random.key(0)
    if row.balancer:
        joint = mtljax.METHODS[row.balancer].family == "loss balancing"
        return Cost(1, 1 if joint else num_tasks, 1)
    options = dict(row.options)
    return alternate(optax.sgd(0.0), num_tasks, key=key, **options).cost


def inner_steps(name: str, num_tasks: int) -> int:
    """Returns the total rate of a batch in units of eta."""
    options = dict(row_of(name).options)
    if row_of(name).balancer:
        return 1
    # With state="per_task" the displacements of T optimizers are added.
    if options.get("state") == "per_task":
        return num_tasks
    return options.get("groups", num_tasks)


def runs_of(
    config: Config, problem: Problem, name: str, rates: Sequence[float]
) -> list[Run]:
    """Builds the vmapped axis: seeds x learning rates, and tasks for the baseline."""
    seeds = config.seeds_of(problem.name)
    tasks = range(problem.num_tasks) if name == SINGLE_TASK else (-1,)
    return [Run(seed, lr, task) for task in tasks for lr in rates for seed in seeds]


@functools.lru_cache(maxsize=4)
def _first_models(problem: Problem) -> Callable[[Array], Any]:
    """Compiled once for all rows, because compiling random numbers is slow."""
    return jax.jit(jax.vmap(problem.init))


def initial_state(problem: Problem, program: Program, runs: Sequence[Run]):
    """Returns the stacked states of all runs of a row, and their data-order keys."""
    keys = common.keys_of(run.seed for run in runs)
    params = _first_models(problem)(keys.model)
    columns = [
        jnp.array([getattr(r, f) for r in runs]) for f in ("lr", "task", "scale")
    ]
    first = min(run.seed for run in runs)
    splits = jnp.array([(run.seed - first) * problem.by_seed for run in runs])
    start = jax.jit(jax.vmap(program.init))
    state = start(params, keys.method, *columns)
    return state._replace(split=splits.astype(jnp.int32)), keys.order


class Evaluator:
    """Evaluates stacked states. Rows with equally many runs share one compilation."""

    def __init__(self, problem: Problem):
        self._all = jax.jit(jax.vmap(problem.evaluate))
        self._alone = jax.jit(jax.vmap(problem.evaluate_alone))

    def of(self, name: str) -> Callable[[State], dict[str, Array]]:
        """Returns the evaluation function of a row."""
        if name == SINGLE_TASK:
            return lambda states: self._alone(states.params, states.split, states.task)
        return lambda states: self._all(states.params, states.split)


def run_row(
    config: Config,
    problem: Problem,
    name: str,
    evaluator: Evaluator,
    *,
    rates: Sequence[float] = (),
    runs: Sequence[Run] = (),
    study: str = "",
) -> list[dict[str, Any]]:
    """Trains all runs of a row. Rows and checkpoints are written under ``config.out``.

    Returns:
      The rows of the whole run. With ``config.report_only``, the rows of an earlier
      call, or an empty list if that run is not finished.
    """
    setting = config.setting(problem.name)
    beyond = [f"{rate:g}" for rate in rates if rate not in setting.lrs]
    last = "-".join([name.replace(":", "-"), *([study] if study else []), *beyond])
    folder = config.out / problem.folder / "runs" / last
    if config.report_only:
        return common.finished(folder, setting.steps)
    program = make_program(problem, name)
    runs = runs or runs_of(config, problem, name, rates or setting.lrs)
    state, order_keys = initial_state(problem, program, runs)
    about = dataclasses.replace(setting, rows=(), scales=())
    plan = common.Plan(
        steps=setting.steps,
        batch_size=setting.batch_size,
        eval_every=setting.eval_every,
        log_every=config.log_every,
        evaluate=evaluator.of(name),
        labels=[run.label() for run in runs],
        folder=folder,
        about={
            "set": problem.name,
            "row": name,
            "setting": training.to_json(about),
        },
        title=f"{problem.name} {name} {study}".strip(),
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
    """Builds a pure ``train(key, lr) -> (state, metrics)`` for ``jit`` and ``vmap``."""
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
