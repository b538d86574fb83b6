"""Networks, losses and metrics of the five data sets."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.alternating import data
from experiments.alternating.config import Config, check_groups, option_of
from experiments.common.config import check_batch
from experiments.common.problem import Scorer
from experiments.common.runs import LABELS as SHARES
from experiments.common.runs import on_device
from mtljax import models
from mtljax.alternating import indexed

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The part of a problem that depends on the data set."""

    columns: dict[str, np.ndarray]  # name -> weight of each task's metric, sum 1
    init: Callable[[Array], Any]
    task_loss: Callable[..., Array]  # takes parameters with one row of the heads
    task_losses: Callable[[Any, Batch], Array]
    judge: Callable[[Any, Batch], tuple[Array, Array]]  # losses, metrics to maximise
    judge_alone: Callable[..., tuple[Array, Array]]  # for a single-task network
    labels: Any  # passed to alternate


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem(Parts):
    """A network on a data set. Heads are stacked, or each has its own name and size."""

    name: str
    tasks: tuple[str, ...]
    train: Batch
    splits: Mapping[str, Batch]
    by_seed: bool  # whether each seed has a split

    @property
    def num_tasks(self) -> int:
        """Number of tasks T."""
        return len(self.tasks)

    def alone(self, params: Any, task: Array) -> Any:
        """Returns the parameters of a single-task network, with one row of the heads.

        Heads that are not stacked are unchanged.
        """
        if self.labels is not SHARES:
            return params
        return {**params, "heads": jax.tree.map(lambda x: x[task], params["heads"])}

    def split(self, arrays: Batch, split: Any) -> Batch:
        """The examples of one split, of arrays ``[examples, splits, ...]``."""
        return jax.tree.map(lambda x: x[:, split], dict(arrays))

    @functools.cached_property
    def init_models(self) -> Callable[[Array], Any]:
        """Compiled once for all rows, because compiling random numbers is slow."""
        return jax.jit(jax.vmap(self.init))

    @functools.cached_property
    def _evaluate(self) -> Callable[..., dict[str, Array]]:
        # The splits are arguments, because XLA folds constants of this size slowly.
        return jax.jit(jax.vmap(self._judged, in_axes=(0, 0, 0, None)))

    def evaluate(self, state: Any, *, alone: bool) -> dict[str, Array]:
        """Returns losses and metrics of stacked states, or of single-task networks.

        The score is the mean over the columns, or the metric of the single task. Rows
        with equally many runs share one compilation.
        """
        task = state.task if alone else None
        return self._evaluate(state.params, state.split, task, self.splits)

    def _judged(self, params: Any, at: Array, task: Any, splits: Any):
        found = {}
        for name, split in splits.items():
            mine = self.split(split, at)
            if task is None:
                losses, values = self.judge(params, mine)
                found |= {f"{name}_losses": losses, f"{name}_metrics": values}
            else:
                loss, value = self.judge_alone(params, task, mine)
                found |= {f"{name}_loss": loss, f"{name}_metric": value}
        if task is not None:
            return found | {"val_score": found["val_metric"]}
        weights = jnp.asarray(np.mean(list(self.columns.values()), 0), jnp.float32)
        return found | {"val_score": (weights * found["val_metrics"]).sum()}


def auc(scores: Array, positive: Array, known: Array) -> Array:
    """Area under the ROC curve. Ties count as one half."""
    positive, negative = known & positive, known & ~positive
    below = jnp.sort(jnp.where(negative, scores, jnp.inf))
    wins = sum(jnp.searchsorted(below, scores, side=s) for s in ("left", "right")) / 2
    pairs = jnp.maximum(positive.sum() * negative.sum(), 1)
    return (jnp.where(positive, wins, 0.0) / pairs).sum()


def r2(error: Array, target: Array) -> Array:
    """1 - mean squared error / variance of the targets."""
    return 1 - jnp.square(error).mean() / target.var()


def mean_known(losses: Array, known: Array) -> Array:
    """Mean over the examples that have a label."""
    return jnp.where(known, losses, 0).sum() / jnp.maximum(known.sum(), 1)


def binary(logit: Array, positive: Array) -> Array:
    """Cross-entropy of one class against the rest."""
    return optax.sigmoid_binary_cross_entropy(logit, positive.astype(logit.dtype))


