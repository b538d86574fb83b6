"""Problem, training step of a table row, and its run with all seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import mtljax
from experiments.common import problem as problems
from experiments.common import runs as common
from experiments.common.config import ConfigError, check_batch
from experiments.common.runs import LABELS
from experiments.common.timing import stopwatch
from experiments.igb.config import (
    ROWS,
    SINGLE_TASK,
    Agent,
    Config,
    Row,
    Training,
    is_graph,
)
from mtljax import data, models, stack
from mtljax.models.mpnn import MPNN

Batch = Mapping[str, Array]

EVAL_CHUNK = 1000  # molecules per chunk
SLOW_AGENT = ("mgda", "pcgrad", "nash_mtl")  # lower learning rate of the agent
WEIGHTED_HEADS = ("mgda", "imtl_g", "nash_mtl")  # in the authors' code


class State(NamedTuple):
    """All values that change in a run."""

    params: Any
    opt_state: Any
    loss_balancer: Any
    gradient_balancer: Any
    constants: Float[Array, " tasks"]  # task weights: of single-task baselines, static
    lr: Float[Array, ""]  # in the beginning
    split: Int[Array, ""]


class Problem(NamedTuple):
    """A data set with a model and its evaluation."""

    name: str
    dataset: data.Dataset
    settings: Training
    init_models: Callable[[Array], Any]  # takes several keys, compiled once
    train: Batch  # [examples, splits, ...]
    by_seed: bool  # whether each seed has a split
    units: Float[Array, "splits tasks"]  # deviations of the targets
    signal: Float[Array, " splits"]  # R² of ridge regression on test, median over tasks
    task_losses: Callable[[Any, Batch, Any], Array]
    evaluate: Callable[[State], dict[str, Array]]

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.dataset.tasks]


class Program(NamedTuple):
    """A row on a problem: its initial state and its step."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    positive_losses: bool


def build_model(name: str, settings: Training, dataset: data.Dataset) -> models.Model:
    """Builds a message-passing network for molecules, or an MLP for tables."""
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
    """Applies ``function`` to chunks of the rows in sequence, to limit the memory."""
    whole = len(x) // size
    if whole <= 1 and len(x) <= size:
        return function(x)
    parts = jax.lax.map(function, x[: whole * size].reshape(whole, size, *x.shape[1:]))
    parts = parts.reshape(whole * size, *parts.shape[2:])
    rest = x[whole * size :]
    return jnp.concatenate([parts, function(rest)]) if len(rest) else parts


def ridge_r2(dataset: data.Dataset) -> float:
    """R² of ridge regression on the test split, the median over tasks.

    Validation chooses the penalty; the fit is on training and validation examples.
    """
    names = [task.name for task in dataset.tasks]
    x, y = {}, {}
    for part in data.SPLITS:
        split = getattr(dataset, part)
        x[part] = np.asarray(split["image"], np.float64).reshape(
            len(split["image"]), -1
        )
        y[part] = np.stack([split[name] for name in names], -1).astype(np.float64)

    def scores(fitted, part, penalty):
        a = np.concatenate([x[p] for p in fitted])
        b = np.concatenate([y[p] for p in fitted])
        gram = (a - a.mean(0)).T @ (a - a.mean(0)) + penalty * np.eye(a.shape[1])
        slope = np.linalg.solve(gram, (a - a.mean(0)).T @ (b - b.mean(0)))
        error = y[part] - b.mean(0) - (x[part] - a.mean(0)) @ slope
        return 1 - (error**2).mean(0) / y[part].var(0)

    penalty = max((1.0, 10.0, 100.0), key=lambda p: scores(["train"], "val", p).mean())
    return float(np.median(scores(["train", "val"], "test", penalty)))


def split_tables(
    config: Config, name: str, settings: Training
) -> tuple[list[data.Dataset], bool]:
    """The sets of all splits, and whether they are of seeds."""
    kinds, size = ("regression",), settings.train_size
    if not name.startswith("mulan_mtr"):
        source = config.source if name == "qm9" else None
        return [
            problems.load(config, name, kinds, train_size=size, source=source)
        ], False
    load = lambda seed: problems.load(config, name, kinds, train_size=size, seed=seed)
    return [load(seed) for seed in config.seed_range], True


