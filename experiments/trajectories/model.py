"""The shared model, its losses and its scores for the tasks of a problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from experiments.trajectories.config import Config, Scale
from experiments.trajectories.data import Problem
from experiments.trajectories.measure import make_probe
from mtljax import data, models, trajectory

EVAL_CHUNK = 1000  # images of a task per chunk


class Functions(NamedTuple):
    """A model on T tasks of one setting. Sets share it, because data are arguments."""

    init: Callable[..., Any]
    task_losses: Callable[..., Any]  # (params, batch_stats, batch, train=) -> ([T], ·)
    evaluate: Callable[..., dict[str, Array]]  # jitted, over seeds
    probe: trajectory.Probe


def trunk_of(config: Config) -> Any:
    """Builds the shared trunk."""
    if config.model == "mlp":
        return models.MLP(hidden=config.hidden)
    if config.model == "lenet":
        return models.LeNet(kernels=(5, 3))
    return models.ResNet(stem="cifar")


def make_functions(config: Config, scale: Scale, problem: Problem) -> Functions:
    """Builds model, losses, scores and measurements for the tasks of a problem."""
    trunk = trunk_of(config)

    # ``stats`` is a pair of untrained values: the running averages and the numbers of
    # classes. Sets with equally many tasks therefore share compiled programs.

    def features(params, stats, images, train):
        """Computes the features of images ``[B, H, W, C]``."""
        out, mutated = trunk.apply(
            {"params": params["trunk"], "batch_stats": stats[0]},
            data.to_float(images, problem.image_max),
            train=train,
            mutable=["batch_stats"] if train else [],
        )
        return out, (mutated.get("batch_stats", stats[0]), stats[1])

    def outputs(params, stats, images, train):
        """Computes the logits of each task, ``[B, T, classes]``."""
        flat = images if problem.shared else images.reshape(-1, *images.shape[2:])
        hidden, stats = features(params, stats, flat, train)
        if not problem.shared:
            hidden = hidden.reshape(*images.shape[:2], -1)
        index = "bf,kfc->bkc" if problem.shared else "bkf,kfc->bkc"
        logits = jnp.einsum(index, hidden, params["heads"]["kernel"])
        logits = logits + params["heads"]["bias"][None]
        return jnp.where(stats[1][None], logits, -1e9), stats

    def task_logits(params, stats, images, task):
        """Computes logits of one task on images ``[B, H, W, C]`` in evaluation mode."""
        hidden, _ = features(params, stats, images, False)
        kernel, bias, allowed = (
            jnp.take(x, task, 0)
            for x in (params["heads"]["kernel"], params["heads"]["bias"], stats[1])
        )
        return jnp.where(allowed[None], hidden @ kernel + bias[None], -1e9)

    def task_losses(params, stats, batch, train=True):
        logits, stats = outputs(params, stats, batch["image"], train)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each.mean(0), stats

    def score(params, stats, split):
        """Computes the mean loss and score of each task, in chunks."""
        count = split["label"].shape[0]
        chunk = max(c for c in range(1, min(EVAL_CHUNK, count) + 1) if count % c == 0)
        parts = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), dict(split))

        def one(part):
            logits, _ = outputs(params, stats, part["image"], False)
            true = part["label"]
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, true)
            found = logits.argmax(-1)
            hits = (found == true, (found == 1) & (true == 1), found == 1, true == 1)
            return [loss.mean(0), *(h.astype(jnp.float32).mean(0) for h in hits)]

        loss, right, both, found, true = (x.mean(0) for x in jax.lax.map(one, parts))
        f1 = 2 * both / jnp.maximum(found + true, 1e-9)
        return loss, f1 if problem.metric == "f1" else right

    def evaluate(params, stats, splits):
        found = {}
        for name, split in splits.items():
            loss, value = score(params, stats, split)
            found |= {f"{name}_loss": loss, f"{name}_score": value}
        return found | {"val_mean": found["val_score"].mean()}

    probe = make_probe(config, scale, problem, task_losses, task_logits)
    evaluate_all = jax.jit(jax.vmap(evaluate, in_axes=(0, 0, None)))
    init = make_init(problem, trunk)
    return Functions(jax.jit(init), task_losses, evaluate_all, probe)


def shared_functions(config: Config, scale: Scale, problem: Problem):
    """Returns a function of tasks that makes their functions once for each T."""
    found: dict[int, Functions] = {}

    def functions_of(tasks: tuple[str, ...]) -> Functions:
        if len(tasks) not in found:
            found[len(tasks)] = make_functions(config, scale, problem.select(tasks))
        return found[len(tasks)]

    return functions_of


def make_init(problem: Problem, trunk: Any):
    """Builds an initialiser for parameters and untrained values from a key."""
    tasks, width = len(problem.tasks), problem.width

    def init(key, image, task_ids, classes):
        trunk_key, head_key = jax.random.split(key)
        example = image if problem.shared else image[:, 0]
        hidden, variables = trunk.init_with_output(
            trunk_key, example.astype(jnp.float32), train=False
        )
        size = hidden.shape[-1]

        def head(task_id):
            own = jax.random.fold_in(head_key, task_id)
            return jax.random.uniform(own, (size, width), minval=-1) / size**0.5

        kernel = jax.vmap(head)(task_ids)
        heads = {"kernel": kernel, "bias": jnp.zeros((tasks, width))}
        params = {"trunk": variables["params"], "heads": heads}
        allowed = jnp.arange(width)[None] < classes[:, None]
        return params, (variables.get("batch_stats", {}), allowed)

    return init
