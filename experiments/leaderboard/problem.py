"""Data sets with a leading axis of seeds, and the errors of their tasks.

All errors are positive, and lower is better: the root of 1 - R² of a number (RRMSE),
1 - AUC of a binary label, and the error rate of several classes.
"""

import hashlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import mtljax
from experiments.common import problem as problems
from experiments.common.config import ConfigError
from experiments.common.runs import keys_of
from experiments.leaderboard.config import SETS, Config, Set
from mtljax import data, models
from mtljax.data.registry import find_loader

FLOOR = 0.02
"""Smallest error in a denominator or a logarithm."""


class Part(NamedTuple):
    """A split: features ``[S, n, d]`` and labels ``[S, n, T]``, NaN if missing."""

    x: Array
    y: Array


class Problem(NamedTuple):
    """A data set of all seeds, on the device."""

    name: str
    tasks: tuple[data.Task, ...]
    counted: np.ndarray  # tasks that are averaged
    parts: dict[str, Part]
    batch_size: int
    missing: bool  # whether training labels are missing
    digest: str
    model: models.Model

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.tasks)

    def columns(self) -> Iterator[tuple[int, data.Task, slice]]:
        """Yields each task with its number and its outputs."""
        at = 0
        for t, task in enumerate(self.tasks):
            yield t, task, slice(at, at := at + width_of(task))


def width_of(task: data.Task) -> int:
    """Number of outputs of a task. A binary label has one logit."""
    return 1 if is_scalar(task) else task.size


def is_scalar(task: data.Task) -> bool:
    """Whether a task has one output: a number, or the logit of a binary label."""
    return task.kind == "regression" or task.size == 2


