"""Data, model and evaluation of the ForkMerge experiment.

Targets and seeds form one axis of G runs. ``State.order`` lists the domains of a run,
with the target first. Each method therefore sees the target as task 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import mtljax
from experiments.common import problem as common
from experiments.common.config import ConfigError
from experiments.forkmerge.config import Config
from mtljax import data, forkmerge, metrics, models

Split = Mapping[str, Array]
COSINES = 32
"""Pairs of batches of the mean gradient cosine."""
POOL = 4
"""Upper bound of the pool size, relative to the training set of one seed."""


class State(NamedTuple):
    """All values that change in a run, and the values that identify it."""

    params: Any  # {"trunk": ..., "heads": leaves [domains, ...]}
    batch_stats: Any
    opt_state: Any
    weighting: Any  # state of a balancer or of Auto-λ, or averaged weights
    order: Int[Array, " tasks"]  # domains, the target first
    rows: Any  # [domains, train_size]: training set of a seed, () for all rows
    key: PRNGKeyArray  # of the batches, equal for all branches and methods of a seed


class Problem(NamedTuple):
    """Splits on the device, and the model that is trained on them."""

    splits: dict[str, Split]  # train, val, test: leaves [domains, ...]
    model: models.Model
    optimizer: optax.GradientTransformation
    domains: int
    batch_size: int

    def init(self, key: PRNGKeyArray, order: Array, rows: Any, lr: Array) -> State:
        """Returns the initial train state. The heads of all domains are in one leaf."""
        model_key, heads_key, rows_key = jax.random.split(key, 3)
        image = jnp.zeros((1, *self.splits["train"]["image"].shape[2:]))
        variables = self.model.init(model_key, image)
        heads = jax.vmap(lambda k: self.model.init(k, image).params["heads"])(
            jax.random.split(heads_key, self.domains)
        )
        params = variables.params | {"heads": heads}
        opt_state = self.optimizer.init(params)
        opt_state = optax.tree_utils.tree_set(opt_state, step_size=-lr)
        stats = variables.batch_stats
        return State(params, stats, opt_state, (), order, rows, rows_key)

    def batch(self, state: State, domain: Array, key: Array, train: Split, count: int):
        """Samples examples of one domain's training set with replacement."""
        drawn = jax.random.uniform(key, (count,))
        if isinstance(state.rows, tuple):
            rows = (drawn * train["size"][domain]).astype(jnp.int32)
        else:
            rows = state.rows[domain, (drawn * state.rows.shape[1]).astype(jnp.int32)]
        return train["image"][domain, rows], train["label"][domain, rows]

    def logits(self, variables: Any, domain: Array, images: Array, *, train: bool):
        """Computes the logits of one domain with the trunk and its row of the heads."""
        params, batch_stats = variables
        head = forkmerge.take_task(params["heads"], domain)
        outputs, batch_stats = self.model.apply(
            (params | {"heads": head}, batch_stats), data.to_float(images), train=train
        )
        return outputs["label"], batch_stats

    def loss(self, variables: Any, domain: Array, batch: Any):
        """Returns the cross-entropy of one domain and the new running statistics."""
        images, labels = batch
        logits, stats = self.logits(variables, domain, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    def task_losses(self, params: Any, batch_stats: Any, order: Array, batches: Any):
        """Returns the losses of all tasks, the target first, on one batch per task."""
        one = lambda domain, batch: self.loss((params, batch_stats), domain, batch)
        losses, stats = jax.vmap(one)(order, batches)
        return losses, jax.tree.map(lambda s: s.mean(0), stats)

    def target_logits(self, state: State, split: Split):
        """Returns logits on the target of a run, the labels, and the valid examples."""
        domain = state.order[0]
        variables = (state.params, state.batch_stats)
        logits, _ = self.logits(variables, domain, split["image"][domain], train=False)
        return logits, split["label"][domain], split["mask"][domain]

    def cosine(self, state: State, train: Split) -> Float[Array, ""]:
        """Returns the mean cosine of the trunk's gradients of the first two tasks."""
        order = state.order[:2]

        def one(key):
            take = lambda domain, key: self.batch(
                state, domain, key, train, self.batch_size
            )
            batches = jax.vmap(take)(order, jax.random.split(key))

            def losses(trunk):
                params = state.params | {"trunk": trunk}
                return self.task_losses(params, state.batch_stats, order, batches)[0]

            _, gramian = mtljax.task_gramian(losses)(state.params["trunk"])
            return metrics.cosine_matrix(gramian)[0, 1]

        # Training takes its keys from the number of a step, which is never this large.
        key = jax.random.fold_in(state.key, 2**31 - 1)
        return jax.lax.map(one, jax.random.split(key, COSINES)).mean()

    def accuracy(self, state: State, split: Split) -> Float[Array, ""]:
        """Returns the accuracy on the target of a run."""
        logits, labels, mask = self.target_logits(state, split)
        return ((logits.argmax(-1) == labels) & mask).sum() / mask.sum()


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Builds SGD with Nesterov momentum. Its learning rate is part of the state."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.trace(0.9, nesterov=True),
        optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, steps)),
        optax.inject_hyperparams(optax.scale)(step_size=-config.lrs[0]),
    )


