"""Problem, training step, and the run of one method with all seeds."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import mtljax
from experiments.common import runs as common
from experiments.common.config import check_batch
from experiments.common.problem import LOWER, Scorer, load, model_of
from experiments.common.runs import LABELS
from experiments.multidigits.config import SINGLE_TASK, Config
from mtljax import data, metrics, models, training

Batch = Mapping[str, Array]


class State(NamedTuple):
    """All values that change in a run."""

    params: Any
    batch_stats: Any
    opt_state: Any
    balancer: Any
    lr: Float[Array, ""]
    constants: Float[Array, " tasks"]  # task weights of the single-task baselines
    step: Int[Array, ""]


class Problem(NamedTuple):
    """A data set with a model and its evaluation."""

    dataset: data.Dataset
    init_model: Callable[[Array], models.Variables]
    train: Batch
    task_losses: Callable[..., Any]
    evaluate: Callable[[State], dict[str, Array]]
    columns: dict[str, int]  # metric -> task, in the order of the table


class Program(NamedTuple):
    """A method on a problem: its initial state and its step.

    It is built once per method, so that training and timing share one compilation.
    """

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    positive_losses: bool


def make_problem(config: Config) -> Problem:
    """Loads the data and binds model, losses and metrics."""
    options: dict[str, Any] = {"train_size": config.train_size}
    if config.source == "tfds":
        options |= {"source": config.source, "download": config.download}
    dataset = load(config, config.data, **options)
    check_batch("batch_size", config.batch_size, len(dataset.train["image"]))
    heads = {task.name: task.size for task in dataset.tasks}
    model = model_of(config, heads, dataset.input_shape)
    scorers = [Scorer(dataset, task) for task in dataset.tasks]

    def predict(params, batch_stats, batch, *, train):
        images = data.to_float(batch["image"], dataset.image_max)
        return model.apply((params, batch_stats), images, train=train)

    def losses_of(outputs, batch):
        return jnp.stack(
            [s.loss(outputs[s.task.name], batch[s.task.name]) for s in scorers]
        )

    def task_losses(params, batch_stats, batch):
        outputs, batch_stats = predict(params, batch_stats, batch, train=True)
        return losses_of(outputs, batch), batch_stats

    def scores(outputs, batch, prefix):
        return {
            f"{prefix}_{column}": value
            for s in scorers
            for column, value in s.scores(
                outputs[s.task.name], batch[s.task.name]
            ).items()
        }

    train = common.on_device(dataset.train)
    probe = {k: v[: config.probe_size] for k, v in train.items()}
    splits = {
        "val": common.on_device(dataset.val, config.eval_size),
        "test": common.on_device(dataset.test, config.eval_size),
    }

    def evaluate(params, batch_stats, constants, splits, probe):
        found: dict[str, Array] = {}
        for name, split in splits.items():
            outputs, _ = predict(params, batch_stats, split, train=False)
            found[f"{name}_losses"] = losses_of(outputs, split)
            found |= scores(outputs, split, name)
        # The score of a single-task run uses its own task, other scores use the mean.
        main = jnp.stack([found[f"val_{column}"] for column in main_columns])
        found["val_score"] = (constants * main).sum() / constants.sum()
        _, gramian = mtljax.task_gramian(
            lambda trunk: task_losses(params | {"trunk": trunk}, batch_stats, probe)[0]
        )(params["trunk"])
        upper = jnp.triu_indices(len(dataset.tasks), k=1)
        return found | {"cosines": metrics.cosine_matrix(gramian)[upper]}

    columns = {c: i for i, s in enumerate(scorers) for c in s.columns}
    main_columns = [c for c in columns if not c.endswith(LOWER)]
    # All methods share one program, which takes only the evaluated values.
    jitted = jax.jit(jax.vmap(evaluate, in_axes=(0, 0, 0, None, None)))

    def evaluate_states(state: State):
        return jitted(state.params, state.batch_stats, state.constants, splits, probe)

    image = data.to_float(train["image"][:1], dataset.image_max)
    # One small program for any number of runs.
    init_model = jax.jit(lambda key: model.init(key, image))
    return Problem(dataset, init_model, train, task_losses, evaluate_states, columns)


def make_program(config: Config, problem: Problem, method: str) -> Program:
    """Builds the initial state and the step of a method."""
    num_tasks = len(problem.dataset.tasks)
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    optimizer = optax.chain(clip, optax.scale_by_adam())

    def balancer_of(constants, key):
        if method == SINGLE_TASK:
            return mtljax.linear(num_tasks, weights=constants)
        return mtljax.get_method(method).build(num_tasks, key=key)

    def init(variables, key, lr, constants):
        params, batch_stats = variables
        shared = mtljax.shared_params(params, LABELS)
        return State(
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            balancer=balancer_of(constants, key).init(shared),
            lr=lr,
            constants=constants,
            step=jnp.int32(0),
        )

    def step(state: State, batch: Batch):
        # Random methods use the keys in their states. This placeholder is never used.
        balancer = balancer_of(state.constants, jax.random.key(0))
        gradient = mtljax.value_and_balanced_grad(
            problem.task_losses,
            balancer,
            labels=LABELS,
            heads=config.heads,
            has_aux=True,
        )
        (losses, batch_stats), grad, balancer_state = gradient(
            state.params, state.balancer, state.batch_stats, batch
        )
        direction, opt_state = optimizer.update(grad, state.opt_state, state.params)
        updates = jax.tree.map(lambda d: -state.lr * d, direction)
        params = optax.apply_updates(state.params, updates)
        if balancer.observe is not None:
            after, _ = problem.task_losses(params, batch_stats, batch)
            balancer_state = mtljax.observe(balancer, balancer_state, losses=after)
        new = state._replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            balancer=balancer_state,
            step=state.step + 1,
        )
        return new, {"losses": losses, "task_weights": balancer_state.task_weights}

    example = balancer_of(jnp.ones(num_tasks), jax.random.key(0))
    return Program(init, step, example.positive_losses)


def runs_of(config: Config, problem: Problem, method: str) -> list[common.Run]:
    """Builds the vmapped axis: seeds x learning rates, and tasks for the baselines."""
    tasks = range(len(problem.dataset.tasks)) if method == SINGLE_TASK else (None,)
    seeds = config.seed_range
    return [common.Run(s, r, t) for t in tasks for r in config.lrs for s in seeds]


def initial_state(config: Config, problem: Problem, method: str, program: Program):
    """Returns the stacked states of all runs of a method, and their data-order keys."""
    runs = runs_of(config, problem, method)
    keys = common.keys_of(run.seed for run in runs)
    variables = jax.jit(common.stack)([problem.init_model(k) for k in keys.model])
    constants = common.chosen_tasks(
        [run.task for run in runs], len(problem.dataset.tasks)
    )
    lrs = jnp.array([run.lr for run in runs])
    state = jax.jit(jax.vmap(program.init))(variables, keys.method, lrs, constants)
    return state, keys.order


def step_times(
    config: Config, problem: Problem, programs: Mapping[str, Program]
) -> dict[str, float]:
    """Measures the milliseconds of a step of each method, the median of three rounds.

    All runs of a method are trained together, by the program that was compiled for
    training. The methods alternate. A drift of the machine affects them equally.
    """
    batch = {name: array[: config.batch_size] for name, array in problem.train.items()}
    clocks = {}
    for method, program in programs.items():
        state, order = initial_state(config, problem, method, program)
        one = jax.tree.map(lambda x: x[0], state)
        sizes: Any = {"batch_size": config.batch_size, "seeds": True}
        run = training.make_runner(program.step, one, batch, loop_on="auto", **sizes)

        def clock(run=run, state=state, order=order):
            mine = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # donated
            start = time.perf_counter()
            done = run(mine, problem.train, order, 0, config.time_steps)
            jax.block_until_ready(done)
            return 1e3 * (time.perf_counter() - start) / config.time_steps

        clock()  # compiles the program, unless training compiled it
        clocks[method] = clock
    times = [[clock() for clock in clocks.values()] for _ in range(3)]
    return dict(zip(clocks, np.median(times, axis=0).tolist(), strict=True))


def run_method(
    config: Config, problem: Problem, method: str, program: Program
) -> list[dict[str, Any]]:
    """Trains all runs of a method. Files are written under ``config.out``."""
    state, order_keys = initial_state(config, problem, method, program)
    names = [task.name for task in problem.dataset.tasks]
    plan = common.Plan(
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        log_every=config.log_every,
        evaluate=problem.evaluate,
        labels=[run.label(names) for run in runs_of(config, problem, method)],
        folder=config.out / "runs" / method,
        about=config,
        title=method,
        task_names=names,
        may_differ=("methods", "steps", "time_steps"),
        select="val_score",
        positive_losses=program.positive_losses,
    )
    return common.train(config, plan)
