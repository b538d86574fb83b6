"""The problem, one step of a row of the table, and its run with all seeds."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

import mtljax
from experiments.common import problem as problems
from experiments.common import runs as common
from experiments.common.config import ConfigError, check_batch
from experiments.common.runs import LABELS
from experiments.igb.config import (
    ROWS,
    SINGLE_TASK,
    Agent,
    Config,
    Row,
    Training,
    is_graph,
)
from mtljax import data, models, training
from mtljax.models.mpnn import MPNN

Batch = Mapping[str, Array]

EVAL_CHUNK = 1000  # molecules at once
SLOW_AGENT = ("mgda", "pcgrad", "nash_mtl")  # in their company the agent's lr is lower
WEIGHTED_HEADS = ("mgda", "imtl_g", "nash_mtl")  # in the authors' code


class State(NamedTuple):
    """Everything that changes in a run."""

    params: Any
    opt_state: Any
    loss_balancer: Any
    gradient_balancer: Any
    constants: Float[Array, " tasks"]  # task weights of the single-task baselines


class Problem(NamedTuple):
    """A data set with a model and what is measured on it."""

    name: str
    dataset: data.Dataset
    settings: Training
    init_models: Callable[[Array], Any]  # of many keys, compiled once
    train: Batch
    task_losses: Callable[[Any, Batch], Array]
    evaluate: Callable[[State], dict[str, Array]]

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.dataset.tasks]


class Program(NamedTuple):
    """A row on a problem: its first state around a model, and its step."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    positive_losses: bool


class Run(NamedTuple):
    """One entry of the vmapped axis: a seed (on one task)."""

    seed: int
    task: int | None

    def label(self, names: list[str]) -> dict[str, Any]:
        """What tells this run apart in the rows."""
        return {
            "seed": self.seed,
            "task": "all" if self.task is None else names[self.task],
        }


def build_model(name: str, settings: Training, dataset: data.Dataset) -> models.Model:
    """A message-passing network for molecules, an MLP for tables."""
    heads = {task.name: task.size for task in dataset.tasks}
    if not is_graph(name):
        return models.build("mlp", heads, hidden=settings.hidden)
    trunk = MPNN(
        edges="distances" if name == "qm9" else "bonds",
        width=settings.width,
        edge_width=settings.edge_width,
        features=settings.features,
    )
    return models.multitask(trunk, heads)


def in_chunks(function: Callable[[Array], Array], x: Array, size: int) -> Array:
    """``function`` on chunks of the rows, in turn: memory of one chunk."""
    whole = len(x) // size
    if whole <= 1 and len(x) <= size:
        return function(x)
    parts = jax.lax.map(function, x[: whole * size].reshape(whole, size, *x.shape[1:]))
    parts = parts.reshape(whole * size, *parts.shape[2:])
    rest = x[whole * size :]
    return jnp.concatenate([parts, function(rest)]) if len(rest) else parts


