"""One batch of a row of the table, and its run with all seeds and learning rates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

import mtljax
from experiments.alternating.config import ROWS, SINGLE_TASK, Config, Row
from experiments.alternating.problem import MODALITIES, Batch, Problem
from mtljax import training
from mtljax.alternating import Cost, alternate


class Exploration(NamedTuple):
    """How the trunk travels."""

    start: Any
    last: Any  # displacement of the last batch
    path: Float[Array, ""]  # sum of the lengths of all displacements
    cosines: Float[Array, ""]  # sum over successive displacements


class State(NamedTuple):
    """Everything that changes in a run."""

    params: Any
    optimizer: Any  # of alternate, or (balancer, Adam)
    exploration: Exploration
    lr: Float[Array, ""]
    mask: Bool[Array, " tasks"]  # tasks of the modality that a baseline trains
    step: Int[Array, ""]


class Program(NamedTuple):
    """A row on a problem: its first state around a model, its step, and its price."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    cost: Cost


class Run(NamedTuple):
    """One entry of the vmapped axis: a seed at a learning rate (on one modality)."""

    seed: int
    lr: float
    modality: int | None

    def label(self) -> dict[str, Any]:
        """What tells this run apart in the rows."""
        task = "all" if self.modality is None else MODALITIES[self.modality]
        return {"seed": self.seed, "lr": self.lr, "task": task}


def row_of(name: str) -> Row:
    """The row of a name; single-task networks train on the sum of their tasks."""
    return Row("single task", (("groups", 1),)) if name == SINGLE_TASK else ROWS[name]


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


def make_program(problem: Problem, name: str) -> Program:
    """Initial state and step of a row."""
    row, num_tasks = row_of(name), problem.num_tasks
    factor = num_tasks if row.rate == "T" else 1
    single = name == SINGLE_TASK

    def optimizer_of(lr):
        make = optax.adam if row.optimizer == "adam" else optax.sgd
        return make(factor * lr)

    def alternating_of(lr, key):
        options = dict(row.options)
        return alternate(
            optimizer_of(lr), num_tasks, key=key, labels=problem.labels, **options
        )

    def balancer_of(key):
        assert row.balancer is not None
        return mtljax.get_method(row.balancer).build(num_tasks, key=key)

    def init(params, key, lr, mask):
        if row.balancer is None:
            optimizer: Any = alternating_of(lr, key).init(params)
        else:
            shared = mtljax.shared_params(params, problem.shares)
            optimizer = balancer_of(key).init(shared), optimizer_of(lr).init(params)
        trunk = params["trunk"]
        zeros = jax.tree.map(jnp.zeros_like, trunk)
        trip = Exploration(trunk, zeros, jnp.zeros(()), jnp.zeros(()))
        return State(params, optimizer, trip, lr, mask, jnp.int32(0))

    # The key of a run lives in its state; this one is never drawn from.
    unused = jax.random.key(0)

    def alternating_step(state: State, batch: Batch):
        alternating = alternating_of(state.lr, unused)
        mask = state.mask if single else None
        return alternating.step(
            problem.task_loss, state.params, state.optimizer, batch, mask=mask
        )

    def joint_step(state: State, batch: Batch):
        balancer_state, opt_state = state.optimizer
        gradient = mtljax.value_and_balanced_grad(
            problem.task_losses, balancer_of(unused), labels=problem.shares
        )
        losses, grad, balancer_state = gradient(state.params, balancer_state, batch)
        updates, opt_state = optimizer_of(state.lr).update(
            grad, opt_state, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        return losses, params, (balancer_state, opt_state)

    move = alternating_step if row.balancer is None else joint_step

    def step(state: State, batch: Batch):
        losses, params, optimizer = move(state, batch)
        trip = travel(state.exploration, state.params["trunk"], params["trunk"])
        state = State(params, optimizer, trip, state.lr, state.mask, state.step + 1)
        return state, {"losses": losses} | measures(state)

    return Program(init, step, cost_of(row, num_tasks))


def cost_of(row: Row, num_tasks: int) -> Cost:
    """Passes per batch."""
    if row.balancer is None:
        key = jax.random.key(0)
        return alternate(optax.sgd(0.0), num_tasks, key=key, **dict(row.options)).cost
    needs = (
        mtljax.get_method(row.balancer).build(num_tasks, key=jax.random.key(0)).needs
    )
    return Cost(1, 1 if needs == "losses" else num_tasks, 1)


def runs_of(config: Config, name: str) -> list[Run]:
    """The vmapped axis: seeds x learning rates, and modalities for the baselines."""
    parts = range(len(MODALITIES)) if name == SINGLE_TASK else (None,)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    lrs = config.lrs if row_of(name).optimizer == "adam" else config.sgd_lrs
    return [Run(seed, lr, part) for part in parts for lr in lrs for seed in seeds]


def initial_state(config: Config, problem: Problem, name: str, program: Program):
    """The stacked states of all runs of a row, and their keys of data order."""
    runs = runs_of(config, name)
    keys = jnp.stack([jax.random.key(run.seed) for run in runs])
    init_keys, order_keys = training.split_run_key(keys)
    model_keys, own_keys = jax.vmap(jax.random.split, out_axes=1)(init_keys)
    masks = jnp.array(
        [[run.modality in (None, m) for m in problem.modality] for run in runs]
    )
    lrs = jnp.array([run.lr for run in runs])

    def start(model_key, own_key, lr, mask):
        return program.init(problem.init_model(model_key), own_key, lr, mask)

    return jax.jit(jax.vmap(start))(model_keys, own_keys, lrs, masks), order_keys


def make_evaluate(config: Config, problem: Problem, name: str):
    """``evaluate(states) -> metrics``; a baseline is judged by its own modality."""
    runs = runs_of(config, name)
    weights = jnp.array(
        [[float(r.modality in (None, i)) for i in range(3)] for r in runs]
    )
    return lambda states: problem.evaluate(states.params, weights)


def make_train(
    config: Config, problem: Problem, name: str
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """A pure ``train(key, lr) -> (state, metrics)``; jit it, vmap it over both."""
    program = make_program(problem, name)
    everything = jnp.ones(problem.num_tasks, bool)

    def train(key, lr=config.lrs[0]):
        def init(key):
            model_key, own_key = jax.random.split(key)
            rate = jnp.asarray(lr, jnp.float32)
            params = problem.init_model(model_key)
            return program.init(params, own_key, rate, everything)

        run = training.make_train(
            init, program.step, num_steps=config.steps, batch_size=config.batch_size
        )
        return run(key, problem.train)

    return train


def run_row(
    config: Config, problem: Problem, name: str, program: Program
) -> training.FitResult:
    """Trains all runs of a row; rows and checkpoints go below ``config.out``."""
    state, order_keys = initial_state(config, problem, name, program)
    return training.fit(
        state,
        program.step,
        problem.train,
        num_steps=config.steps,
        batch_size=config.batch_size,
        order_key=order_keys,
        seeds=[run.label() for run in runs_of(config, name)],
        eval_fn=make_evaluate(config, problem, name),
        eval_every=config.eval_every,
        select="val_score",
        select_mode="max",
        log_every=config.log_every,
        run_dir=config.out / "runs" / name.replace(":", "-"),
        resume="auto" if config.resume else False,
        overwrite=config.overwrite,
        config=config,
        may_differ=("rows", "steps", "time_steps", "plots", "quick_compile"),
        tensorboard=config.tensorboard,
        title=name,
    )
