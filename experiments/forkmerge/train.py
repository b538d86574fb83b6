"""Resumable runs of a method, for all targets and seeds at once."""

import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.forkmerge.config import Config
from experiments.forkmerge.problem import Problem
from experiments.forkmerge.steps import JOINT, joint_step, sampled_step
from mtljax import forkmerge, training
from mtljax.training import records

MERGED = ("forkmerge", "forkmerge_each")
MAY_DIFFER = ("methods", "data_dir", "plots", "quick_compile", "strategy")


def branch_weights(config: Config, method: str) -> Array:
    """ν ``[B, T]`` of a method, the target being task 0."""
    tasks = len(config.domains)
    if method == "stl":
        return jnp.eye(tasks)[:1]
    if method == "forkmerge":
        return forkmerge.target_vs_all(tasks, share=config.share)
    if method == "forkmerge_each":
        return forkmerge.target_plus_each(tasks)
    if method == "lambda_grid":
        # The target is drawn with probability 1 / (1 + λ), as in Eq. 3.
        others = [[x / (tasks - 1)] * (tasks - 1) for x in config.lambdas]
        return forkmerge.custom([[1.0, *row] for row in others])
    return jnp.ones((1, tasks))


def runs_of(config: Config) -> list[tuple[int, int]]:
    """(target, seed) of the G runs of a method."""
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    return [(t, s) for t in range(len(config.domains)) for s in seeds]


def make_driver(config: Config, problem: Problem, method: str):
    """The branches of a method for all runs, and their first train states."""
    runs = runs_of(config)
    tasks = len(config.domains)
    orders = jnp.array([[t, *(o for o in range(tasks) if o != t)] for t, _ in runs])
    keys = jnp.stack([jax.random.key(seed) for _, seed in runs])
    states = jax.jit(jax.vmap(problem.init))(keys, orders)
    if method in JOINT:
        step, first = joint_step(config, problem, method)
        states = states._replace(weighting=jax.vmap(first)(states.params))
    else:
        alone_from = config.steps // 2 if method == "post_train" else None
        step = sampled_step(problem, alone_from=alone_from)
    nu = branch_weights(config, method)
    driver = forkmerge.ForkMerge(
        step,
        lambda state, split, _: problem.accuracy(state, split),
        jnp.broadcast_to(nu[None], (len(runs), *nu.shape)),
        interval=config.interval,
        targets=jnp.arange(len(runs)),
        realisation="sum" if method in JOINT else "sample",
        strategy=config.strategy,
        policies={"opt_state": "keep"},
        merge_source=config.merge_source,
        evaluate_every=None if config.merge_source == "last" else config.eval_every,
    )
    return driver, states


def same(config: Config) -> Callable[[dict[str, Any]], None]:
    """Refuses to go on with a run of another configuration."""
    identity = training.to_json(config)

    def check(meta: dict[str, Any]) -> None:
        free = {*training.MAY_DIFFER, *MAY_DIFFER}
        found = records.differences(meta["config"], identity, free)
        if found:
            raise training.ConfigMismatchError(
                f"The run to go on with was made otherwise: {'; '.join(found)}."
            )

    return check