class Stack(NamedTuple):
    """A trunk and T linear heads of equal size, stacked along the task axis."""

    model: models.Model
    tasks: int
    example: Any  # one input, without the batch axis

    def init(self, key: Array) -> Any:
        """Initialises the trunk once, and one head per task."""
        x = jnp.asarray(self.example)[None]
        keys = jax.random.split(key, self.tasks + 1)
        rows = jax.vmap(lambda k: self.model.init(k, x).params["heads"])(keys[1:])
        return {"trunk": self.model.init(keys[0], x).params["trunk"], "heads": rows}

    def one(self, params: Any, x: Array) -> Array:
        """Outputs ``[batch, size]`` of parameters with one row of the heads."""
        return self.model.apply((params, {}), x, train=True)[0]["task"]

    def all(self, params: Any, x: Array) -> Array:
        """Outputs ``[tasks, batch, size]`` with one forward pass through the trunk."""
        trunk = params["trunk"]
        head = lambda row: self.one({"trunk": trunk, "heads": row}, x)
        return jax.vmap(head)(params["heads"])


def _mean_of(count: int, members: slice) -> np.ndarray:
    weights = np.zeros(count)
    weights[members] = 1
    return weights / weights.sum()


def _stacked(
    stack: Stack, columns: dict[str, np.ndarray], loss, metric, inputs=lambda b: b["x"]
) -> Parts:
    """Builds the parts of a data set whose tasks read the same inputs.

    ``loss`` and ``metric`` take ``(out [batch, size], task, batch)`` for one task.
    """
    tasks = jnp.arange(stack.tasks)

    def task_loss(params, task, batch):
        return loss(stack.one(params, inputs(batch)), task, batch)

    def over_tasks(function, params, batch):
        out = stack.all(params, inputs(batch))
        return jax.vmap(lambda o, t: function(o, t, batch))(out, tasks)

    def judge_alone(params, task, batch):
        out = stack.one(params, inputs(batch))
        return loss(out, task, batch), metric(out, task, batch)

    return Parts(
        columns,
        stack.init,
        task_loss,
        lambda params, batch: over_tasks(loss, params, batch),
        lambda params, batch: (
            over_tasks(loss, params, batch),
            over_tasks(metric, params, batch),
        ),
        judge_alone,
        SHARES,
    )


def _model(hidden: tuple[int, ...], heads: Mapping[str, int]) -> models.Model:
    return models.build("mlp", heads, hidden=hidden)


def _digits(arrays: data.Arrays, hidden: tuple[int, ...]) -> Parts:
    count = len(arrays.tasks)
    stack = Stack(_model(hidden, {"task": 1}), count, arrays.train["x"][0, 0])

    def positive(task, batch):
        label = jnp.where(task < 10, batch["left"], batch["right"])
        return label == task % 10

    def loss(out, task, batch):
        error = jnp.square(out[:, 0] - batch["ink"])
        found = binary(out[:, 0], positive(task, batch))
        return jnp.where(task == count - 1, error, found).mean()

    def metric(out, task, batch):
        known = jnp.ones(len(out), bool)
        area = auc(out[:, 0], positive(task, batch), known)
        found = r2(out[:, 0] - batch["ink"], batch["ink"])
        return jnp.where(task == count - 1, found, area)

    columns = {
        "left AUC": _mean_of(count, slice(10)),
        "right AUC": _mean_of(count, slice(10, 20)),
        "ink R²": _mean_of(count, slice(20, 21)),
    }
    return _stacked(stack, columns, loss, metric)


def _tox21(arrays: data.Arrays, hidden: tuple[int, ...]) -> Parts:
    count = len(arrays.tasks)
    stack = Stack(_model(hidden, {"task": 1}), count, arrays.train["x"][0, 0])

    def loss(out, task, batch):
        label = batch["y"][:, task]
        return mean_known(binary(out[:, 0], label == 1), label != data.MISSING)

    def metric(out, task, batch):
        label = batch["y"][:, task]
        return auc(out[:, 0], label == 1, label != data.MISSING)

    columns = {"mean AUC": _mean_of(count, slice(count))}
    return _stacked(stack, columns, loss, metric)


def _camvid(arrays: data.Arrays, hidden: tuple[int, ...]) -> Parts:
    count, pixels = len(arrays.tasks), data.PATCH**2
    model = _model(hidden, {"task": pixels})
    stack = Stack(model, count, arrays.train["x"][0, 0, 0])

    def patches(batch):
        return batch["x"].reshape(-1, batch["x"].shape[-1])

    def targets(batch):
        label = batch["label"].reshape(-1, pixels)
        return label, label != data.MISSING, batch["grey"].reshape(-1, pixels)

    def loss(out, task, batch):
        label, known, grey = targets(batch)
        found = mean_known(binary(out, label == task), known)
        return jnp.where(task == count - 1, jnp.square(out - grey).mean(), found)

    def metric(out, task, batch):
        label, known, grey = targets(batch)
        hit, true = (out > 0) & known, (label == task) & known
        iou = (hit & true).sum() / jnp.maximum((hit | true).sum(), 1)
        return jnp.where(task == count - 1, r2(out - grey, grey), iou)

    columns = {
        "mean IoU": _mean_of(count, slice(count - 1)),
        "brightness R²": _mean_of(count, slice(count - 1, count)),
    }
    return _stacked(stack, columns, loss, metric, patches)


