"""Trains the runs of a row: random keys, files and interruption."""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.common.config import Common
from mtljax import training
from mtljax.training.run_dir import holds_run, remove_run

LABELS = {"trunk": "shared", "heads": "own"}
"""Labels of the shared parameters of a multi-task network."""


class Keys(NamedTuple):
    """Random keys of stacked runs. They depend on the seed and not on the method."""

    model: Array
    method: Array
    order: Array  # order of the data


def keys_of(seeds: Iterable[int]) -> Keys:
    """Returns the keys of a run for each seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init, order = training.split_run_key(keys)
    model, method = jax.vmap(jax.random.split, out_axes=1)(init)
    return Keys(model, method, order)


def stack(trees: Sequence[Any]) -> Any:
    """Stacks trees of equal structure along a new leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def on_device(split: Mapping[str, np.ndarray], size: int | None = None) -> Any:
    """Returns the first examples of a split (all by default) as JAX arrays."""
    return {name: jnp.asarray(array[:size]) for name, array in split.items()}


def chosen_tasks(tasks: Sequence[int | None], count: int) -> Array:
    """Returns task weights ``[runs, T]``: all tasks, or the single task of a run."""
    return jnp.array(
        [[float(task in (None, t)) for t in range(count)] for task in tasks]
    )


class Run(NamedTuple):
    """One entry of the vmapped axis: a seed, a learning rate, a task of a baseline."""

    seed: int
    lr: float
    task: int | None = None

    def label(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns the fields that identify this run in the rows."""
        task = "all" if self.task is None else names[self.task]
        return {"seed": self.seed, "lr": self.lr, "task": task}


class Plan(NamedTuple):
    """Stacked runs of a row, and the settings to train, evaluate and store them."""

    state: Any  # stacked initial states
    step: Callable[..., Any]  # step function of one run
    data: Any  # arrays from which the batches are taken
    order: Array  # keys of the data order, one per run
    steps: int
    batch_size: int
    eval_every: int
    log_every: int
    evaluate: Callable[[Any], dict[str, Array]]
    labels: Sequence[Any]  # labels of the runs
    folder: pathlib.Path
    about: Any  # must be equal for a run to be resumed
    title: str = ""
    task_names: Sequence[str] | None = None
    may_differ: Sequence[str] = ()
    select: str | None = None
    eval_at_start: bool = False
    checkpoint_every: int | None = None
    positive_losses: bool = False


def train(config: Common, plan: Plan) -> list[dict[str, Any]]:
    """Trains stacked runs or resumes them. The files are written to ``plan.folder``.

    Args:
      config: Configuration, with the flags to resume or to overwrite.
      plan: The runs.

    Returns:
      The rows.

    Raises:
      KeyboardInterrupt: If a signal stopped the runs. The option ``--resume`` continues
        them.
    """
    result = training.fit(
        plan.state,
        plan.step,
        plan.data,
        num_steps=plan.steps,
        batch_size=plan.batch_size,
        order_key=plan.order,
        seeds=plan.labels,
        task_names=plan.task_names,
        evaluation=training.Evaluation(
            plan.evaluate,
            every=plan.eval_every,
            at_start=plan.eval_at_start,
            select=plan.select,
            mode="max",
        ),
        checkpointing=training.Checkpointing(
            plan.folder,
            every=plan.checkpoint_every,
            resume="auto" if config.resume else False,
            overwrite=config.overwrite,
            config=plan.about,
            may_differ=(*plan.may_differ, "data_dir", "quick_compile", "extensions"),
        ),
        logging=training.Logging(
            plan.log_every, tensorboard=config.tensorboard, title=plan.title
        ),
        execution=training.Execution(
            loop_on="auto", positive_losses=plan.positive_losses
        ),
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result.rows


def beyond(rates: Sequence[float], grid: Sequence[float]) -> list[str]:
    """Returns the rates that are not in the grid, for the name of a folder."""
    return [f"{rate:g}" for rate in rates if rate not in grid]


def splits_of(seeds: Sequence[int], by_seed: bool) -> Array:
    """Returns the number of the split of each run, 0 if all seeds share one."""
    return jnp.array([(seed - min(seeds)) * by_seed for seed in seeds], jnp.int32)


def prepare(config: Common, folders: Iterable[pathlib.Path], extra=()) -> None:
    """Removes the files of earlier runs with --overwrite. Call it after reading data.

    It only removes files that a run wrote, and files named ``extra`` in the folder.

    Raises:
      RunLockedError: If another process uses a folder.
    """
    for folder in folders if config.overwrite else ():
        if folder.is_dir():
            with training.lock_run(folder):
                remove_run(folder)
                for name in extra:
                    (folder / name).unlink(missing_ok=True)


def finished(folder: pathlib.Path, steps: int) -> list[dict[str, Any]]:
    """Returns the rows of a finished run, or an empty list."""
    if not holds_run(folder) or not (folder / "metrics.jsonl").is_file():
        return []
    _, rows = training.read_jsonl(folder)
    done = any(row["kind"] == "eval" and row["step"] >= steps for row in rows)
    return rows if done else []
