"""Data sets by name, their models, and the losses and scores of a task."""

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.common.config import Common, ConfigError, option
from mtljax import data, metrics, models

SCORES = {"classification": ("acc",), "regression": ("r2", "mae")}
LOWER = ("mae",)
"""Scores for which lower is better."""

LOADED: dict[str, dict[str, Any]] = {}
"""Digests of the data that this process loaded, and the examples that splits share;
the headers of results have them, see :mod:`experiments.common.provenance`."""


def load(
    config: Common, name: str, kinds: tuple[str, ...] = tuple(SCORES), **options: Any
) -> data.Dataset:
    """Loads a data set by name, by ``name/subset``, or by ``module:function``.

    Args:
      config: Configuration with the folder of the files.
      name: Name, see :func:`mtljax.data.load`.
      kinds: Kinds of tasks that the experiment can train.
      **options: Options of the data set. The data set's default replaces None.

    Raises:
      DataError: As :func:`mtljax.data.load`.
      ConfigError: If a task has a kind that the experiment cannot train, a split is
        empty, or a task has no labels in a split or a constant one in training.
    """
    name, slash, subset = name.partition("/") if ":" not in name else (name, "", "")
    options = {key: value for key, value in options.items() if value is not None}
    if slash:
        options["domain" if name == "digit_domains" else "subset"] = subset
    found = data.load(name, data_dir=config.data_dir, **options)
    for task in found.tasks:
        if task.kind not in kinds:
            raise ConfigError(
                f"{name}: task {task.name!r} is a {task.kind}; this experiment trains "
                f"{' and '.join(kinds)}."
            )
    for part in ("train", "val", "test"):
        if not len(getattr(found, part)["image"]):
            raise ConfigError(f"{name} has no examples in its {part} split.")
    check_labels(found)
    about = "".join(f" {key}={value}" for key, value in sorted(options.items()))
    LOADED[name + about] = {
        "digest": data.checksum(found),
        "shared": shared_examples(found),
    }
    return found


def note_arrays(name: str, splits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Notes the digest of data that an experiment puts together by itself."""
    digest = hashlib.sha256()
    for part, split in sorted(splits.items()):
        for key, array in sorted(split.items()):
            digest.update(f"{part} {key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    LOADED[name] = {"digest": digest.hexdigest(), "shared": {}}


def known_labels(task: data.Task, target: Any) -> Any:
    """Which labels are there: not MISSING, and not NaN."""
    if task.kind in ("classification", "segmentation"):
        return target != data.MISSING
    return target == target  # noqa: PLR0124 NaN marks a missing target


def check_labels(found: data.Dataset) -> None:
    """Checks that every task has labels to learn and to score.

    A :class:`ConfigError` says that a split has no label of a task, or that a column of
    the training labels is constant.
    """
    for task, part in itertools.product(found.tasks, data.SPLITS):
        target = np.asarray(getattr(found, part)[task.name])
        several = task.kind == "regression" and task.size > 1
        columns = target.reshape(-1, task.size if several else 1).T
        for at, column in enumerate(columns):
            known = column[known_labels(task, column)]
            where = f" (column {at})" if several else ""
            if not known.size:
                raise ConfigError(
                    f"{found.name}: task {task.name!r}{where} has no labels in its "
                    f"{part} split."
                )
            if part == "train" and known.min() == known.max():
                raise ConfigError(
                    f"{found.name}: task {task.name!r}{where} has one label only in "
                    f"its training split, {known[0]:g}."
                )


def shared_examples(found: data.Dataset) -> dict[str, int]:
    """Numbers of distinct examples that two splits share, by ``"train, test"``.

    Examples are equal if their images and all their labels are, bit by bit.
    """

    def digests(part: str) -> set[bytes]:
        split = getattr(found, part)
        names = ("image", *(task.name for task in found.tasks))
        arrays = [np.ascontiguousarray(split[name]) for name in names]
        return {
            hashlib.blake2b(
                b"".join(array[i].tobytes() for array in arrays), digest_size=16
            ).digest()
            for i in range(len(arrays[0]))
        }

    parts = {part: digests(part) for part in data.SPLITS}
    pairs = itertools.combinations(data.SPLITS, 2)
    return {f"{a}, {b}": len(parts[a] & parts[b]) for a, b in pairs}


def check_data(field: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    """Raises a :class:`ConfigError` with the known data sets if one is unknown.

    A ``module:function`` is checked when it is loaded.
    """
    for name in names:
        base = name.partition("/")[0]
        if ":" not in name and base not in known:
            raise ConfigError(
                f"{option(field)}: unknown data set {name!r}. Choose from "
                f"{', '.join(known)}, or pass module:function for your own data set."
            )


def model_of(
    config: Any, heads: Mapping[str, int], shape: tuple[int, ...]
) -> models.Model:
    """Builds the trunk named by ``config.model``, with one linear head per task."""

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names if hasattr(config, name)}

    options: dict[str, dict[str, Any]] = {
        "mlp": given("hidden"),
        "lenet": given("kernels", "channels"),
        "resnet18": {"stem": "imagenet"} | given("width", "blocks"),
    }
    if config.model != "mlp" and min(shape[:2]) < 12:
        raise ConfigError(
            f"--model {config.model} needs images of 12 x 12 pixels or more, not "
            f"{shape[0]} x {shape[1]}."
        )
    return models.build(config.model, heads, **options[config.model])


class Scorer:
    """Losses and scores of a task, over the examples that have its label."""

    def __init__(self, dataset: data.Dataset, task: data.Task):
        self.task = task
        parts = [getattr(dataset, part)[task.name] for part in data.SPLITS]
        self.masked = any(
            not known_labels(task, np.asarray(part)).all() for part in parts
        )
        self.columns = [f"{task.name}_{kind}" for kind in SCORES[task.kind]]

    def _parts(self, out: Array, target: Array) -> tuple[Array, Array, Array | None]:
        """Returns the outputs, the targets with gaps filled, and the known examples."""
        if self.task.kind == "regression" and self.task.size == 1:
            out = out[:, 0]
        if not self.masked:
            return out, target, None
        known = known_labels(self.task, target)
        return out, jnp.where(known, target, 0), known

    def loss(self, out: Array, target: Array) -> Array:
        """Mean cross-entropy or squared error, 0 if all labels are missing."""
        out, target, known = self._parts(out, target)
        if self.task.kind == "classification":
            each = optax.softmax_cross_entropy_with_integer_labels(out, target)
        else:
            each = jnp.square(out - target)
        if known is None:
            return each.mean()
        return jnp.where(known, each, 0).sum() / jnp.maximum(known.sum(), 1)

    def scores(self, out: Array, target: Array) -> dict[str, Array]:
        """Accuracy, or R² and mean absolute error, by column."""
        out, target, known = self._parts(out, target)
        functions = {"acc": metrics.accuracy, "r2": metrics.r2, "mae": metrics.mae}
        return {
            f"{self.task.name}_{kind}": functions[kind](out, target, known)
            for kind in SCORES[self.task.kind]
        }