def make_problem(config: Config, name: str) -> Problem:
    """Loads the data and binds model, losses and metrics."""
    settings = config.training_of(name)
    dataset = problems.load(
        config,
        name,
        ("regression",),
        train_size=settings.train_size,
        source=config.source if name == "qm9" else None,
    )
    kind = "graph" if is_graph(name) else "table"
    examples = len(dataset.train["image"])
    check_batch(f"{kind}.batch_size", settings.batch_size, examples)
    model = build_model(name, settings, dataset)
    tasks = [task.name for task in dataset.tasks]
    if any(task.size > 1 for task in dataset.tasks) or any(
        problems.Scorer(dataset, task).masked for task in dataset.tasks
    ):
        raise ConfigError(f"--data {name} needs one number a task, none missing.")
    units = dataset.origin.get("targets", {"std": [1.0] * len(tasks)})
    scale = jnp.asarray(units["std"], jnp.float32)

    def predict(params, images, *, train):
        outputs, _ = model.apply((params, {}), images, train=train)
        return jnp.stack([outputs[task][:, 0] for task in tasks], -1)

    def targets(batch):
        return jnp.stack([batch[task] for task in tasks], -1)

    def task_losses(params, batch):
        error = predict(params, batch["image"], train=True) - targets(batch)
        return jnp.square(error).mean(0)

    train = common.on_device(dataset.train)
    splits = {
        "val": common.on_device(dataset.val, settings.eval_size),
        "test": common.on_device(dataset.test, settings.eval_size),
    }

    def evaluate(params, constants, splits):
        found = {}
        for part, split in splits.items():
            run = lambda images: predict(params, images, train=False)
            outputs = in_chunks(run, split["image"], EVAL_CHUNK)
            error = jnp.abs(outputs - targets(split)).mean(0)
            found[f"{part}_mae"] = error * scale  # in the target's unit
            if part == "val":  # a single-task run is judged by its own task
                found["val_score"] = (constants * error).sum() / constants.sum()
        return found

    jitted = jax.jit(jax.vmap(evaluate, in_axes=(0, 0, None)))

    def evaluate_states(state: State):
        return jitted(state.params, state.constants, splits)

    init_one = jax.jit(lambda key: model.init(key, train["image"][:1]).params)

    def init_models(keys):
        return common.stack([init_one(k) for k in keys])

    return Problem(
        name, dataset, settings, init_models, train, task_losses, evaluate_states
    )