def make_problem(config: Config, name: str) -> Problem:
    """Loads the data and binds model, losses and metrics."""
    settings = config.training_of(name)
    sets, by_seed = split_tables(config, name, settings)
    dataset = sets[0]
    kind = "graph" if is_graph(name) else "table"
    examples = len(dataset.train["image"])
    check_batch(f"{kind}.batch_size", settings.batch_size, examples)
    model = build_model(name, settings, dataset)
    tasks = [task.name for task in dataset.tasks]
    if any(task.size > 1 for task in dataset.tasks) or any(
        problems.Scorer(dataset, task).masked for task in dataset.tasks
    ):
        raise ConfigError(f"--data {name} needs one number per task without gaps.")
    ones = {"std": [1.0] * len(tasks)}
    scale = np.array([s.origin.get("targets", ones)["std"] for s in sets], np.float32)
    # Tables keep the ratios of their units; one number for all makes them of order one.
    common_unit = np.sqrt((scale**2).mean(1, keepdims=True))
    units = scale / common_unit if by_seed else np.ones_like(scale)
    per_unit = jnp.asarray(common_unit if by_seed else scale)
    units = jnp.asarray(units)

    def stacked(part, size=None):
        parts = [common.on_device(getattr(found, part), size) for found in sets]
        return {key: jnp.stack([p[key] for p in parts], 1) for key in parts[0]}

    def predict(params, images, *, train):
        outputs, _ = model.apply((params, {}), images, train=train)
        return jnp.stack([outputs[task][:, 0] for task in tasks], -1)

    def targets(batch, split):
        found = jnp.stack([batch[task][:, split] for task in tasks], -1)
        return found * units[split][None]

    def task_losses(params, batch, split):
        out = predict(params, batch["image"][:, split], train=True)
        return jnp.square(out - targets(batch, split)).mean(0)

    train = stacked("train")
    splits = {part: stacked(part, settings.eval_size) for part in ("val", "test")}

    def evaluate(params, constants, at, splits):
        found = {}
        for part, split in splits.items():
            run = lambda images: predict(params, images, train=False)
            outputs = in_chunks(run, split["image"][:, at], EVAL_CHUNK)
            error = jnp.abs(outputs - targets(split, at)).mean(0)
            found[f"{part}_mae"] = error * per_unit[at]  # in the target's unit
            if part == "val":  # a single-task run is judged by its own task
                found["val_score"] = (constants * error).sum() / constants.sum()
        return found

    jitted = jax.jit(jax.vmap(evaluate, in_axes=(0, 0, 0, None)))

    def evaluate_states(state: State):
        return jitted(state.params, state.constants, state.split, splits)

    init_one = jax.jit(jax.vmap(lambda k: model.init(k, train["image"][:1, 0]).params))
    signal = [ridge_r2(found) for found in sets] if by_seed else [np.nan]
    return Problem(
        name=name,
        dataset=dataset,
        settings=settings,
        init_models=init_one,
        train=train,
        by_seed=by_seed,
        units=units,
        signal=jnp.asarray(signal),
        task_losses=task_losses,
        evaluate=evaluate_states,
    )