def _school(arrays: data.Arrays, hidden: tuple[int, ...]) -> Parts:
    count = len(arrays.tasks)
    stack = Stack(_model(hidden, {"task": 1}), count, arrays.train["x"][0, 0, 0])

    def task_loss(params, task, batch):
        out = stack.one(params, batch["x"][:, task])[:, 0]
        return jnp.square(out - batch["y"][:, task]).mean()

    def judge_alone(params, task, batch):
        mine = batch["pupils"][task]
        out = stack.one(params, batch["x"][jnp.maximum(mine, 0)])[:, 0]
        error = jnp.square(out - batch["y"][jnp.maximum(mine, 0)])
        loss = mean_known(error, mine != data.MISSING)
        return loss, 1 - loss / batch["y"].var()

    def over_tasks(function):
        def every(params, batch):
            one = lambda row, task: function(params | {"heads": row}, task, batch)
            return jax.vmap(one)(params["heads"], jnp.arange(count))

        return every

    pupils = (arrays.test["pupils"][:, 0] != data.MISSING).sum(1)
    columns = {"explained variance": pupils / pupils.sum()}
    losses, judge = over_tasks(task_loss), over_tasks(judge_alone)
    return Parts(columns, stack.init, task_loss, losses, judge, judge_alone, SHARES)


def _named(arrays: data.Arrays, hidden: tuple[int, ...]) -> Parts:
    """Builds tasks with heads of different sizes. The last one may be the image."""
    pixels = int(np.prod(arrays.train["x"].shape[2:]))
    image = "image" in arrays.tasks
    tasks = arrays.dataset.tasks
    scorers = [Scorer(arrays.dataset, task) for task in tasks]
    sizes = {task.name: task.size for task in tasks}
    model = _model(hidden, sizes | ({"image": pixels} if image else {}))
    example = jnp.asarray(arrays.train["x"][:1, 0])

    def outputs(params, batch):
        return model.apply((params, {}), batch["x"], train=True)[0]

    def flat(batch):
        return batch["x"].reshape(-1, pixels)

    def losses_of(out, batch):
        losses = [s.loss(out[s.task.name], batch[s.task.name]) for s in scorers]
        if image:
            losses.append(jnp.square(out["image"] - flat(batch)).mean())
        return jnp.stack(losses)

    def judge(params, batch):
        out = outputs(params, batch)
        right = [
            s.scores(out[s.task.name], batch[s.task.name])[s.columns[0]]
            for s in scorers
        ]
        if image:
            # Centring removes the variance between pixel positions. R² then measures
            # the variance between images.
            centred = flat(batch) - flat(batch).mean(0)
            share = jnp.square(out["image"] - flat(batch)).mean()
            right.append(1 - share / jnp.square(centred).mean())
        return losses_of(out, batch), jnp.stack(right)

    def judge_alone(params, task, batch):
        losses, values = judge(params, batch)
        return losses[task], values[task]

    def task_losses(params, batch):
        return losses_of(outputs(params, batch), batch)

    titles = {"classification": "acc", "regression": "R²"}
    names = [f"{task.name} {titles[task.kind]}" for task in tasks]
    names += ["image R²"] if image else []
    count = len(names)
    heads = {name: i for i, name in enumerate(arrays.tasks)}
    return Parts(
        {name: _mean_of(count, slice(i, i + 1)) for i, name in enumerate(names)},
        lambda key: model.init(key, example).params,
        indexed(task_losses),
        task_losses,
        judge,
        judge_alone,
        {"trunk": "shared", "heads": heads},
    )


_MAKE = {
    "digits": _digits,
    "camvid": _camvid,
    "tox21": _tox21,
    "school": _school,
}


def make_problem(config: Config, name: str) -> Problem:
    """Loads a data set and binds the network, losses and metrics.

    Raises:
      DataError: If the file is absent or damaged.
      ConfigError: If an option does not fit the data set.
    """
    arrays = data.load(name, config)
    setting = config.setting(name)
    check_groups(name, setting.rows, len(arrays.tasks))
    check_batch(
        f"{option_of(name)}.batch_size", setting.batch_size, len(arrays.train["x"])
    )
    parts = _MAKE.get(name, _named)(arrays, setting.hidden)
    return Problem(
        **vars(parts),
        name=name,
        tasks=arrays.tasks,
        train=on_device(arrays.train),
        splits={"val": on_device(arrays.val), "test": on_device(arrays.test)},
        by_seed=name in ("faces", "school"),
    )