def stack_splits(splits: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks one split of all domains, ``[domains, n, ...]``, repeating short ones."""
    sizes = np.array([len(split["label"]) for split in splits])
    rows = np.arange(sizes.max())
    found = {k: np.stack([s[k][rows % len(s[k])] for s in splits]) for k in splits[0]}
    mask = rows[None] < sizes[:, None]
    return found | {"size": sizes.astype(np.int32), "mask": mask}


def read(config: Config, domain: str) -> data.Dataset:
    """Reads one domain."""
    options: dict[str, Any] = {"domain": domain, "size": config.image_size}
    options["val_size"] = config.val_size
    if config.data == "digits":
        return common.load(config, "digit_domains", **options)
    if config.data != "domainnet":
        found = common.load(config, config.data, ("classification",), domain=domain)
        if common.Scorer(found, found.tasks[0]).masked:
            raise ConfigError(
                f"{domain} has missing labels. Each example needs a label."
            )
        return found
    # Images are decoded one by one, so only the images of the pool are decoded.
    size = None if config.train_size is None else POOL * config.train_size
    try:
        return common.load(config, "domainnet", **options, train_size=size)
    except data.MissingDataError:
        raise
    except data.DataError:  # a small domain: use all images
        return common.load(config, "domainnet", **options)


def load(config: Config) -> tuple[dict[str, dict[str, np.ndarray]], int]:
    """Loads the splits of all domains, and the number of classes."""
    sets = [read(config, domain) for domain in config.domains]
    task = sets[0].tasks[0]
    kinds = {(s.tasks[0], s.input_shape, s.image_max) for s in sets}
    if len(kinds) > 1:
        raise ConfigError(
            "--domains must have the same task, image shape and image_max."
        )
    pool = None if config.train_size is None else POOL * config.train_size
    limits = {"train": pool, "val": config.val_size, "test": config.test_size}
    names, found = {"image": "image", "label": task.name}, {}
    for part, limit in limits.items():
        splits = [getattr(s, part) for s in sets]
        found[part] = stack_splits(
            [{key: s[name][:limit] for key, name in names.items()} for s in splits]
        )
    for domain, size in zip(config.domains, found["train"]["size"], strict=True):
        if config.train_size is not None and size < config.train_size:
            raise ConfigError(
                f"--train-size {config.train_size} is more than the {size} training "
                f"examples of {domain}."
            )
    return found, task.size


def training_rows(sizes: np.ndarray, count: int | None, seed: int) -> Any:
    """Samples the training set of a seed, ``[domains, count]``, or () for all rows."""
    if count is None:
        return ()
    draw = lambda d, size: np.random.default_rng([seed, d]).permutation(size)[:count]
    rows = [draw(d, int(size)) for d, size in enumerate(sizes)]
    return np.stack(rows).astype(np.int32)


def make_problem(config: Config) -> Problem:
    """Loads the data and binds model and optimizer."""
    found, classes = load(config)
    splits = jax.tree.map(jnp.asarray, found)
    shape = found["train"]["image"].shape[2:]
    model = common.model_of(config, {"label": classes}, shape)
    optimizer = make_optimizer(config, config.steps)
    return Problem(splits, model, optimizer, len(config.domains), config.batch_size)


Evaluate = Callable[[Any], dict[str, Array]]


def make_evaluate(problem: Problem, *, cosines: bool = False) -> Evaluate:
    """Returns accuracies and discrepancy of train states ``[G, B]`` on their target.

    With ``cosines`` also the mean cosine of the gradients of the first two tasks.
    """

    def measure(state, train, val, test):
        logits, labels, mask = problem.target_logits(state, test)
        right = (logits.argmax(-1) == labels) & mask
        found = {
            "val": problem.accuracy(state, val),
            "test": right.sum() / mask.sum(),
            "csd": forkmerge.confidence_score_discrepancy(logits, mask),
        }
        return found | ({"cosine": problem.cosine(state, train)} if cosines else {})

    @jax.jit
    def run(states, *sets):  # one state after the other
        lead = jax.tree.leaves(states)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)
        found = jax.lax.map(lambda state: measure(state, *sets), flat)
        return jax.tree.map(lambda x: x.reshape(lead), found)

    sets = [problem.splits[part] for part in data.SPLITS]
    return lambda states: run(states, *sets)
