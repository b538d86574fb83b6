"""Resumable runs of a method for all targets and seeds."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.runs import prepare
from experiments.forkmerge.config import CONTROLS, Config
from experiments.forkmerge.problem import (
    Evaluate,
    Problem,
    Split,
    make_optimizer,
    training_rows,
)
from experiments.forkmerge.steps import JOINT, joint_step, sampled_step
from mtljax import forkmerge, training
from mtljax.training import records

MAY_DIFFER = (
    *("methods", "parts", "intervals", "data_dir", "quick_compile", "strategy"),
    "save_every",
    "extensions",
)
BRANCHES = "branches.json"
"""File with the branches that are kept after pruning."""
ONE_AUXILIARY = ("pairs", "analysis")
"""Parts of runs with one auxiliary task at a time."""
MERGED = ("alone_x2", "forkmerge", "forkmerge_each")
"""Rows that fork and merge."""


@dataclasses.dataclass(frozen=True, eq=False)
class Drivers:
    """The drivers of G runs, mapped over the runs. All states are ``[G, ...]``.

    Attributes:
      make: Function ``make(branch_weights [B, T])`` that builds the driver of one run.
      branch_weights: Weights ν ``[G, B, T]``.
      strategy: How runs are trained, as for branches.
      interval: Steps between merges, Δt.
    """

    make: Callable[[Array], forkmerge.ForkMerge]
    branch_weights: Array
    strategy: str
    interval: int

    def over(self, function: Callable[..., Any], *args: Any, train: bool = False):
        """Applies ``function(driver, *args)`` to each run."""

        def one(xs):
            return function(self.make(xs[0]), *xs[1:])

        in_turn = self.strategy == "map"
        if train and self.strategy == "auto":  # XLA runs batched products slowly here
            in_turn = jax.default_backend() == "cpu"
        xs = (self.branch_weights, *args)
        return jax.lax.map(one, xs) if in_turn else jax.vmap(one)(xs)

    def init(self, states: Any, *, key: Array) -> forkmerge.ForkMergeState:
        """Returns the initial states. Each run has its own key."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            key, jnp.arange(len(self.branch_weights))
        )
        return self.over(lambda d, s, k: d.init(s, key=k), states, keys)

    @functools.cached_property
    def train(self):
        """Function ``train(state, batches, data) -> state``. All runs share batches."""

        def train(state, batches, data):
            step = lambda d, s: d.train(s, batches, data=data)[0]
            return self.over(step, state, train=True)

        return jax.jit(train)

    @functools.cached_property
    def merge(self):
        """Function ``merge(state, validation) -> (state, info)``."""

        def merge(state, validation):
            return self.over(lambda d, s: d.merge(s, validation), state)

        return jax.jit(merge)

    def prune(
        self, state: forkmerge.ForkMergeState, *, keep: int
    ) -> tuple["Drivers", forkmerge.ForkMergeState, list[tuple[int, ...]]]:
        """Keeps the best branches of each run, equally many in all runs.

        The third result has the positions of the branches that are kept.
        """
        info = state.info
        kept = forkmerge.prune_groups(
            info.weights,
            info.branch_scores,
            self.branch_weights,
            targets=(0,) * len(self.branch_weights),
            keep=keep,
        )
        select = lambda d, s, rows: d.select(s, rows)
        return self.restrict(kept), self.over(select, state, jnp.array(kept)), kept

    def restrict(self, kept: Any) -> "Drivers":
        """Returns drivers with a subset of the branches."""
        rows = jax.vmap(lambda nu, rows: nu[rows])(self.branch_weights, jnp.array(kept))
        return dataclasses.replace(self, branch_weights=rows)


def step_of(state: forkmerge.ForkMergeState) -> int:
    """Returns the number of steps that each branch of each run has taken."""
    return int(state.step[0])


class Job(NamedTuple):
    """A method with all its runs."""

    name: str  # name of the folder
    driver: Drivers
    states: Any  # the first train states, [G, ...]
    runs: list[dict[str, Any]]  # fields that identify the G runs
    splits: Mapping[str, Split]
    evaluate: Evaluate
    steps: int
    branches: tuple[dict[str, Any], ...] = ({},)  # fields that identify the branches
    merges: bool = False
    keep: int | None = None  # number of branches after the first merge


