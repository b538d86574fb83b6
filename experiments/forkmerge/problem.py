"""The data on the device, the model, and what is measured.

Targets and seeds are one axis of G runs. A run orders the domains with its target
first (``State.order``), so that every method sees the target as task 0.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.forkmerge.config import Config
from mtljax import data, forkmerge, models

Split = Mapping[str, Array]


class State(NamedTuple):
    """Everything that changes in a run, and what tells runs apart."""

    params: Any  # {"trunk": ..., "heads": leaves [T, ...]}
    batch_stats: Any
    opt_state: Any
    weighting: Any  # state of a balancer or of Auto-λ; () without
    order: Int[Array, " tasks"]  # domains, the target first
    key: PRNGKeyArray  # of the rows; equal for all branches and methods of a seed


class Problem(NamedTuple):
    """Splits on the device, and the model that is trained on them."""

    splits: dict[str, Split]  # train, val, test, perhaps report: leaves [domains, ...]
    model: models.Model
    optimizer: optax.GradientTransformation
    tasks: int
    batch_size: int

    def init(self, key: PRNGKeyArray, order: Array) -> State:
        """The first train state; a head for each domain, in one leaf."""
        model_key, heads_key, rows_key = jax.random.split(key, 3)
        image = jnp.zeros((1, *self.splits["train"]["image"].shape[2:]))
        variables = self.model.init(model_key, image)
        heads = jax.vmap(lambda k: self.model.init(k, image).params["heads"])(
            jax.random.split(heads_key, self.tasks)
        )
        params = variables.params | {"heads": heads}
        stats, opt_state = variables.batch_stats, self.optimizer.init(params)
        return State(params, stats, opt_state, (), order, rows_key)

    def logits(self, variables: Any, domain: Array, images: Array, *, train: bool):
        """Logits of one domain, by the trunk and its row of the heads."""
        params, batch_stats = variables
        head = forkmerge.take_task(params["heads"], domain)
        outputs, batch_stats = self.model.apply(
            (params | {"heads": head}, batch_stats), data.to_float(images), train=train
        )
        return outputs["digit"], batch_stats

    def loss(self, variables: Any, domain: Array, batch: Any):
        """Cross-entropy of one domain, and the new running statistics."""
        images, digits = batch
        logits, stats = self.logits(variables, domain, images, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, digits)
        return losses.mean(), stats

    def task_losses(self, params: Any, batch_stats: Any, order: Array, batches: Any):
        """Losses of all domains, the target's first, on a batch of each."""
        one = lambda domain, batch: self.loss((params, batch_stats), domain, batch)
        losses, stats = jax.vmap(one)(order, batches)
        return losses, jax.tree.map(lambda s: s.mean(0), stats)

    def target_logits(self, state: State, split: Split):
        """Logits on the target of a run, with labels and which of them count."""
        domain = state.order[0]
        variables = (state.params, state.batch_stats)
        logits, _ = self.logits(variables, domain, split["image"][domain], train=False)
        return logits, split["digit"][domain], split["mask"][domain]

    def accuracy(self, state: State, split: Split) -> Float[Array, ""]:
        """Accuracy on the target of a run."""
        logits, digits, mask = self.target_logits(state, split)
        return ((logits.argmax(-1) == digits) & mask).sum() / mask.sum()


def stack_splits(splits: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One split of all domains, ``[domains, n, ...]``; short ones repeat their rows."""
    sizes = np.array([len(split["digit"]) for split in splits])
    rows = np.arange(sizes.max())
    found = {k: np.stack([s[k][rows % len(s[k])] for s in splits]) for k in splits[0]}
    mask = rows[None] < sizes[:, None]
    return found | {"size": sizes.astype(np.int32), "mask": mask}


def load(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Splits of all domains."""
    sets = [
        data.load(
            "digit_domains",
            data_dir=config.data_dir,
            domain=domain,
            size=config.image_size,
            train_size=config.train_size,
            val_size=config.val_size,
        )
        for domain in config.domains
    ]
    limits = {"train": None, "val": None, "test": config.test_size}
    found = {}
    for part, limit in limits.items():
        cut = [{k: v[:limit] for k, v in getattr(s, part).items()} for s in sets]
        found[part] = stack_splits(cut)
    if config.held_out:
        middle, val = config.val_size // 2, found["val"]
        half = lambda rows: {k: v[:, rows] for k, v in val.items() if k != "size"}
        found["report"] = half(slice(middle, None))
        found["val"] = half(slice(0, middle))
    return found


def make_problem(config: Config) -> Problem:
    """Loads the data and binds model and optimiser."""
    splits = jax.tree.map(jnp.asarray, load(config))
    options: dict[str, Any] = {"hidden": config.hidden} if config.model == "mlp" else {}
    model = models.build(config.model, {"digit": 10}, **options)
    schedule = optax.cosine_decay_schedule(config.lr, config.steps)
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    tasks = len(config.domains)
    return Problem(splits, model, optimizer, tasks, config.batch_size)


def make_evaluate(problem: Problem) -> Callable[[Any], dict[str, Array]]:
    """Measures train states ``[G, B]`` on their targets, one after the other."""

    @jax.jit
    def run(states, val, test):
        lead = jax.tree.leaves(states)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), states)

        def one(state):
            logits, _, mask = problem.target_logits(state, test)
            return {
                "val": problem.accuracy(state, val),
                "test": problem.accuracy(state, test),
                "csd": forkmerge.confidence_score_discrepancy(logits, mask),
            }

        found = jax.lax.map(one, flat)
        return jax.tree.map(lambda x: x.reshape(lead), found)

    return lambda states: run(states, problem.splits["val"], problem.splits["test"])