def _features(found: data.Dataset, split: Any, shrink: int) -> np.ndarray:
    x = data.to_float(split["image"], found.image_max)
    if shrink > 1:
        n, height, width, channels = x.shape
        shape = (n, height // shrink, shrink, width // shrink, shrink, channels)
        x = x.reshape(shape).mean((2, 4))
    return x.reshape(len(x), -1)


def _labels(found: data.Dataset, split: Any) -> np.ndarray:
    columns = []
    for task in found.tasks:
        column = np.array(split[task.name], np.float32)
        if task.kind == "classification":
            column[column == data.MISSING] = np.nan
        columns.append(column)
    return np.stack(columns, 1)


def load(config: Config, name: str) -> Problem:
    """Loads a set once per seed. Splits are cut to the shortest of all seeds.

    Raises:
      ConfigError: If a task is neither a number nor a class.
    """
    of = SETS.get(name) or Set(name, "other")
    found = [
        problems.load(config, of.loader, **_options(of, seed))
        for seed in config.seed_range
    ]
    first = found[0]
    if any(task.kind == "regression" and task.size > 1 for task in first.tasks):
        raise ConfigError(f"{name}: a task has several targets. Use one task for each.")
    parts = {}
    for part in data.SPLITS:
        sizes = [len(getattr(one, part)["image"]) for one in found]
        if part == "train" and config.train_size is not None:
            sizes.append(config.train_size)
        splits = [
            {k: v[: min(sizes)] for k, v in getattr(one, part).items()} for one in found
        ]
        x = [_features(first, split, of.shrink) for split in splits]
        # A split may lack a value of a text column. Its features are padded with zeros.
        width = max(one.shape[1] for one in x)
        x = [np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in x]
        y = [_labels(first, split) for split in splits]
        parts[part] = Part(jnp.asarray(np.stack(x)), jnp.asarray(np.stack(y)))
    count = parts["train"].x.shape[1]
    batch = config.small_batch if count < 256 else config.batch_size
    if batch > count:
        raise ConfigError(
            f"{name} has {count} training examples, fewer than a batch of {batch}."
        )
    heads = {"all": sum(map(width_of, first.tasks))}
    return Problem(
        name=name,
        tasks=first.tasks,
        counted=np.array([task.name not in of.exclude for task in first.tasks]),
        parts=parts,
        batch_size=batch,
        missing=bool(jnp.isnan(parts["train"].y).any()),
        digest=hashlib.sha256("".join(map(data.checksum, found)).encode()).hexdigest(),
        model=models.build("mlp", heads, hidden=config.hidden),
    )


def _options(of: Set, seed: int) -> dict[str, Any]:
    options = dict(of.options)
    if ":" in of.loader:
        accepted = inspect.signature(find_loader(of.loader)).parameters
        return options | ({"seed": seed} if "seed" in accepted else {})
    return options | {"seed": seed}


def initial_params(problem: Problem, seeds: range) -> Any:
    """Initial parameters, with a leading axis of seeds."""
    x = problem.parts["train"].x[0, :1]
    init = jax.jit(jax.vmap(lambda key: problem.model.init(key, x).params))
    return init(keys_of(seeds).model)


def orders(count: int, batch: int, steps: int, seeds: range) -> np.ndarray:
    """Indices of the batches ``[S, steps, batch]``, epochs without replacement."""
    per_epoch = count // batch
    found = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 1])
        epochs = [
            rng.permutation(count)[: per_epoch * batch].reshape(per_epoch, batch)
            for _ in range(-(-steps // per_epoch))
        ]
        found.append(np.concatenate(epochs)[:steps])
    return np.stack(found).astype(np.int32)


def predict(problem: Problem, params: Any, x: Array) -> Array:
    """Outputs of all tasks ``[batch, outputs]``."""
    outputs, _ = problem.model.apply((params, {}), x, train=False)
    return outputs["all"]


def example_losses(problem: Problem, out: Array, y: Array) -> Array:
    """Losses ``[n, T]`` of the examples. A missing label has a finite loss."""
    y = jnp.where(jnp.isnan(y), 0.0, y) if problem.missing else y
    kinds = {task.kind if is_scalar(task) else "several" for task in problem.tasks}
    if kinds == {"regression"}:
        return jnp.square(out - y)
    if kinds == {"classification"}:
        return optax.sigmoid_binary_cross_entropy(out, y)
    columns = []
    for t, task, outputs in problem.columns():
        mine, label = out[:, outputs], y[:, t]
        if task.kind == "regression":
            columns.append(jnp.square(mine[:, 0] - label))
        elif is_scalar(task):
            columns.append(optax.sigmoid_binary_cross_entropy(mine[:, 0], label))
        else:
            label = label.astype(jnp.int32)
            columns.append(optax.softmax_cross_entropy_with_integer_labels(mine, label))
    return jnp.stack(columns, 1)


def task_losses(problem: Problem, out: Array, y: Array) -> Array:
    """Mean losses ``[T]`` over the examples with a label."""
    each = example_losses(problem, out, y)
    if not problem.missing:
        return each.mean(0)
    return mtljax.masked_task_means(each, ~jnp.isnan(y))[0]


# --- errors, in NumPy and float64 -----------------------------------------------------


def rrmse(out: np.ndarray, y: np.ndarray) -> float:
    """Root of 1 - R². NaN if the targets are constant.

    Examples:
      >>> rrmse(np.array([0.0, 0.0]), np.array([1.0, -1.0]))
      1.0
    """
    total = np.square(y - y.mean()).sum()
    return float(np.sqrt(np.square(out - y).sum() / total)) if total > 0 else np.nan


def one_minus_auc(out: np.ndarray, y: np.ndarray) -> float:
    """Share of pairs in the wrong order, ties count half. NaN if a class is absent.

    Examples:
      >>> one_minus_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1.0]))
      0.25
    """
    positive, negative = out[y > 0.5], np.sort(out[y <= 0.5])
    if not len(positive) or not len(negative):
        return np.nan
    below = np.searchsorted(negative, positive, "left").sum()
    upto = np.searchsorted(negative, positive, "right").sum()
    right = (below + upto) / 2 / (len(positive) * len(negative))
    return float(1 - right)


def errors(problem: Problem, out: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Errors ``[T]`` of outputs ``[n, outputs]``, infinite where these are."""
    found = []
    out, y = out.astype(np.float64), y.astype(np.float64)
    for t, task, outputs in problem.columns():
        known = ~np.isnan(y[:, t])
        mine, target = out[known, outputs], y[known, t]
        if not np.isfinite(mine).all():
            found.append(np.inf)
        elif task.kind == "regression":
            found.append(rrmse(mine[:, 0], target))
        elif is_scalar(task):
            found.append(one_minus_auc(mine[:, 0], target))
        else:
            found.append(float(np.mean(mine.argmax(1) != target)))
    return np.array(found)


def score(problem: Problem, found: np.ndarray, task: int | None = None) -> float:
    """Mean logarithm of the errors of the averaged tasks, or of one task.

    This is Δm up to a constant where changes are small, and it needs no single-task
    network. A task without both classes in a split is left out, for all rows.
    """
    counted = problem.counted if task is None else np.arange(len(found)) == task
    logs = np.log(np.maximum(found[counted], FLOOR))
    return float(np.nanmean(logs)) if not np.isnan(logs).all() else np.nan


def completed(scores: np.ndarray) -> np.ndarray:
    """Gives seeds without any score ``[S, evaluations]`` the mean of the others.

    A single-task network has no score if the validation split of its seed lacks a
    class. The other seeds then select its rate and its step.

    Examples:
      >>> scores = np.array([[0.1, 0.3], [np.nan, np.nan], [0.5, 0.3]])
      >>> completed(scores).round(6).tolist()
      [[0.1, 0.3], [0.3, 0.3], [0.5, 0.3]]
    """
    known = ~np.isnan(scores)
    count = known.sum(0)
    mean = np.where(known, scores, 0).sum(0) / np.maximum(count, 1)
    without = ~known.any(1, keepdims=True) & (count > 0)
    return np.where(without, mean, scores)
