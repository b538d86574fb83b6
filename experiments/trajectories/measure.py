"""Measurements along a run for each task."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from experiments.common.runs import on_device
from experiments.trajectories.data import Problem
from mtljax import trajectory

SHARPNESS_BATCH = 128
MICRO_BATCH = 16


def probe_set(problem: Problem, size: int = 2048) -> dict[str, Array]:
    """Returns the first training images, which are equal in all runs of a task."""
    return on_device(problem.train, size)


def make_probe(config, scale, problem, task_losses, task_logits) -> trajectory.Probe:
    """Builds the probe: sharpness, Fisher trace, covariance trace and similarity."""
    whole = probe_set(problem)
    tasks, count = len(problem.tasks), len(whole["label"])
    population = problem.train["label"].shape[0]

    def parts(point, data, task):
        """Returns model and loss as functions of the trunk, and their arguments."""
        params, stats = point

        def model(trunk, images):
            return task_logits(params | {"trunk": trunk}, stats, images, task)

        def loss(trunk, batch):
            logits = model(trunk, batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, batch["label"]
            ).mean()

        images = data["image"]
        if not problem.shared:
            images = jnp.take(images, task, axis=1)
        mine = {"image": images, "label": jnp.take(data["label"], task, axis=1)}
        return model, loss, params["trunk"], mine

    def over_tasks(function):
        return lambda point, data, key: jax.lax.map(
            lambda task: function(point, data, key, task), jnp.arange(tasks)
        )

    def batched(tree, number, size):
        return jax.tree.map(
            lambda x: x[: number * size].reshape(number, size, *x.shape[1:]), tree
        )

    sharp = min(SHARPNESS_BATCH, count)
    sharp_batches = min(config.sharpness_batches, count // sharp)

    def sharpness(point, data, key, task):
        del key
        _, loss, trunk, mine = parts(point, data, task)
        batches = batched(mine, sharp_batches, sharp)
        found = trajectory.worst_case_sharpness(loss, trunk, batches, rho=scale.rho)
        return found.sharpness

    micro = min(config.covariance_size, count) // MICRO_BATCH

    def covariance(point, data, key, task):
        del key
        _, loss, trunk, mine = parts(point, data, task)
        found = trajectory.gradient_covariance_trace(
            loss,
            trunk,
            batched(mine, micro, MICRO_BATCH),
            batch_size=MICRO_BATCH,
            population=population,
        )
        return {"trace": found.trace, "square_norm": found.square_norm}

    fisher_size = min(config.fisher_size, count)

    def fisher(point, data, key, task):
        model, _, trunk, mine = parts(point, data, task)
        own = jax.random.fold_in(key, task)
        return trajectory.fisher_trace(
            model, trunk, mine["image"][:fisher_size], own
        ).trace

    def similarity(point, data, key):
        params, stats = point

        def losses(trunk, rows):
            batch = jax.tree.map(lambda x: x[rows], data)
            return task_losses(params | {"trunk": trunk}, stats, batch, train=False)[0]

        def measure(estimator, number, size):
            rows = jax.random.randint(
                jax.random.fold_in(key, size), (number, size), 0, count
            )
            found = trajectory.gradient_similarity(
                losses, params["trunk"], rows, estimator=estimator
            )
            return found._asdict()

        number, size = config.similarity_batches, scale.batch_size
        naive = measure("naive", number, size)
        split = measure("split", 2 * number, max(1, size // 2))
        return {
            "naive": naive["similarity"],
            "null": naive["null"],
            "split": split["similarity"],
            "low": split["interval"][:, 0],
            "high": split["interval"][:, 1],
        }

    def quantity(function, cost, every=1, **about):
        return trajectory.Quantity(function, every, float(cost), about)

    return trajectory.Probe(
        {
            "sharpness": quantity(
                over_tasks(sharpness),
                21 * sharp * sharp_batches * tasks,
                config.sharpness_every,
                rho=scale.rho,
                batches=sharp_batches,
                batch_size=sharp,
            ),
            "covariance": quantity(
                over_tasks(covariance),
                micro * MICRO_BATCH * tasks,
                examples=micro * MICRO_BATCH,
                batch_size=MICRO_BATCH,
                population=population,
            ),
            "fisher": quantity(
                over_tasks(fisher), fisher_size * tasks, examples=fisher_size
            ),
            "similarity": quantity(
                similarity,
                2 * config.similarity_batches * scale.batch_size * tasks,
                batches=config.similarity_batches,
                batch_size=scale.batch_size,
            ),
        },
        whole,
        key=jax.random.key(0),
        every=scale.eval_every,
        at=(0, scale.steps),
        many=True,
    )
