"""Train steps on one domain at a time, or on all domains with a balancer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import mtljax
from experiments.common.runs import LABELS
from experiments.forkmerge.config import Config
from experiments.forkmerge.problem import Problem, Split, State
from mtljax import forkmerge

JOINT = ("ew", "gcs", "ol_aux", "arml", "auto_lambda")
EMA_DECAY = 0.99
Step = Callable[..., tuple[State, Any]]


def update(
    problem: Problem, state: State, grad: Any, batch_stats: Any, weighting: Any
) -> State:
    """Returns the state after a step along the gradient."""
    updates, opt_state = problem.optimizer.update(grad, state.opt_state, state.params)
    return state._replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        weighting=weighting,
    )


def sampled_step(
    problem: Problem,
    *,
    alone_from: int | None = None,
    apart: int = 0,
    averaged: bool = False,
) -> Step:
    """Builds a step on one batch of one sampled domain, as in the released code.

    ``step(state, slot, number of the step, train)``; from step ``alone_from`` on it is
    always the target's. ``apart`` times the slot is added to the number that draws the
    batch, so that two slots of one domain see different batches. ``averaged`` keeps an
    exponential moving average of the weights in ``state.weighting``.
    """

    def step(state: State, slot: Array, number: Array, train: Split):
        if alone_from is not None:
            slot = jnp.where(number < alone_from, slot, 0)
        domain = state.order[slot]
        key = jax.random.fold_in(state.key, number + apart * slot)
        batch = problem.batch(state, domain, key, train, problem.batch_size)

        def objective(params):
            return problem.loss((params, state.batch_stats), domain, batch)

        grad, stats = jax.grad(objective, has_aux=True)(state.params)
        new = update(problem, state, grad, stats, state.weighting)
        if averaged:
            mean = optax.incremental_update(new.params, state.weighting, 1 - EMA_DECAY)
            new = new._replace(weighting=mean)
        return new, {}

    return step


def joint_batch(problem: Problem, state: State, number: Array, train: Split, part: int):
    """Samples an equal share of the batch from each domain, the target first."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, number), part)
    tasks = state.order.shape[0]
    count = problem.batch_size // tasks
    take = lambda key, domain: problem.batch(state, domain, key, train, count)
    return jax.vmap(take)(jax.random.split(key, tasks), state.order)


def make_balancer(config: Config, method: str, tasks: int) -> mtljax.Balancer:
    """Builds the balancer of a joint row."""
    if method == "ew":
        return mtljax.linear(tasks)
    if method == "gcs":
        return mtljax.gcs(tasks)
    if method == "ol_aux":
        return mtljax.ol_aux(tasks, learning_rate=config.ol_aux_lr)
    return forkmerge.arml(tasks, learning_rate=config.arml_lr)


def joint_step(config: Config, problem: Problem, method: str, tasks: int):
    """Builds a step on all tasks of a run, and the initial state of its weighting."""
    if method == "auto_lambda":
        return auto_lambda_step(config, problem, tasks)
    balancer = make_balancer(config, method, tasks)
    gradient = mtljax.value_and_balanced_grad(
        problem.task_losses, balancer, labels=LABELS, has_aux=True
    )

    def step(state: State, _: Array, number: Array, train: Split):
        batch = joint_batch(problem, state, number, train, 0)
        (_, stats), grad, weighting = gradient(
            state.params, state.weighting, state.batch_stats, state.order, batch
        )
        return update(problem, state, grad, stats, weighting), {}

    return step, lambda p: balancer.init(mtljax.shared_params(p, LABELS))


def auto_lambda_step(config: Config, problem: Problem, tasks: int):
    """Builds a step of Auto-λ. Its lookahead uses another training batch."""
    method = forkmerge.auto_lambda(
        tasks,
        lambda params, *rest: problem.task_losses(params, *rest)[0],
        problem.optimizer,
        learning_rate=config.auto_lambda_lr,
        initial=config.auto_lambda_initial,
    )

    def step(state: State, _: Array, number: Array, train: Split):
        now, ahead = (
            (state.batch_stats, state.order, batch)
            for batch in (
                joint_batch(problem, state, number, train, part) for part in (0, 1)
            )
        )
        weighting = method.update(
            state.weighting, state.params, state.opt_state, now, ahead
        )

        def objective(params):
            losses, stats = problem.task_losses(params, *now)
            return forkmerge.weighted_sum(losses, weighting.weights), stats

        grad, stats = jax.grad(objective, has_aux=True)(state.params)
        return update(problem, state, grad, stats, weighting), {}

    return step, lambda _: method.init()