def learning_rate(settings: Training) -> optax.Schedule:
    """Halved at every fifth of the run, as in the paper's NYUv2 runs."""
    fifths = [max(1, settings.steps * i // 5) for i in range(1, 5)]
    return optax.piecewise_constant_schedule(settings.lr, dict.fromkeys(fifths, 0.5))


def phases(agent: Agent, steps: int) -> mtljax.IGBPhases:
    """The phases of IGB in steps."""
    start = round(agent.window[0] * steps)
    stop = max(start + 1, round(agent.window[1] * steps))
    train_from = max(stop, round(agent.train_from * steps))
    use_from = max(train_from, round(agent.use_from * steps))
    return mtljax.IGBPhases((start, stop), train_from, use_from, steps)


def loss_balancer(
    row: Row, num_tasks: int, settings: Training, *, key: Array, constants: Array
) -> mtljax.Balancer:
    """The first of the two: weights from the losses alone."""
    agent, steps = settings.agent, settings.steps
    if row.loss == "linear":
        return mtljax.linear(num_tasks, weights=constants)
    if row.loss == "random_loss_weighting":  # of sum T, as in the authors' code
        return mtljax.random_loss_weighting(num_tasks, key=key, scale="sum")
    when = phases(agent, steps)
    if row.loss == "igb_v1":
        return mtljax.igb_v1(num_tasks, window=when.window, num_steps=steps)
    if row.loss == "igb_v2":
        options: dict[str, Any] = dict(row.agent)
        capacity = max(1, round(agent.capacity * options.pop("buffer", 1.0)))
        return mtljax.igb_v2(
            num_tasks,
            key=key,
            phases=when,
            schedule=learning_rate(settings),
            agent=mtljax.IGBAgent(
                density=agent.density,
                capacity=capacity,
                period=agent.period,
                updates=agent.updates,
                batch_size=agent.batch_size,
                hidden=agent.hidden,
                optimizer=(
                    agent.lr_composed if row.gradient in SLOW_AGENT else agent.lr
                ),
            ),
            **options,
        )
    return mtljax.METHODS[row.loss].factory(num_tasks)


def gradient_balancer(row: Row, num_tasks: int, key: Array) -> mtljax.Balancer:
    """The second: from the gradients of the weighted losses, or their sum."""
    options: dict[str, Any] = {
        "mgda": {"scale": "sum"},
        "cagrad": {"rescale": "1+c^2", "scale": "sum"},
        "pcgrad": {"key": key},
    }.get(row.gradient or "", {})
    return mtljax.METHODS[row.gradient or "linear"].factory(num_tasks, **options)


def make_program(config: Config, problem: Problem, method: str) -> Program:
    """Initial state and step of a row of the table."""
    row = Row("single task") if method == SINGLE_TASK else ROWS[method]
    settings, num_tasks = problem.settings, problem.dataset.num_tasks
    optimizer = optax.adam(learning_rate(settings))
    weighted = config.heads == "code" and row.gradient in WEIGHTED_HEADS

    def balancers(key, constants):
        one, two = jax.random.split(key)
        return (
            loss_balancer(row, num_tasks, settings, key=one, constants=constants),
            gradient_balancer(row, num_tasks, two),
        )

    def init(params, key, constants):
        first, second = balancers(key, constants)
        shared = mtljax.shared_params(params, LABELS)
        return State(
            params=params,
            opt_state=optimizer.init(params),
            loss_balancer=first.init(shared),
            gradient_balancer=second.init(shared),
            constants=constants,
        )

    def step(state: State, batch: Batch):
        # Keys of random methods live in their states; this one is never drawn from.
        first, second = balancers(jax.random.key(0), state.constants)
        weigh = first.weigh
        assert weigh is not None

        def weighted_losses(params, balancer_state, batch):
            """The first's losses, for the second: Algorithm 3, heads included."""
            losses = problem.task_losses(params, batch)
            seen = jax.lax.stop_gradient(losses)
            weights, balancer_state = weigh(balancer_state, losses=seen)
            weights = jax.lax.stop_gradient(weights)
            return weights * losses, (losses, weights, balancer_state)

        gradient = mtljax.value_and_balanced_grad(
            weighted_losses,
            second,
            labels=LABELS,
            heads="weighted" if weighted else "own",
            has_aux=True,
        )
        (_, (losses, weights, one)), grad, two = gradient(
            state.params, state.gradient_balancer, state.loss_balancer, batch
        )
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        logged = {"losses": losses, "task_weights": weights * two.task_weights}
        if row.loss.startswith("igb"):
            logged["log_weights"] = one.log_weights
        if row.loss == "igb_v2":
            logged |= {"reward": one.reward, "temperature": one.temperature}
        return State(params, opt_state, one, two, state.constants), logged

    example, _ = balancers(jax.random.key(0), jnp.ones(num_tasks))
    return Program(init, step, example.positive_losses)


def runs_of(config: Config, problem: Problem, method: str) -> list[Run]:
    """The vmapped axis: seeds, and tasks for the baselines."""
    tasks = range(problem.dataset.num_tasks) if method == SINGLE_TASK else (None,)
    return [Run(seed, task) for task in tasks for seed in config.seed_range]


def initial_state(config: Config, problem: Problem, method: str, program: Program):
    """The stacked states of all runs of a row, and their keys of data order."""
    runs = runs_of(config, problem, method)
    keys = common.keys_of(run.seed for run in runs)
    params = problem.init_models(keys.model)
    constants = common.chosen_tasks(
        [run.task for run in runs], problem.dataset.num_tasks
    )
    state = jax.jit(jax.vmap(program.init))(params, keys.method, constants)
    return state, keys.order


def run_method(
    config: Config, problem: Problem, method: str, program: Program
) -> training.FitResult:
    """Trains all runs of a row; rows and checkpoints go below ``config.out``."""
    settings = problem.settings
    state, order_keys = initial_state(config, problem, method, program)
    about = {
        "data": problem.name,
        "method": method,
        "heads": config.heads,
        "training": settings,
    }
    plan = common.Plan(
        steps=settings.steps,
        batch_size=settings.batch_size,
        eval_every=settings.eval_every,
        log_every=settings.log_every,
        evaluate=problem.evaluate,
        labels=[run.label(problem.names) for run in runs_of(config, problem, method)],
        folder=folder(config, problem.name) / "runs" / method.replace(":", "-"),
        about=about,
        title=f"{problem.name} {method}",
        task_names=problem.names,
        may_differ=("training.methods", "training.time_steps"),
        # The step is picked later, by Δm on validation; these are for a resume.
        checkpoint_every=max(1, settings.steps // 4),
        positive_losses=program.positive_losses,
    )
    return common.train(
        config,
        plan,
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
    )


def folder(config: Config, data_name: str):
    """Where the files of a data set go."""
    return config.out / re.sub("[/:]", "-", data_name)
