"""Training step of a row, and its run: rates first, then all seeds."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import mtljax
from experiments.common import runs as common
from experiments.common.runs import LABELS, on_device
from experiments.common.selection import Choice, search, select
from experiments.trajectories import data
from experiments.trajectories.config import SUM, Config, Scale
from experiments.trajectories.data import Problem
from experiments.trajectories.measure import probe_set
from experiments.trajectories.model import Functions
from mtljax import stack

Batch = Mapping[str, Array]

MOMENTUM = 0.9
TUNING_SEEDS = range(1000, 1003)  # rates are chosen on seeds that are not reported


class State(NamedTuple):
    """All values that change in a run."""

    params: Any  # {"trunk": ..., "heads": {"kernel": [T, F, C], "bias": [T, C]}}
    batch_stats: Any
    opt_state: Any
    balancer: Any
    lr: Float[Array, ""]
    step: Int[Array, ""]


class Row(NamedTuple):
    """A line of the tables: the tasks trained together, and the method."""

    tasks: tuple[str, ...]
    method: str = SUM

    @property
    def label(self) -> str:
        """Label in figures and tables."""
        plain = " + ".join(self.tasks)
        return plain if self.method == SUM else f"{plain}, {self.method}"

    @property
    def folder(self) -> str:
        """Name of the folder."""
        return "-".join([self.method, *self.tasks]).replace(" ", "_")[:120]


def make_step(functions: Functions, row: Row, *, careful: bool):
    """Builds ``init(params, stats, key, lr)`` and ``step(state, batch)`` of a row.

    If ``careful``, a diverged run keeps its state, and the other runs continue.
    """
    tasks = len(row.tasks)
    optimizer = optax.trace(MOMENTUM)

    def balancer(key):
        return mtljax.get_method(row.method).build(tasks, key=key)

    def init(params, stats, key, lr):
        shared = mtljax.shared_params(params, LABELS)
        return State(
            params=params,
            batch_stats=stats,
            opt_state=optimizer.init(params),
            balancer=balancer(key).init(shared),
            lr=lr,
            step=jnp.int32(0),
        )

    def step(state: State, batch: Batch):
        # Random methods use the keys in their states. This placeholder is never used.
        mine = balancer(jax.random.key(0))
        gradient = mtljax.value_and_balanced_grad(
            functions.task_losses, mine, labels=LABELS, has_aux=True
        )
        (losses, stats), grad, weighed = gradient(
            state.params, state.balancer, state.batch_stats, batch
        )
        direction, opt_state = optimizer.update(grad, state.opt_state)
        params = jax.tree.map(lambda p, d: p - state.lr * d, state.params, direction)
        if careful:
            fine = stack.all_finite(params) & jnp.isfinite(losses).all()
            params = jax.tree.map(
                lambda new, old: jnp.where(fine, new, old), params, state.params
            )
        new = State(params, stats, opt_state, weighed, state.lr, state.step + 1)
        return new, {"task_losses" if careful else "losses": losses}

    return init, step


def run_row(
    config: Config,
    scale: Scale,
    problem: Problem,
    functions: Functions,
    row: Row,
    *,
    lrs: tuple[float, ...],
    measured: bool,
) -> list[dict[str, Any]]:
    """Trains a row: all learning rates on the tuning seeds, or all seeds, measured.

    The runs are trained together by vmap, or one after the other.
    """
    seeds = config.seed_range if measured else TUNING_SEEDS
    runs = [(seed, lr) for lr in lrs for seed in seeds]
    train = on_device(problem.train)
    # The name of a task seeds its head, so that it starts equally in all sets.
    ids = jnp.array([zlib.crc32(task.encode()) for task in row.tasks], jnp.uint32)
    classes, first = jnp.array(problem.classes), train["image"][:1]
    init, step = make_step(functions, row, careful=not measured)
    splits = {"val": on_device(problem.val)}
    if measured:
        splits["train"] = on_device(problem.train, scale.eval_size)
        splits["test"] = on_device(problem.test)

    def evaluate(state: State):
        return functions.evaluate(state.params, state.batch_stats, splits)

    probed = evaluate
    if measured:
        probed = functions.probe.on(probe_set(problem)).beside(
            evaluate,
            params=lambda s: (s.params, s.batch_stats),
            step=lambda s: s.step,
        )
    found = []
    for group in [runs] if config.together else [[run] for run in runs]:
        keys = common.keys_of(seed for seed, _ in group)
        variables = [functions.init(k, first, ids, classes) for k in keys.model]
        params, stats = common.stack(variables)
        rates = sorted({lr for _, lr in group})
        part, title = "runs" if measured else "tuning", f"{problem.name}: {row.label}"
        title += "" if measured else ", learning rates"
        parts = ["-".join([part, *(f"{lr:g}" for lr in rates)]), row.folder]
        if not config.together:
            parts.append(f"seed_{group[0][0]}")
            title += f", seed {group[0][0]}"
        plan = common.Plan(
            state=jax.vmap(init)(
                params, stats, keys.method, jnp.array([lr for _, lr in group])
            ),
            step=step,
            data=train,
            order=keys.order,
            steps=scale.steps,
            batch_size=scale.batch_size,
            eval_every=scale.eval_every,
            log_every=scale.eval_every,
            evaluate=probed,
            labels=[{"seed": seed, "lr": lr} for seed, lr in group],
            folder=config.folder(problem.name).joinpath(*parts),
            about={"row": row, "scale": scale, "model": config.model, "lrs": rates},
            title=title,
            task_names=row.tasks,
            eval_at_start=measured,
            checkpoint_every=scale.steps,
        )
        found += common.train(config, plan)
    return found


def rows_of(config: Config, problem: Problem) -> list[Row]:
    """Returns single tasks, sets of tasks, then other optimizers on some sets."""
    sets = data.task_sets(config, problem)
    rows = [Row(tasks) for tasks in [*data.single_tasks(problem), *sets]]
    for tasks in data.optimiser_sets(problem):
        if tasks in sets:
            rows += [Row(tasks, method) for method in config.methods]
    return rows


def choose_by_last(rows: Sequence[dict[str, Any]], steps: int) -> Choice:
    """The rate with the best validation score after the last step.

    The measures describe whole runs. A rate at which runs first learn and then collapse
    must not win by its best step.
    """
    last = [row for row in rows if row["kind"] == "eval" and row["step"] == steps]
    return select(last, "val_mean", run=("task", "seed"))


def choose_rate(
    config: Config, scale: Scale, problem: Problem, functions_of: Any
) -> tuple[Choice, list[float]]:
    """The rate of a setting, by the single-task rows on the tuning seeds; the grid."""

    def tuned(rates):
        found = []
        for tasks in data.single_tasks(problem):
            run = (problem.select(tasks), functions_of(tasks), Row(tasks))
            rows = run_row(config, scale, *run, lrs=tuple(rates), measured=False)
            found += [{**r, "task": tasks[0]} for r in rows]
        return {"alone": found}

    if len(scale.lrs) == 1:
        return Choice([], [], scale.lrs[0], None, 0.0), list(scale.lrs)
    choose = lambda rows: choose_by_last(rows, scale.steps)
    _, choices, grid = search(tuned, choose, scale.lrs, config.extensions)
    return choices["alone"], grid


def run_at(
    config: Config,
    scale: Scale,
    problem: Problem,
    functions: Functions,
    row: Row,
    *,
    lr: float,
    edge: bool,
) -> list[dict[str, Any]]:
    """A row at a learning rate: a line a seed."""
    result = run_row(config, scale, problem, functions, row, lrs=(lr,), measured=True)
    about = functions.probe.on(probe_set(problem)).config()
    return lines_of(problem, row, result, about, edge)


COLUMNS = {
    **{name: name for name in ("train_loss", "train_score", "val_score", "test_score")},
    "sharpness": "probe_sharpness",
    "covariance": "probe_covariance_trace",
    "square_norm": "probe_covariance_square_norm",
    "fisher": "probe_fisher",
    "similarity": "probe_similarity_naive",
    "null": "probe_similarity_null",
    "split": "probe_similarity_split",
    "split_low": "probe_similarity_low",
    "split_high": "probe_similarity_high",
}
"""Names in the results and in the rows of a run."""


def lines_of(problem, row, rows, about, at_edge) -> list[dict[str, Any]]:
    """Returns a line per seed. Each quantity is ``[C][T]``, None if not measured."""
    evals = [r for r in rows if r["kind"] == "eval"]
    lines = []
    for seed in dict.fromkeys(r["seed"] for r in evals):
        mine = [r for r in evals if r["seed"] == seed]
        line: dict[str, Any] = {
            "setting": problem.name,
            "label": row.label,
            "tasks": list(row.tasks),
            "method": row.method,
            "seed": seed,
            "lr": mine[0]["lr"],
            "lr_at_edge": at_edge,
            "step": [r["step"] for r in mine],
            "nonfinite": [r.get("probe_nonfinite") for r in mine],
            "measured": about,
        }
        for name, key in COLUMNS.items():
            line[name] = [rounded(r.get(key)) for r in mine]
        lines.append(line)
    return lines


def rounded(values: Any) -> Any:
    """Rounds to five digits, more than the agreement between seeds."""
    if isinstance(values, list):
        return [rounded(v) for v in values]
    return None if values is None else float(f"{values:.5g}")