def branch_weights(config: Config, method: str, tasks: int) -> Array:
    """Returns ν ``[B, T]`` of a method. The target is task 0."""
    if method == "alone_x2":  # both slots are the target
        return jnp.eye(2)
    if method in CONTROLS:
        return jnp.eye(tasks)[:1]
    if method == "forkmerge":
        return forkmerge.target_vs_all(tasks, share=config.share)
    if method == "forkmerge_each":
        return forkmerge.target_plus_each(tasks)
    if method == "lambda_grid":
        # The target is sampled with probability 1 / (1 + λ), as in Eq. 3.
        others = [[x / (tasks - 1)] * (tasks - 1) for x in config.lambdas]
        return forkmerge.custom([[1.0, *row] for row in others])
    return jnp.ones((1, tasks))


def runs_of(
    config: Config, part: str, method: str, rates: Sequence[float], interval: int
) -> list[dict[str, Any]]:
    """Returns the G runs of a method as dictionaries of their identifying fields."""
    auxiliaries = config.domains if part in ONE_AUXILIARY else ("all",)
    runs = itertools.product(config.domains, auxiliaries, config.seed_range, rates)
    names, more = ("target", "aux", "seed", "lr"), {}
    if method in MERGED:
        more["interval"] = interval
    return [
        {"part": part, "method": method, **dict(zip(names, run, strict=True)), **more}
        for run in runs
        if run[0] != run[1]
    ]


def make_job(
    config: Config,
    problem: Problem,
    evaluate: Evaluate,
    method: str,
    rates: Sequence[float],
    *,
    part: str = "table",
    interval: int | None = None,
) -> Job:
    """Builds a job on domains, with all auxiliaries or one (``ONE_AUXILIARY``)."""
    interval = interval or config.interval
    runs = runs_of(config, part, method, rates, interval)
    steps = config.steps * (2 if method == "stl_2x" else 1)
    problem = problem._replace(optimizer=make_optimizer(config, steps))
    place = config.domains.index

    def order(run):
        target = place(run["target"])
        if method == "alone_x2":
            return [target, target]
        if run["aux"] != "all":
            return [target, place(run["aux"])]
        return [target, *(d for d in range(problem.domains) if d != target)]

    orders = np.array([order(run) for run in runs], np.int32)
    sizes = np.asarray(problem.splits["train"]["size"])
    sets = {s: training_rows(sizes, config.train_size, s) for s in config.seed_range}
    rows = jax.tree.map(lambda *x: np.stack(x), *(sets[run["seed"]] for run in runs))
    keys = jnp.stack([jax.random.key(run["seed"]) for run in runs])
    lrs = np.array([run["lr"] for run in runs], np.float32)
    states = jax.jit(jax.vmap(problem.init))(keys, orders, rows, lrs)
    tasks = orders.shape[1]
    if method in JOINT:
        step, first = joint_step(config, problem, method, tasks)
        states = states._replace(weighting=jax.vmap(first)(states.params))
    else:
        step = sampled_step(
            problem,
            alone_from=steps // 2 if method == "post_train" else None,
            apart=steps if method == "alone_x2" else 0,
            averaged=method == "stl_ema",
        )
    measure = evaluate
    if method == "stl_ema":
        states = states._replace(weighting=states.params)
        measure = lambda states: evaluate(
            states._replace(params=states.weighting, weighting=())
        )
    nu = branch_weights(config, method, tasks)

    def make(nu):
        return forkmerge.ForkMerge(
            step,
            problem.accuracy,
            nu,
            interval=interval,
            training=forkmerge.BranchTraining(
                "sum" if method in JOINT else "sample", strategy=config.strategy
            ),
            policies={"opt_state": "keep"},
        )

    each = tuple({"lambda": x} for x in config.lambdas)
    prefixes = {"table": "", "pairs": "pairs_", "analysis": "analysis_"}
    name = f"{prefixes[part]}{method}" if part in prefixes else f"every_{interval}"
    if set(rates) - set(config.lrs):
        name += "_at_" + "_".join(f"{rate:g}" for rate in rates)
    return Job(
        name,
        Drivers(
            make,
            jnp.broadcast_to(nu[None], (len(runs), *nu.shape)),
            config.strategy,
            interval,
        ),
        states,
        runs,
        problem.splits,
        measure,
        steps,
        branches=each if method == "lambda_grid" else ({},),
        merges=method in MERGED,
        keep=config.keep if method == "forkmerge_each" else None,
    )


