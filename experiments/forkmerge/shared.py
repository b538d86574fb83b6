"""One input, three tasks: multidigits with each task in turn as the target."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.forkmerge.config import Config
from experiments.forkmerge.problem import (
    POOL,
    Evaluate,
    Split,
    make_optimizer,
    over_runs,
    with_lr,
)
from mtljax import data, forkmerge, models

TASKS = ("left", "right", "ink")
SIZES = {"left": 10, "right": 10, "ink": 1}


class State(NamedTuple):
    """Everything that changes in a run, and what tells runs apart."""

    params: Any
    opt_state: Any
    target: Int[Array, ""]
    rows: Int[Array, " train_size"]  # the training set of a seed
    key: PRNGKeyArray


class Problem(NamedTuple):
    """Splits on the device, and the model that is trained on them."""

    splits: dict[str, Split]
    model: models.Model
    optimizer: optax.GradientTransformation
    batch_size: int

    def init(self, key: PRNGKeyArray, target: Array, rows: Array, lr: Array) -> State:
        model_key, rows_key = jax.random.split(key)
        image = jnp.zeros((1, *self.splits["train"]["image"].shape[1:]))
        params = self.model.init(model_key, image).params
        opt_state = with_lr(self.optimizer.init(params), lr)
        return State(params, opt_state, target, rows, rows_key)

    def outputs(self, params: Any, images: Array) -> Mapping[str, Array]:
        inputs = data.to_float(images, 16)
        return self.model.apply((params, {}), inputs, train=True)[0]

    def losses(self, params: Any, batch: Split) -> Float[Array, " tasks"]:
        """Two cross-entropies and a squared error, as the set defines its tasks."""
        outputs = self.outputs(params, batch["image"])
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return jnp.stack(
            [
                entropy(outputs["left"], batch["left"]).mean(),
                entropy(outputs["right"], batch["right"]).mean(),
                jnp.square(outputs["ink"][:, 0] - batch["ink"]).mean(),
            ]
        )

    def step(self, state: State, weights: Array, number: Array, train: Split):
        """One step on the weighted sum of the losses, as in the NYUv2 code."""
        key = jax.random.fold_in(state.key, number)
        drawn = jax.random.randint(key, (self.batch_size,), 0, len(state.rows))
        batch = jax.tree.map(lambda x: x[state.rows[drawn]], train)

        def objective(params):
            return forkmerge.weighted_sum(self.losses(params, batch), weights)

        grad = jax.grad(objective)(state.params)
        updates, opt_state = self.optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), {}

    def score(self, state: State, split: Split) -> Float[Array, ""]:
        """Of the target: accuracy, or for ink the share of variance explained."""
        outputs = self.outputs(state.params, split["image"])
        right = lambda task: (outputs[task].argmax(-1) == split[task]).mean()
        ink, error = split["ink"], outputs["ink"][:, 0] - split["ink"]
        explained = 1 - jnp.square(error).mean() / ink.var()
        return jnp.stack([right("left"), right("right"), explained])[state.target]


def make_problem(config: Config) -> Problem:
    """Builds the set, which needs no files, and binds model and optimiser."""
    found = data.load(
        "multidigits",
        train_size=POOL * config.shared_train_size,
        val_size=config.val_size,
        test_size=config.test_size,
    )
    parts = ("train", "val", "test")
    splits = {part: jax.tree.map(jnp.asarray, getattr(found, part)) for part in parts}
    model = models.build("mlp", SIZES, hidden=config.hidden)
    return Problem(splits, model, make_optimizer(config), config.batch_size)


def make_evaluate(problem: Problem) -> Evaluate:
    """Scores of runs, each on its target."""

    def measure(state, val, test):
        return {"val": problem.score(state, val), "test": problem.score(state, test)}

    return over_runs(measure, problem.splits["val"], problem.splits["test"])


def branch_weights(method: str, target: int) -> Array:
    """ν ``[B, 3]``: weights of one, as in the paper and the NYUv2 code."""
    if method == "stl":
        return jnp.eye(3)[target][None]
    if method == "forkmerge":
        return forkmerge.target_vs_all(3, target=target)
    if method == "forkmerge_each":
        return forkmerge.target_plus_each(3, target=target)
    return jnp.ones((1, 3))