def learning_rate(settings: Training) -> optax.Schedule:
    """The share of the first rate: halved at every fifth, as in the NYUv2 runs."""
    fifths = [max(1, settings.steps * i // 5) for i in range(1, 5)]
    return optax.piecewise_constant_schedule(1.0, dict.fromkeys(fifths, 0.5))


def phases(agent: Agent, steps: int) -> mtljax.IGBPhases:
    """Returns the phases of IGB in steps."""
    start = round(agent.window[0] * steps)
    stop = max(start + 1, round(agent.window[1] * steps))
    train_from = max(stop, round(agent.train_from * steps))
    use_from = max(train_from, round(agent.use_from * steps))
    return mtljax.IGBPhases((start, stop), train_from, use_from, steps)


def loss_balancer(
    row: Row, num_tasks: int, settings: Training, *, key: Array, constants: Array
) -> mtljax.Balancer:
    """Builds the first balancer, which computes weights from the losses."""
    agent, steps = settings.agent, settings.steps
    if row.loss in ("linear", "static"):
        return mtljax.linear(num_tasks, weights=constants)
    if row.loss == "random_loss_weighting":  # sum T, as in the authors' code
        return mtljax.random_loss_weighting(num_tasks, key=key, scale="sum")
    when = phases(agent, steps)
    if row.loss == "igb_v1":
        return mtljax.igb_v1(num_tasks, window=when.window, num_steps=steps)
    if row.loss == "igb_v2":
        options: dict[str, Any] = dict(row.agent)
        # Never trained: no step is as late as its first training.
        period = 2**30 if options.pop("frozen", False) else agent.period
        return mtljax.igb_v2(
            num_tasks,
            key=key,
            phases=when,
            schedule=learning_rate(settings),
            agent=mtljax.IGBAgent(
                density=agent.density,
                capacity=agent.capacity,
                period=period,
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
    """Builds the second balancer, from gradients of the weighted losses, or a sum."""
    options: dict[str, Any] = {
        "mgda": {"scale": "sum"},
        "cagrad": {"rescale": "1+c^2", "scale": "sum"},
        "pcgrad": {"key": key},
    }.get(row.gradient or "", {})
    return mtljax.METHODS[row.gradient or "linear"].factory(num_tasks, **options)


def make_program(config: Config, problem: Problem, method: str) -> Program:
    """Builds the initial state and the step of a table row."""
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

    def init(params, key, constants, lr, split):
        first, second = balancers(key, constants)
        shared = mtljax.shared_params(params, LABELS)
        return State(
            params=params,
            opt_state=optimizer.init(params),
            loss_balancer=first.init(shared),
            gradient_balancer=second.init(shared),
            constants=constants,
            lr=lr,
            split=split,
        )

    def step(state: State, batch: Batch):
        # Random methods use the keys in their states. This placeholder is never used.
        first, second = balancers(jax.random.key(0), state.constants)
        weigh = first.weigh
        assert weigh is not None

        def weighted_losses(params, balancer_state, batch):
            """Weights the losses by the first balancer (Algorithm 3, with heads)."""
            losses = problem.task_losses(params, batch, state.split)
            seen = jax.lax.stop_gradient(losses)
            weights, balancer_state = weigh(balancer_state, losses=seen)
            weights = jax.lax.stop_gradient(weights)
            shown = jnp.log(losses) if row.log else losses
            return weights * shown, (losses, weights, balancer_state)

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
        updates = jax.tree.map(lambda u: state.lr * u, updates)
        params = optax.apply_updates(state.params, updates)
        # A diverged run keeps its state, and the other runs continue. The name of the
        # logged losses is one that does not stop the training.
        fine = stack.all_finite(params) & jnp.isfinite(losses).all()
        logged = {"task_losses": losses, "task_weights": weights * two.task_weights}
        if row.loss.startswith("igb"):
            logged["log_weights"] = one.log_weights
        if row.loss == "igb_v2":
            logged |= {"reward": one.reward, "temperature": one.temperature}
        rest = (state.constants, state.lr, state.split)
        new = State(params, opt_state, one, two, *rest)
        keep = lambda new, old: jnp.where(fine, new, old)
        return jax.tree.map(keep, new, state), logged

    example, _ = balancers(jax.random.key(0), jnp.ones(num_tasks))
    return Program(init, step, example.positive_losses or row.log)


def runs_of(
    config: Config, problem: Problem, method: str, rates: Sequence[float]
) -> list[common.Run]:
    """The vmapped axis: seeds, learning rates, and tasks for the baselines."""
    tasks = range(problem.dataset.num_tasks) if method == SINGLE_TASK else (None,)
    seeds = config.seed_range
    return [common.Run(s, lr, t) for t in tasks for lr in rates for s in seeds]


def initial_state(
    problem: Problem, method: str, program: Program, runs: Sequence[common.Run]
):
    """Returns the stacked states of all runs of a row, and their data-order keys."""
    keys = common.keys_of(run.seed for run in runs)
    params = problem.init_models(keys.model)
    splits = common.splits_of([run.seed for run in runs], problem.by_seed)
    constants = common.chosen_tasks(
        [run.task for run in runs], problem.dataset.num_tasks
    )
    if method == "static":  # of standardised targets, with sum T
        constants = 1 / problem.units[splits] ** 2
        constants *= constants.shape[1] / constants.sum(1, keepdims=True)
    rates = jnp.array([run.lr for run in runs])
    start = jax.jit(jax.vmap(program.init))
    return start(params, keys.method, constants, rates, splits), keys.order


def run_method(
    config: Config, problem: Problem, method: str, rates: Sequence[float]
) -> list[dict[str, Any]]:
    """Trains all runs of a row. Files are written under ``config.out``."""
    settings = problem.settings
    program = make_program(config, problem, method)
    runs = runs_of(config, problem, method, rates)
    state, order_keys = initial_state(problem, method, program, runs)
    beyond = common.beyond(rates, settings.lrs)
    about = {
        "data": problem.name,
        "method": method,
        "heads": config.heads,
        "training": settings,
    }
    plan = common.Plan(
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
        steps=settings.steps,
        batch_size=settings.batch_size,
        eval_every=settings.eval_every,
        log_every=settings.log_every,
        evaluate=problem.evaluate,
        labels=[run.label(problem.names) for run in runs],
        folder=config.folder(problem.name)
        / "runs"
        / "-".join([method.replace(":", "-"), *beyond]),
        about=about,
        title=f"{problem.name} {method}",
        task_names=problem.names,
        may_differ=("training.methods",),
        # The step is selected later by Δm. These checkpoints only allow a resume.
        checkpoint_every=max(1, settings.steps // 4),
        positive_losses=program.positive_losses,
    )
    return common.train(config, plan)


def run_times(
    config: Config, problem: Problem, method: str, reference: str
) -> list[float]:
    """Time of a whole run of a row over that of another, one ratio for each seed.

    The runs are not stacked, as users train one. The runs of the two rows alternate.
    """
    settings = problem.settings
    batch = {k: v[: settings.batch_size] for k, v in problem.train.items()}

    def prepare(name):
        program = make_program(config, problem, name)
        runs = runs_of(config, problem, name, settings.lrs[:1])
        state, _ = initial_state(problem, name, program, runs)
        one = lambda i: jax.tree.map(lambda x: x[i], state)
        step = lambda state, batch: program.step(state, batch)[0]
        clock, _ = stopwatch(step, one(0), batch, steps=settings.steps)
        return lambda i: clock(one(i))

    mine, other = prepare(method), prepare(reference)
    return [mine(i) / other(i) for i in range(config.seeds)]
