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


def row_of(name: str) -> Row:
    """Returns the row with a given name."""
    return Row("single task") if name == SINGLE_TASK else ROWS[name]


def travel(old: Exploration, before: Any, after: Any) -> Exploration:
    """Updates the path statistics after one batch."""
    moved = jax.tree.map(jnp.subtract, after, before)
    length = jnp.sqrt(optax.tree.vdot(moved, moved))
    scale = length * jnp.sqrt(optax.tree.vdot(old.last, old.last))
    cosine = optax.tree.vdot(moved, old.last) / jnp.where(scale > 0, scale, 1)
    return Exploration(old.start, moved, old.path + length, old.cosines + cosine)


def measures(state: State) -> dict[str, Array]:
    """Returns distance, path length, their ratio and the mean successive cosine."""
    trip = state.exploration
    away = jax.tree.map(jnp.subtract, state.params["trunk"], trip.start)
    distance = jnp.sqrt(optax.tree.vdot(away, away))
    return {
        "distance": distance,
        "path": trip.path,
        "straightness": distance / jnp.maximum(trip.path, 1e-12),
        "turning": trip.cosines / jnp.maximum(state.step - 1, 1),
    }


def factor(state: State, task: Any, last: int) -> Array:
    """Returns the factor of a task's loss, 1 for all but the last task."""
    return jnp.where(task == last, state.scale, 1.0)


def make_program(problem: Problem, name: str) -> Program:
    """Builds the initial state and the step of a row."""
    single, last = name == SINGLE_TASK, problem.num_tasks - 1
    _, options, balancer = row_of(name)
    # The state holds the key of the run. This placeholder is never used for sampling.
    unused = jax.random.key(0)

    def alternating(lr, key):
        shared = {"key": key, "labels": problem.labels}
        return alternate(optax.adam(lr), problem.num_tasks, **shared, **options)

    def weighting(key):
        return mtljax.METHODS[balancer or ""].build(problem.num_tasks, key=key)

    def init(params, key, lr, task=-1, scale=1.0):
        task, zero = jnp.int32(task), jnp.int32(0)
        if single:
            params = problem.alone(params, task)
        trunk = params["trunk"]
        zeros = jax.tree.map(jnp.zeros_like, trunk)
        trip = Exploration(trunk, zeros, jnp.zeros(()), jnp.zeros(()))
        lr, scale = jnp.float32(lr), jnp.float32(scale)
        plain = single or balancer
        steps = (optax.adam(lr) if plain else alternating(lr, key)).init(params)
        if balancer:
            shared = mtljax.shared_params(params, LABELS)
            steps = weighting(key).init(shared), steps
        return State(params, steps, trip, lr, scale, task, zero, zero)

    def alone(state: State, batch: Batch):
        def loss(params):
            return problem.task_loss(params, state.task, batch)

        value, grad = jax.value_and_grad(loss)(state.params)
        updates, optimizer = optax.adam(state.lr).update(
            grad, state.optimizer, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        return value[None], params, optimizer

    def together(state: State, batch: Batch):
        def loss(params, task, batch):
            return factor(state, task, last) * problem.task_loss(params, task, batch)

        steps = alternating(state.lr, unused)
        losses, params, optimizer = steps.step(
            loss, state.params, state.optimizer, batch
        )
        # The losses are recorded without their factor.
        return losses / factor(state, jnp.arange(last + 1), last), params, optimizer

    def balanced(state: State, batch: Batch):
        factors = factor(state, jnp.arange(last + 1), last)

        def losses(params):
            return factors * problem.task_losses(params, batch)

        weights, adam = state.optimizer
        step = mtljax.value_and_balanced_grad(losses, weighting(unused), labels=LABELS)
        values, grad, weights = step(state.params, weights)
        updates, adam = optax.adam(state.lr).update(grad, adam, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return values / factors, params, (weights, adam)

    def step(state: State, batch: Batch):
        batch = problem.split(batch, state.split)
        move = alone if single else balanced if balancer else together
        losses, params, optimizer = move(state, batch)
        trip = travel(state.exploration, state.params["trunk"], params["trunk"])
        state = state._replace(
            params=params, optimizer=optimizer, exploration=trip, step=state.step + 1
        )
        seen = {"losses": losses}
        return state, seen if single else seen | measures(state)

    return Program(init, step)


def cost_of(name: str, num_tasks: int) -> Cost:
    """Returns the passes per batch."""
    if name == SINGLE_TASK:
        return Cost(1, 1, 1)
    (_, options, balancer), key = row_of(name), jax.random.key(0)
    if balancer:
        joint = mtljax.METHODS[balancer].family == "loss balancing"
        return Cost(1, 1 if joint else num_tasks, 1)
    return alternate(optax.sgd(0.0), num_tasks, key=key, **options).cost


def inner_steps(name: str, num_tasks: int) -> int:
    """Returns the total rate of a batch in units of eta."""
    _, options, balancer = row_of(name)
    if balancer:
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


def initial_state(problem: Problem, program: Program, runs: Sequence[Run]):
    """Returns the stacked states of all runs of a row, and their data-order keys."""
    keys = common.keys_of(run.seed for run in runs)
    params = problem.init_models(keys.model)
    columns = [
        jnp.array([getattr(r, f) for r in runs]) for f in ("lr", "task", "scale")
    ]
    splits = common.splits_of([run.seed for run in runs], problem.by_seed)
    start = jax.jit(jax.vmap(program.init))
    state = start(params, keys.method, *columns)
    return state._replace(split=splits), keys.order


def run_row(
    config: Config,
    problem: Problem,
    name: str,
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
    parts = [name.replace(":", "-"), study, *common.beyond(rates, setting.lrs)]
    last = "-".join(filter(None, parts))
    folder = config.folder(problem.name) / "runs" / last
    if config.report_only:
        return common.finished(folder, setting.steps)
    program = make_program(problem, name)
    runs = runs or runs_of(config, problem, name, rates or setting.lrs)
    state, order_keys = initial_state(problem, program, runs)
    about = dataclasses.replace(setting, rows=(), scales=())
    plan = common.Plan(
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
        steps=setting.steps,
        batch_size=setting.batch_size,
        eval_every=setting.eval_every,
        log_every=config.log_every,
        evaluate=functools.partial(problem.evaluate, alone=name == SINGLE_TASK),
        labels=[run._asdict() for run in runs],
        folder=folder,
        about={
            "set": problem.name,
            "row": name,
            "setting": training.to_json(about),
        },
        title=f"{problem.name} {name} {study}".strip(),
    )
    return common.train(config, plan)