class Run:
    """A method for all targets and seeds: its state, its rows, its files."""

    def __init__(
        self,
        config: Config,
        problem: Problem,
        method: str,
        evaluate: Callable[[Any], dict[str, Array]],
    ):
        self.config, self.problem, self.method = config, problem, method
        self.evaluate = evaluate  # one program for all methods
        self.driver, self._states = make_driver(config, problem, method)
        self.folder = config.out / "runs" / method
        self.rows: list[dict[str, Any]] = []
        self._saver: Any = None

    def fresh(self) -> forkmerge.ForkMergeState:
        """The state before the first step."""
        key = jax.random.key(self.config.first_seed)
        return self.driver.init(self._states, key=key, per_target=True)

    def finish(self) -> list[dict[str, Any]]:
        """Trains what is left to train; the rows of all evaluations."""
        config = self.config
        if config.overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        with training.Checkpointer(self.folder) as self._saver:
            self._saver.clean()
            state = self._restored() if self._saver.steps() else jax.jit(self.fresh)()
            if self.method not in MERGED:
                self._train(state)
            else:
                self._fork_and_merge(state)
        return self.rows

    def _restored(self) -> forkmerge.ForkMergeState:
        if not self.config.resume:
            raise training.RunExistsError(
                f"{self.folder} already holds a run: add --resume to go on with it or "
                "--overwrite to start again."
            )
        step = self._saver.steps()[-1]
        kept = self.folder / "branches.json"
        if step > self.config.interval and kept.exists():
            self.driver = self.driver.restrict(json.loads(kept.read_text()))
        target = jax.eval_shape(self.fresh)
        found = self._saver.restore(target, step, check=same(self.config))
        self.rows = found.meta["rows"]
        return found.state

    def _save(self, state: forkmerge.ForkMergeState) -> None:
        meta = {"config": self.config, "rows": self.rows}
        step = int(state.step)
        if step not in self._saver.steps():
            self._saver.save(step, state, training.to_json(meta))

    def _train(self, state: forkmerge.ForkMergeState) -> None:
        """Branches that never meet: every other method."""
        every, steps = self.config.eval_every, self.config.steps
        while (step := int(state.step)) < steps:
            n = min(every - step % every, steps - step)
            state, _ = self.driver.train(
                state, jnp.arange(step, step + n), data=self.problem.splits["train"]
            )
            self._record(state.branches, step + n, {})
            self._save(state)

    def _fork_and_merge(self, state: forkmerge.ForkMergeState) -> None:
        config, splits = self.config, self.problem.splits

        def merged(state, info):
            more = (
                info._asdict()
                if config.held_out
                else {
                    "weights": info.weights,
                    "branch_scores": info.branch_scores,
                }
            )
            one = jax.tree.map(lambda x: x[:, None], state.merged)
            self._record(one, int(state.step), training.to_json(more))

        def run(state, steps):
            return self.driver.run(
                state,
                lambda step, n: jnp.arange(step, step + n),
                steps,
                validation=splits["val"],
                report=splits.get("report"),
                data=splits["train"],
                chunk=config.eval_every,
                on_chunk=lambda state, _: self._save(state),
                on_merge=merged,
            )

        first = int(state.step) <= config.interval
        if self.method == "forkmerge_each" and first:
            state = run(state, min(config.interval, config.steps))
            before = self.driver
            self.driver, state = self.driver.prune(
                state, keep=config.keep, target=(0,) * len(runs_of(config))
            )
            kept = positions(before.branch_weights, self.driver.branch_weights)
            (self.folder / "branches.json").write_text(json.dumps(kept))
        run(state, config.steps)

    def _record(self, states: Any, step: int, more: Mapping[str, Any]) -> None:
        """Rows of train states ``[G, B]``: a branch of the grid is a λ."""
        runs = runs_of(self.config)
        count = jax.tree.leaves(states)[0].shape[1]
        found = jax.device_get(self.evaluate(states))
        for g, (target, seed) in enumerate(runs):
            for b in range(count):
                row = {
                    "method": self.method,
                    "target": self.config.domains[target],
                    "seed": seed,
                    "step": step,
                    **{k: float(v[g, b]) for k, v in found.items()},
                    **{k: v[g] for k, v in more.items()},
                }
                if self.method == "lambda_grid":
                    row["lambda"] = self.config.lambdas[b]
                self.rows.append(row)


def positions(before: Array, after: Array) -> list[list[int]]:
    """Which rows of ``before`` ``[G, B, T]`` those of ``after`` are."""
    return [
        [old.tolist().index(row) for row in new.tolist()]
        for old, new in zip(np.asarray(before), np.asarray(after), strict=True)
    ]
