"""The data of FS-MTL, Section 5, a model on them, and its measurements."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.common import problem as common
from experiments.common.config import ConfigError
from experiments.common.runs import on_device
from experiments.fs_mtl.config import Config
from mtljax import data, metrics, models

Batch = Mapping[str, Array]
OVERLAYS = ("multidigits", "multi_mnist", "multi_fashion", "multi_fashion_mnist")


class Problem(NamedTuple):
    """A model on a data set, with one head per trained task."""

    names: tuple[str, ...]
    init: Callable[[Array], models.Variables]
    task_losses: Callable[..., Any]  # (params, batch_stats, batch) -> losses, stats
    logits: Callable[..., Any]  # (params, batch_stats, images) -> {task: logits}
    train: Batch
    val: Batch
    test: Batch


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Averages over squares of ``side`` pixels and discards incomplete rows."""
    if side == 1:
        return images
    n, height, width, channels = images.shape
    if min(height, width) < 2 * side:
        raise ConfigError(f"--shrink {side} is too large for {height}x{width} pixels.")
    rows, columns = height // side, width // side
    blocks = images[:, : rows * side, : columns * side].reshape(
        n, rows, side, columns, side, channels
    )
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(images.dtype)


def load(config: Config, name: str) -> data.Dataset:
    """Loads the re-created data set: two items of different classes, overlaid by max.

    The images are shrunk, and the tasks are the two classifications.

    See :func:`mtljax.data.multi_mnist` for the construction. The generator of the
    paper's files is not published.
    """
    sizes = {f"{s}_size": getattr(config, f"{s}_size") for s in data.SPLITS}
    seed = config.data_seed if name in OVERLAYS else None
    found = common.load(config, name, seed=seed, **sizes)
    tasks = tuple(task for task in found.tasks if task.kind == "classification")
    if len(tasks) != 2 or any(common.Scorer(found, task).masked for task in tasks):
        raise ConfigError(
            f"{name} has {len(tasks)} classification tasks. Two tasks without missing "
            "labels are required."
        )

    def arrays(split):
        kept = {task.name: split[task.name] for task in tasks}
        return {"image": shrink(split["image"], config.shrink), **kept}

    splits = {part: arrays(getattr(found, part)) for part in data.SPLITS}
    shape = splits["train"]["image"].shape[1:]
    return dataclasses.replace(found, tasks=tasks, input_shape=shape, **splits)


def make_problem(
    config: Config, splits: data.Dataset, task: int | None = None
) -> Problem:
    """Builds a model with a head for each task, or for a single task."""
    tasks = splits.tasks if task is None else (splits.tasks[task],)
    names = tuple(t.name for t in tasks)
    heads = {t.name: t.size for t in tasks}
    model = common.model_of(config, heads, splits.input_shape)

    def apply(params, batch_stats, images, *, train):
        images = data.to_float(images, splits.image_max)
        return model.apply((params, batch_stats), images, train=train)

    def cross_entropies(outputs, batch):
        each = [
            optax.softmax_cross_entropy_with_integer_labels(outputs[n], batch[n]).mean()
            for n in names
        ]
        return jnp.stack(each)

    def task_losses(params, batch_stats, batch):
        outputs, stats = apply(params, batch_stats, batch["image"], train=True)
        return cross_entropies(outputs, batch), stats

    def logits(params, batch_stats, images):
        return apply(params, batch_stats, images, train=False)[0]

    def taken(split):
        return on_device({k: split[k] for k in ("image", *names)})

    train = taken(splits.train)
    example = data.to_float(train["image"][:1], splits.image_max)
    return Problem(
        names,
        jax.jit(lambda key: model.init(key, example)),
        task_losses,
        logits,
        train,
        taken(splits.val),
        taken(splits.test),
    )


def in_parts(
    function: Callable[..., Any], images: Array, size: int = 1000
) -> dict[str, Array]:
    """Computes the logits of many images in chunks, to limit the memory."""
    parts = [function(images[i : i + size]) for i in range(0, len(images), size)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def scores(problem: Problem, params: Any, batch_stats: Any) -> dict[str, Array]:
    """Returns accuracy and calibration on the validation and the test split."""
    found: dict[str, Array] = {}
    for prefix, split in (("val", problem.val), ("test", problem.test)):
        outputs = in_parts(
            lambda images: problem.logits(params, batch_stats, images), split["image"]
        )
        for name in problem.names:
            out, target = outputs[name], split[name]
            found[f"{prefix}_{name}_acc"] = metrics.accuracy(out, target)
            if prefix == "test":
                found[f"test_{name}_ece"] = metrics.ece(out, target)
                found[f"test_{name}_brier"] = metrics.brier(out, target)
                entropy = metrics.predictive_entropy(out).mean()
                found[f"test_{name}_entropy"] = entropy
        main = [found[f"{prefix}_{name}_acc"] for name in problem.names]
        found[f"{prefix}_score"] = jnp.stack(main).mean()
    return found
