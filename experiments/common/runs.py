"""Training the runs of a row: keys, files, and what happens when one is stopped."""

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
"""Which parameters of a multi-task network are shared."""


class Interrupted(Exception):
    """A signal stopped the run; ``--resume`` continues it."""


class Keys(NamedTuple):
    """Keys of stacked runs: runs of one seed share them, whatever their method."""

    model: Array
    method: Array
    order: Array  # of the data


def keys_of(seeds: Iterable[int]) -> Keys:
    """The keys of a run for each seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init, order = training.split_run_key(keys)
    model, method = jax.vmap(jax.random.split, out_axes=1)(init)
    return Keys(model, method, order)


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def on_device(split: Mapping[str, np.ndarray], size: int | None = None) -> Any:
    """The first examples of a split, all by default, as arrays of jax."""
    return {name: jnp.asarray(array[:size]) for name, array in split.items()}


def chosen_tasks(tasks: Sequence[int | None], count: int) -> Array:
    """Task weights ``[runs, T]``: all tasks, or the one that a run is of."""
    return jnp.array(
        [[float(task in (None, t)) for t in range(count)] for task in tasks]
    )


class Plan(NamedTuple):
    """How the runs of a row are trained, evaluated and kept."""

    steps: int
    batch_size: int
    eval_every: int
    log_every: int
    evaluate: Callable[[Any], dict[str, Array]]
    labels: Sequence[Any]  # of the runs
    folder: pathlib.Path
    about: Any  # what must be equal for a run to be resumed
    title: str = ""
    task_names: Sequence[str] | None = None
    may_differ: Sequence[str] = ()
    select: str | None = None
    eval_at_start: bool = False
    checkpoint_every: int | None = None
    positive_losses: bool = False


def train(
    config: Common,
    plan: Plan,
    *,
    state: Any,
    step: Callable[..., Any],
    data: Any,
    order: Array,
) -> training.FitResult:
    """Trains stacked runs, or resumes them; files go to ``plan.folder``.

    Args:
      config: Says whether to resume or to overwrite.
      plan: What the runs are.
      state: Their first states, stacked.
      step: Of one run.
      data: Arrays that batches are taken from.
      order: Their keys of the order of the data.

    Returns:
      The last states and the rows.

    Raises:
      Interrupted: If a signal stopped them.
    """
    result = training.fit(
        state,
        step,
        data,
        num_steps=plan.steps,
        batch_size=plan.batch_size,
        order_key=order,
        seeds=plan.labels,
        task_names=None if plan.task_names is None else list(plan.task_names),
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
        raise Interrupted
    return result


def prepare(config: Common, folders: Iterable[pathlib.Path], extra=()) -> None:
    """With --overwrite removes the files of earlier runs; call it after reading data.

    Only files that a run wrote are removed, and ``extra`` names in the folder.

    Raises:
      RunLockedError: If a process is working in a folder.
    """
    for folder in folders if config.overwrite else ():
        if folder.is_dir():
            with training.lock_run(folder):
                remove_run(folder)
                for name in extra:
                    (folder / name).unlink(missing_ok=True)


def finished(folder: pathlib.Path, steps: int) -> list[dict[str, Any]]:
    """Rows of a run that made all its steps; none of one that did not."""
    if not holds_run(folder) or not (folder / "metrics.jsonl").is_file():
        return []
    _, rows = training.read_jsonl(folder)
    done = any(row["kind"] == "eval" and row["step"] >= steps for row in rows)
    return rows if done else []