class Run:
    """A job in progress, with its state, rows and files."""

    def __init__(self, config: Config, job: Job):
        self.config, self.job = config, job
        self.driver = job.driver
        self.folder = config.out / "runs" / job.name
        self.rows: list[dict[str, Any]] = []
        self._saver: Any = None

    def fresh(self) -> forkmerge.ForkMergeState:
        """Returns the state before the first step."""
        key = jax.random.key(self.config.first_seed)
        return self.driver.init(self.job.states, key=key)

    def finish(self) -> list[dict[str, Any]]:
        """Trains the remaining steps. Returns the rows of all evaluations."""
        prepare(self.config, [self.folder], extra=(BRANCHES,))
        with (
            training.lock_run(self.folder),
            training.Checkpointer(self.folder / "checkpoints") as self._saver,
        ):
            self._saver.clean()
            state = self._restored() if self._saver.steps() else jax.jit(self.fresh)()
            if self.job.keep is not None and step_of(state) <= self.driver.interval:
                state = self._prune(self._train(state, self.driver.interval))
            self._train(state, self.job.steps)
        return self.rows

    def _restored(self) -> forkmerge.ForkMergeState:
        if not self.config.resume:
            raise training.RunExistsError(
                f"{self.folder} already contains a run. Pass --resume to continue it "
                "or --overwrite to replace it."
            )
        step = self._saver.steps()[-1]
        kept = self.folder / BRANCHES
        if step > self.driver.interval and kept.exists():
            self.driver = self.driver.restrict(json.loads(kept.read_text()))
        target = jax.eval_shape(self.fresh)
        found = self._saver.restore(target, step, check=self._check)
        self.rows = found.meta["rows"]
        return found.state

    def _check(self, meta: dict[str, Any]) -> None:
        """Rejects a run of another configuration."""
        free = {*training.MAY_DIFFER, *MAY_DIFFER}
        config = training.to_json(self.config)
        found = records.differences(meta["config"], config, free)
        if found:
            raise training.ConfigMismatchError(
                f"The run to resume has another configuration: {'; '.join(found)}."
            )

    def _save(self, state: forkmerge.ForkMergeState) -> None:
        meta = {"config": self.config, "rows": self.rows}
        step = step_of(state)
        due = step % self.config.save_every == 0 or step >= self.job.steps
        if due and step not in self._saver.steps():
            self._saver.save(step, state, training.to_json(meta))

    def _train(
        self, state: forkmerge.ForkMergeState, num_steps: int
    ) -> forkmerge.ForkMergeState:
        """Trains all runs up to ``num_steps``, and merges if the method does.

        The rows are those of the merges, or of all branches at each evaluation.
        """
        merges, splits, every = self.job.merges, self.job.splits, self.config.eval_every
        interval, num_steps = self.driver.interval, min(num_steps, self.job.steps)
        periods = (interval, min(interval, every)) if merges else (every,)
        while True:
            step = step_of(state)
            due = step % interval == 0 or step >= num_steps
            if merges and due and step > int(state.merged_at[0]):
                state, info = self.driver.merge(state, splits["val"])
                more = {"weights": info.weights, "branch_scores": info.branch_scores}
                one = jax.tree.map(lambda x: x[:, None], state.merged)
                self._record(one, step, jax.device_get(more))
            if step >= num_steps:
                return state
            n = min(num_steps - step, *(p - step % p for p in periods))
            batches = jnp.arange(step, step + n)
            state = self.driver.train(state, batches, splits["train"])
            if not merges:
                self._record(state.branches, step + n, {})
            self._save(state)

    def _prune(self, state: forkmerge.ForkMergeState) -> forkmerge.ForkMergeState:
        assert self.job.keep is not None
        self.driver, state, kept = self.driver.prune(state, keep=self.job.keep)
        # A checkpoint may not have been written yet.
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / BRANCHES).write_text(json.dumps(kept))
        return state

    def _record(self, states: Any, step: int, more: Mapping[str, Any]) -> None:
        """Records rows of train states ``[G, B]``."""
        found = jax.device_get(self.job.evaluate(states))
        for g, run in enumerate(self.job.runs):
            for b, branch in enumerate(self.job.branches):
                numbers = {k: v[g, b] for k, v in found.items()}
                extra = {k: v[g] for k, v in more.items()}
                row = {**run, **branch, "step": step, **numbers, **extra}
                # As read back from the file, where a non-finite score is None.
                self.rows.append(training.to_json(row))
