"""One compiled program per row and set, and the runs of a row."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import mtljax
from experiments.common.runs import LABELS, keys_of
from experiments.common.selection import search, select
from experiments.common.timing import stopwatch
from experiments.leaderboard import options, problem
from experiments.leaderboard.config import (
    CONTROLS,
    EQUAL,
    NULL,
    NULL_SEED,
    SINGLE,
    STATIC,
    WIDE,
    Config,
)
from experiments.leaderboard.problem import Problem
from mtljax import stack, training

Row = dict[str, Any]
EPSILON = 1e-8
"""Added to the losses of methods that are defined for positive losses only."""


class State(NamedTuple):
    """All values that change in a run."""

    params: Any
    opt_state: Any
    balancer: Any
    failed: Array  # number of rejected steps in sequence


class Outputs(NamedTuple):
    """Outputs of all evaluations, leaves ``[S, evaluations, ...]``."""

    val: Array
    test: Array
    failed: Array


class Try(NamedTuple):
    """A configuration that is offered to a row: a rate, and static weights."""

    lr: float
    weights: tuple[float, ...]
    config: int | None = None  # number of the configuration of a static row
    task: int | None = None  # of a single-task network


def make_step(config: Config, on: Problem, name: str):
    """Returns ``init(params, key, weights)`` and ``step(state, x, y, lr, weights)``."""
    num_tasks = on.num_tasks
    optimizer = optax.scale_by_adam()

    def build(key, weights):
        return options.balancer(
            name, num_tasks, steps=config.steps, key=key, weights=weights
        )

    example = build(jax.random.key(0), jnp.ones(num_tasks))
    # A mask is needed only where a batch may have no label of a task.
    shift = EPSILON if example.positive_losses else 0.0

    def task_losses(params, x, y):
        return problem.task_losses(on, problem.predict(on, params, x), y) + shift

    def init(params, key, weights):
        shared = mtljax.shared_params(params, LABELS)
        state = build(key, weights).init(shared)
        return State(params, optimizer.init(params), state, jnp.zeros((), jnp.int32))

    def step(state: State, x, y, lr, weights):
        # Random methods use the keys in their states. This placeholder is never used.
        balancer = build(jax.random.key(0), weights)
        gradient = mtljax.value_and_balanced_grad(task_losses, balancer, labels=LABELS)
        mask = ~jnp.isnan(y).all(0) if on.missing else None
        losses, grad, new = gradient(state.params, state.balancer, x, y, mask=mask)
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        fine = stack.all_finite(params) & jnp.isfinite(losses).all()
        if balancer.observe is not None:
            after = task_losses(params, x, y)
            new = mtljax.observe(balancer, new, losses=after, mask=mask)
        # A rejected step leaves the run unchanged, and the other runs continue.
        accepted = State(params, opt_state, new, jnp.zeros((), jnp.int32))
        rejected = state._replace(failed=state.failed + 1)
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), accepted, rejected)

    return init, step


def make_program(config: Config, on: Problem, name: str) -> Callable[..., Outputs]:
    """Compiles the training of all seeds at one rate, with its evaluations.

    The arguments are the initial parameters, the keys, the task weights, the rate, the
    order of the examples and the data. All arrays but the rate and the weights have a
    leading axis of seeds.
    """
    init, step = make_step(config, on, name)

    def run(params, key, weights, lr, *data):
        order, train, val, test = data

        def one(state, at):
            x, y = train.x[at], train.y[at]
            return step(state, x, y, lr, weights), None

        def chunk(state, order):
            state, _ = jax.lax.scan(one, state, order)
            predict = lambda x: problem.predict(on, state.params, x)
            return state, Outputs(predict(val), predict(test), state.failed)

        chunks = order.reshape(-1, config.eval_every, order.shape[-1])
        return jax.lax.scan(chunk, init(params, key, weights), chunks)[1]

    axes = (0, 0, None, None, 0, 0, 0, 0)
    if name in options.SEQUENTIAL:

        def runs(params, key, weights, lr, *rest):
            one = lambda given: run(given[0], given[1], weights, lr, *given[2:])
            return jax.lax.map(one, (params, key, *rest))

        return jax.jit(runs)
    return jax.jit(jax.vmap(run, in_axes=axes))


class Trainer:
    """The runs of a row on a set: the program and its arguments."""

    def __init__(self, config: Config, on: Problem, name: str):
        self.config, self.on, self.name = config, on, name
        shared = EQUAL if name in CONTROLS else name  # one program of static weights
        self.program = cached_program(config, on.name, shared)
        seeds = config.seed_range
        if name == NULL:  # the same splits, so that differences stay paired
            seeds = range(NULL_SEED, NULL_SEED + config.seeds)
        train = on.parts["train"]
        order = problem.orders(train.x.shape[1], on.batch_size, config.steps, seeds)
        self.params = cached_params(config, on.name, seeds)
        self.keys = keys_of(seeds).method
        self.rest = (
            *(jnp.asarray(order), train),
            *(on.parts["val"].x, on.parts["test"].x),
        )

    def outputs(self, lr: float, weights: Sequence[float]) -> Outputs:
        """Trains all seeds at one rate."""
        given = (jnp.asarray(weights, jnp.float32), jnp.float32(lr))
        return self.program(self.params, self.keys, *given, *self.rest)

    def rows(self, tried: Try) -> list[Row]:
        """The chosen and the last evaluation of each seed at one configuration."""
        out = jax.device_get(self.outputs(tried.lr, tried.weights))
        targets = {part: np.asarray(self.on.parts[part].y) for part in ("val", "test")}
        evaluations, failed = [], {}
        scores = np.full(out.failed.shape, np.nan)
        for s, seed in enumerate(self.config.seed_range):
            for e in range(out.failed.shape[1]):
                found = {
                    part: problem.errors(self.on, getattr(out, part)[s, e], y[s])
                    for part, y in targets.items()
                }
                scores[s, e] = problem.score(self.on, found["val"], tried.task)
                failed[seed] = bool(out.failed[s, e] > 0)
                step = (e + 1) * self.config.eval_every
                at = {"seed": seed, "lr": tried.lr, "step": step}
                evaluations.append({**at, "val_score": np.nan, **found})
        scores = problem.completed(np.where(out.failed > 0, np.nan, scores))
        scores = np.where(out.failed > 0, np.nan, scores)
        for row, score in zip(evaluations, scores.flat, strict=True):
            row["val_score"] = float(score)
        choice = select(evaluations, maximise=False)
        about = {"set": self.on.name, "row": self.name}
        if tried.config is not None:
            about |= {"config": tried.config, "weights": list(tried.weights)}
        if tried.task is not None:
            about["task"] = self.on.tasks[tried.task].name
        late = self.config.steps - self.config.eval_every
        return [
            {
                **about,
                **training.to_json(one),
                "last": row is choice.last,
                "late": chosen["step"] >= late,
                "diverged": failed[one["seed"]],
            }
            for row in (choice.rows, choice.last)
            for one, chosen in zip(row, choice.rows, strict=True)
        ]


# --- configurations ------------------------------------------------------------------


def train_row(
    config: Config, on: Problem, name: str, rates: Sequence[float]
) -> list[Row]:
    """Trains a row on a set: all configurations, and beyond an end of the grid."""
    trainer = Trainer(config, on, name)
    if name in (STATIC, WIDE):
        tries = static_tries(on, trainer, name, rates)
        return [row for tried in tries for row in trainer.rows(tried)]

    def train(rates):
        tries = [tried for lr in rates for tried in tries_at(on, name, lr)]
        return {name: [row for tried in tries for row in trainer.rows(tried)]}

    choose = functools.partial(select, maximise=False, run=("task", "seed"))
    found, _, _ = search(train, choose, rates, config.extensions)
    return [dict(row) for row in found[name]]


def tries_at(on: Problem, name: str, lr: float) -> list[Try]:
    """The runs of a row at a rate: one, or one for each task."""
    ones = (1.0,) * on.num_tasks
    if name != SINGLE:
        return [Try(lr, ones)]
    unit = np.eye(on.num_tasks)
    return [Try(lr, tuple(unit[t]), task=t) for t in range(on.num_tasks)]


def static_tries(
    on: Problem, trainer: Trainer, name: str, grid: Sequence[float]
) -> list[Try]:
    """Configurations of static weights.

    ``static-5`` has as many as there are rates, drawn at random: a rate of the grid and
    Dirichlet weights. ``static-25`` has all rates with five vectors each: equal
    weights, the inverse losses of the constant predictor, the inverse losses after a
    tenth of a run of equal weights, and two Dirichlet vectors.
    """
    count = on.num_tasks
    if name == STATIC:
        rng = np.random.default_rng(0)
        rates = rng.choice(sorted(grid), len(grid))
        drawn = [rng.dirichlet(np.ones(count)) * count for _ in rates]
        pairs = [(float(lr), w) for lr, w in zip(rates, drawn, strict=True)]
    else:
        rng = np.random.default_rng(1)
        middle = sorted(grid)[len(grid) // 2]
        vectors = [
            np.ones(count),
            _inverse(constant_losses(on)),
            _inverse(losses_after(on, trainer, middle)),
            *(rng.dirichlet(np.ones(count)) * count for _ in range(2)),
        ]
        pairs = [(lr, w) for lr in sorted(grid) for w in vectors]
    return [
        Try(lr, tuple(float(w) for w in weights.round(6)), config=i)
        for i, (lr, weights) in enumerate(pairs)
    ]


def _inverse(losses: np.ndarray) -> np.ndarray:
    inverse = 1 / np.maximum(losses, 1e-3)
    return inverse * len(losses) / inverse.sum()


def constant_losses(on: Problem) -> np.ndarray:
    """Training losses ``[T]`` of the best constant prediction, mean over seeds."""
    y = np.asarray(on.parts["train"].y, np.float64)
    found = []
    for t, task in enumerate(on.tasks):
        column = [one[~np.isnan(one)] for one in y[:, :, t]]
        if task.kind == "regression":
            found.append(np.mean([one.var() for one in column]))
        else:
            shares = [np.bincount(one.astype(int)) / len(one) for one in column]
            entropy = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]
            found.append(np.mean(entropy))
    return np.array(found)


def losses_after(on: Problem, trainer: Trainer, lr: float) -> np.ndarray:
    """Validation losses ``[T]`` of equal weights after a tenth of a run."""
    out = trainer.outputs(lr, [1.0] * on.num_tasks).val
    at = max(0, out.shape[1] // 10 - 1)
    each = [
        problem.task_losses(on, out[s, at], on.parts["val"].y[s])
        for s in range(len(out))
    ]
    return np.asarray(np.mean(jax.device_get(each), 0, dtype=np.float64))


# --- time of a step ------------------------------------------------------------------


def step_cost(config: Config, on: Problem, name: str) -> dict[str, float | None]:
    """Time of a step of one run relative to equal weights, and its operations.

    The two programs alternate, and the median ratio is reported.
    """
    mine, flops = _clock(config, on, name)
    other, _ = _reference_clock(config, on.name)
    pairs = [(mine(), other()) for _ in range(config.cost_rounds)]
    return {
        "step_ms": float(np.median([a for a, _ in pairs])),
        "step_ratio": float(np.median([a / b for a, b in pairs])),
        "gflop": None if flops is None else flops / 1e9,
    }


@functools.cache
def _reference_clock(config: Config, name: str):
    return _clock(config, cached_problem(config, name), EQUAL)


def _clock(config: Config, on: Problem, name: str):
    init, step = make_step(config, on, name)
    params = jax.tree.map(
        lambda p: p[0], cached_params(config, on.name, config.seed_range)
    )
    weights = jnp.ones(on.num_tasks)
    state = init(params, keys_of(config.seed_range[:1]).method[0], weights)
    train = on.parts["train"]
    batch = (train.x[0, : on.batch_size], train.y[0, : on.batch_size])
    one = lambda state, x, y: step(state, x, y, jnp.float32(1e-3), weights)
    return stopwatch(one, state, *batch, steps=min(config.steps, 200))


@functools.cache
def cached_problem(config: Config, name: str) -> Problem:
    """Loads a set once per process."""
    return problem.load(config, name)


@functools.cache
def cached_params(config: Config, name: str, seeds: range) -> Any:
    """Initial parameters of all seeds, once per process."""
    return problem.initial_params(cached_problem(config, name), seeds)


@functools.lru_cache(maxsize=1)
def cached_program(config: Config, name: str, row: str) -> Callable[..., Outputs]:
    """Compiles the program that consecutive jobs share once."""
    return make_program(config, cached_problem(config, name), row)
