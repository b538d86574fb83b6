"""The data of FS-MTL §5 re-created, a model on them, and what is measured."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.fs_mtl.config import Config, ConfigError, Set
from mtljax import data, metrics, models

Batch = Mapping[str, Array]
LABELS = {"trunk": "shared", "heads": "own"}


class Splits(NamedTuple):
    """Arrays of a data set, images shrunk, and the two classification tasks."""

    train: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    tasks: tuple[data.Task, ...]
    image_max: int
    notes: str


class Problem(NamedTuple):
    """A model on a data set, with one head for every task that is trained."""

    names: tuple[str, ...]
    init: Callable[[Array], models.Variables]
    task_losses: Callable[..., Any]  # (params, batch_stats, batch) -> losses, stats
    losses: Callable[..., Any]  # (params, batch_stats, batch) -> losses, in evaluation
    logits: Callable[..., Any]  # (params, batch_stats, images) -> {task: logits}
    train: Batch
    val: Batch
    test: Batch


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Means over squares of ``side`` pixels, rounded; odd rows at the end are lost."""
    if side == 1:
        return images
    n, height, width, channels = images.shape
    if min(height, width) < 2 * side:
        raise ConfigError(f"--shrink {side} leaves nothing of {height}x{width} pixels.")
    rows, columns = height // side, width // side
    blocks = images[:, : rows * side, : columns * side].reshape(
        n, rows, side, columns, side, channels
    )
    return np.rint(blocks.mean((2, 4), dtype=np.float32)).astype(images.dtype)


def load(config: Config, name: Set) -> Splits:
    """The re-creation of the set: two items of different classes, overlaid by max.

    See :func:`mtljax.data.multi_mnist` for the construction; the generator of the
    paper's files is not published.
    """
    options: dict[str, Any] = {"seed": config.data_seed, "data_dir": config.data_dir}
    sizes = {
        f"{s}_size": getattr(config, f"{s}_size") for s in ("train", "val", "test")
    }
    options |= {key: size for key, size in sizes.items() if size is not None}
    found = data.load(name, **options)
    tasks = tuple(task for task in found.tasks if task.kind == "classification")

    def arrays(split):
        kept = {task.name: split[task.name] for task in tasks}
        return {"image": shrink(split["image"], config.shrink), **kept}

    return Splits(
        arrays(found.train),
        arrays(found.val),
        arrays(found.test),
        tasks,
        found.image_max,
        found.notes,
    )


def make_problem(config: Config, splits: Splits, task: int | None = None) -> Problem:
    """A model with a head for every task, or for one of them alone."""
    tasks = splits.tasks if task is None else (splits.tasks[task],)
    names = tuple(t.name for t in tasks)
    options: dict[str, dict[str, Any]] = {
        "mlp": {"hidden": config.hidden},
        "lenet": {"kernels": config.kernels, "channels": config.channels},
        "resnet18": {"stem": "imagenet"},
    }
    heads = {t.name: t.size for t in tasks}
    model = models.build(config.model, heads, **options[config.model])

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

    def losses(params, batch_stats, batch):
        outputs, _ = apply(params, batch_stats, batch["image"], train=False)
        return cross_entropies(outputs, batch)

    def logits(params, batch_stats, images):
        return apply(params, batch_stats, images, train=False)[0]

    def on_device(split):
        return {k: jnp.asarray(split[k]) for k in ("image", *names)}

    train = on_device(splits.train)
    example = data.to_float(train["image"][:1], splits.image_max)
    return Problem(
        names,
        jax.jit(lambda key: model.init(key, example)),
        task_losses,
        losses,
        logits,
        train,
        on_device(splits.val),
        on_device(splits.test),
    )


def in_parts(
    function: Callable[..., Any], images: Array, size: int = 1000
) -> dict[str, Array]:
    """Logits of many images without holding all activations at once."""
    parts = [function(images[i : i + size]) for i in range(0, len(images), size)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def scores(problem: Problem, params: Any, batch_stats: Any) -> dict[str, Array]:
    """Accuracy and calibration on the validation and the test split."""
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
