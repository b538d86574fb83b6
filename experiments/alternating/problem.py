"""Two digits and a regression on one canvas, as 3 tasks or as 21."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import mtljax
from experiments.alternating.config import Config
from mtljax import data, metrics, models
from mtljax.alternating import indexed

Batch = Mapping[str, Array]
DIGITS = ("left", "right")
CLASSES = 10
MODALITIES = (*DIGITS, "ink")


class Problem(NamedTuple):
    """A model on the canvases, its losses one by one and all at once."""

    num_tasks: int
    modality: tuple[int, ...]  # of every task
    labels: Any  # for alternate
    shares: Any  # the same, "shared" and "own" only
    init_model: Callable[[Array], Any]
    train: Batch
    task_loss: Callable[..., Array]
    task_losses: Callable[[Any, Batch], Array]
    evaluate: Callable[..., dict[str, Array]]


def binary(logit: Array, positive: Array) -> Array:
    """Cross-entropy of one class against the rest."""
    return optax.sigmoid_binary_cross_entropy(logit, positive.astype(logit.dtype))


class Classes(NamedTuple):
    """21 tasks: heads of one output, stacked, a row for every task."""

    model: models.Model
    ink_scale: float

    @property
    def modality(self) -> tuple[int, ...]:
        """The digit that a class belongs to, or the ink."""
        return (0,) * CLASSES + (1,) * CLASSES + (2,)

    @property
    def labels(self) -> Any:
        """Every task owns its row."""
        return {"trunk": "shared", "heads": "own"}

    def init(self, key: Array, images: Array) -> Any:
        """The trunk once, a head for every task."""
        keys = jax.random.split(key, len(self.modality) + 1)
        rows = jax.vmap(lambda k: self.model.init(k, images).params["heads"])(keys[1:])
        return {
            "trunk": self.model.init(keys[0], images).params["trunk"],
            "heads": rows,
        }

    def _loss(self, out: Array, task: Array, batch: Batch) -> Array:
        digit, number = task // CLASSES, task % CLASSES
        label = jnp.where(digit == 0, batch["left"], batch["right"])
        error = self.ink_scale * jnp.square(out - batch["ink"])
        found = jnp.where(task == 2 * CLASSES, error, binary(out, label == number))
        return found.mean()

    def task_loss(self, params: Any, task: Array, batch: Batch) -> Array:
        """Of the parameters with the task's own row."""
        outputs, _ = self.model.apply((params, {}), batch["image"], train=True)
        return self._loss(outputs["task"][:, 0], task, batch)

    def outputs(self, params: Any, images: Array) -> Array:
        """All outputs ``[tasks, batch]`` from one pass through the trunk."""

        def one(head):
            both = {"trunk": params["trunk"], "heads": head}
            return self.model.apply((both, {}), images, train=False)[0]["task"][:, 0]

        return jax.vmap(one)(params["heads"])

    def task_losses(self, params: Any, batch: Batch) -> Array:
        """All losses."""
        out = self.outputs(params, batch["image"])
        return jax.vmap(lambda o, t: self._loss(o, t, batch))(
            out, jnp.arange(len(self.modality))
        )

    def read(self, params: Any, images: Array) -> dict[str, Array]:
        """Scores of the classes, and the ink."""
        out = self.outputs(params, images).T
        return {
            "left": out[:, :CLASSES],
            "right": out[:, CLASSES : 2 * CLASSES],
            "ink": out[:, -1],
        }


class Modalities(NamedTuple):
    """3 tasks: heads of different sizes, each owned by a task's number."""

    model: models.Model
    ink_scale: float

    @property
    def modality(self) -> tuple[int, ...]:
        """Themselves."""
        return (0, 1, 2)

    @property
    def labels(self) -> Any:
        """Every task owns its head."""
        return {"trunk": "shared", "heads": {m: i for i, m in enumerate(MODALITIES)}}

    def init(self, key: Array, images: Array) -> Any:
        """Trunk and heads."""
        return self.model.init(key, images).params

    def read(self, params: Any, images: Array) -> dict[str, Array]:
        """Logits of the classes, and the ink."""
        outputs, _ = self.model.apply((params, {}), images, train=True)
        return {**outputs, "ink": outputs["ink"][:, 0]}

    def task_losses(self, params: Any, batch: Batch) -> Array:
        """All losses."""
        out = self.read(params, batch["image"])
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(out[d], batch[d]).mean()
            for d in DIGITS
        ]
        error = jnp.square(out["ink"] - batch["ink"]).mean()
        return jnp.stack([*losses, self.ink_scale * error])

    def task_loss(self, params: Any, task: Array, batch: Batch) -> Array:
        """Heads are light: all are evaluated, one is differentiated."""
        return indexed(self.task_losses)(params, task, batch)


def build_model(config: Config) -> models.Model:
    """The trunk with the heads that a step sees."""
    sizes = {"left": CLASSES, "right": CLASSES, "ink": 1}
    heads = {"task": 1} if config.tasks == "classes" else sizes
    options: dict[str, Any] = {"hidden": config.hidden}
    if config.model == "lenet":
        options = {"kernels": (5, 3)}
    return models.build(config.model, heads, **options)


def make_problem(config: Config) -> Problem:
    """Loads the data and binds model, losses and metrics."""
    dataset = data.load("multidigits", train_size=config.train_size)
    kind = Classes if config.tasks == "classes" else Modalities
    tasks = kind(build_model(config), config.ink_scale)
    modality = jnp.array(tasks.modality)

    def prepared(split, size):
        arrays = {k: jnp.asarray(v[:size]) for k, v in split.items()}
        return {**arrays, "image": data.to_float(arrays["image"], dataset.image_max)}

    train = prepared(dataset.train, None)
    probe = {k: v[: config.probe_size] for k, v in train.items()}
    splits = {
        "val": prepared(dataset.val, config.eval_size),
        "test": prepared(dataset.test, config.eval_size),
    }

    def modality_losses(params, batch):
        losses = tasks.task_losses(params, batch)
        return jax.ops.segment_sum(losses, modality, len(MODALITIES))

    def evaluate(params, weights):
        found: dict[str, Array] = {}
        for name, split in splits.items():
            out = tasks.read(params, split["image"])
            for digit in DIGITS:
                accuracy = metrics.accuracy(out[digit], split[digit])
                found[f"{name}_{digit}_acc"] = accuracy
            found[f"{name}_ink_r2"] = metrics.r2(out["ink"], split["ink"])
        main = jnp.stack([found[f"val_{c}"] for c in columns()])
        # A single-task run is chosen by its own modality, the others by the mean.
        found["val_score"] = (weights * main).sum() / weights.sum()
        _, gramian = mtljax.task_gramian(
            lambda trunk: modality_losses({**params, "trunk": trunk}, probe)
        )(params["trunk"])
        upper = jnp.triu_indices(len(MODALITIES), k=1)
        return found | {"cosines": metrics.cosine_matrix(gramian)[upper]}

    shares = {"trunk": "shared", "heads": "own"}
    return Problem(
        num_tasks=len(tasks.modality),
        modality=tasks.modality,
        labels=tasks.labels,
        shares=shares,
        init_model=lambda key: tasks.init(key, train["image"][:1]),
        train=train,
        task_loss=tasks.task_loss,
        task_losses=tasks.task_losses,
        evaluate=jax.jit(jax.vmap(evaluate)),
    )


def columns() -> tuple[str, ...]:
    """The metric of every modality; more is better."""
    return (*(f"{digit}_acc" for digit in DIGITS), "ink_r2")
