"""One training step of an entry, and a resumable run of it with all seeds."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

import mtljax
from experiments.common import runs as common
from experiments.common.config import check_batch
from experiments.common.runs import LABELS
from experiments.fs_mtl.config import NATIVE, STL, Config, Entry
from experiments.fs_mtl.problem import Batch, Problem, scores
from mtljax import data, sharpness, training

MAY_DIFFER = (
    "sets", "methods", "variants", "ablations", "controls", "epochs", "report_only",
    "seeds", "first_seed", "equal_passes", "checkpoint_every", "study",
)  # fmt: skip
"""Fields that a resumed run may change, because they do not affect its numbers."""


class State(NamedTuple):
    """All values that change in a run."""

    params: Any
    batch_stats: Any
    opt_state: Any
    balancing: sharpness.FlatGradState
    step: Int[Array, ""]


class Program(NamedTuple):
    """An entry on a problem: initial state, step and evaluation."""

    init: Callable[[Array], State]
    step: Callable[[State, Batch], tuple[State, dict[str, Array]]]
    evaluate: Callable[[State], dict[str, Array]]


def build_balancer(config: Config, entry: Entry, num_tasks: int, key: Array):
    """Builds the balancer of an entry. A single task is not balanced."""
    if entry.method == STL:
        return mtljax.linear(num_tasks)
    options = {
        "cagrad": {"c": config.cagrad_c},
        "fairgrad": {"normalize_degree": True},
    }.get(entry.method, {})
    method = "fairgrad" if entry.method == NATIVE else entry.method
    return mtljax.get_method(method).build(num_tasks, key=key, **options)


def build_gradient(
    config: Config, problem: Problem, entry: Entry, key: Array
) -> sharpness.FlatGrad:
    """Builds the sharpness-aware gradient of an entry. Plain entries have radius 0."""
    plain, samo = entry.variant == "plain", entry.variant == "samo"
    balancer_key, samo_key = jax.random.split(key)
    modes = {"plain": "split", "samo": "direct"}
    mode: Any = modes.get(entry.variant, entry.variant)
    return sharpness.value_and_flat_grad(
        problem.task_losses,
        build_balancer(config, entry, len(problem.names), balancer_key),
        rho=sharpness.Ball(
            0.0 if plain else entry.rho or config.rhos[0],
            adaptive=config.adaptive,
            norm=config.norm,
        ),
        perturb=sharpness.Samo(config.samo_alpha) if samo else "local",
        mode=mode,
        key=samo_key if samo else None,
        labels=LABELS,
        has_aux=True,
        strategy=config.strategy,
    )


def make_probe(config: Config, problem: Problem) -> Callable[[State], dict[str, Array]]:
    """Builds a probe of conflict rates on fixed training batches, at one radius.

    All entries share the probe. Their measurements are therefore comparable.
    """
    function = sharpness.sam_task_grads(
        problem.task_losses,
        rho=sharpness.Ball(
            max(config.rhos), adaptive=config.adaptive, norm=config.norm
        ),
        labels=LABELS,
        has_aux=True,
        strategy=config.strategy,
    )

    def look(params, batch_stats, batch):
        _, grads, _ = function(params, batch_stats, batch)
        return sharpness.flat_conflicts(sharpness.flat_gramians(grads))

    jitted = jax.jit(jax.vmap(look, in_axes=(0, 0, None)))
    size = config.batch_size
    count = min(config.probe_batches, len(problem.train["image"]) // size)
    batches = [
        {k: v[i * size : (i + 1) * size] for k, v in problem.train.items()}
        for i in range(count)
    ]

    def probe(state: State) -> dict[str, Array]:
        each = [jitted(state.params, state.batch_stats, batch) for batch in batches]
        found = jax.tree.map(lambda *x: jnp.stack(x).mean(0), *each)
        return {f"probe_{name}": value for name, value in found._asdict().items()}

    return probe


def make_program(
    config: Config,
    problem: Problem,
    entry: Entry,
    probe: Callable[[State], dict[str, Array]] | None,
    score: Callable[..., dict[str, Array]],
) -> Program:
    """Binds an entry to a problem. All entries share ``probe`` and ``score``."""
    optimizer = optax.adam(config.lr)
    # Placeholder key. Sampling uses the keys in the state.
    gradient = build_gradient(config, problem, entry, jax.random.key(0))

    def init(key: Array) -> State:
        model_key, method_key = jax.random.split(key)
        params, batch_stats = problem.init(model_key)
        first = build_gradient(config, problem, entry, method_key)
        return State(
            params,
            batch_stats,
            optimizer.init(params),
            first.init(params),
            jnp.int32(0),
        )

    def step(state: State, batch: Batch):
        (losses, batch_stats), grad, balancing = gradient(
            state.params, state.balancing, state.batch_stats, batch
        )
        updates, opt_state = optimizer.update(grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = State(params, batch_stats, opt_state, balancing, state.step + 1)
        # Weights of the loss gradients, or of the tasks' mixtures with "each".
        weights = balancing.balancer.loss.task_weights
        return new, {"losses": losses, "task_weights": weights}

    per_epoch = steps_per_epoch(config, problem)

    def evaluate(state: State) -> dict[str, Array]:
        found = score(state.params, state.batch_stats)
        epoch = int(jax.device_get(state.step[0])) // per_epoch
        if probe is not None and (epoch <= 1 or epoch % config.probe_every == 0):
            found |= probe(state)
        return found

    return Program(init, step, evaluate)


def make_score(problem: Problem) -> Callable[..., dict[str, Array]]:
    """Builds a compiled function for accuracy and calibration of all seeds."""
    return jax.jit(jax.vmap(lambda params, stats: scores(problem, params, stats)))


def initial_state(program: Program, seeds: list[int]) -> tuple[State, Array]:
    """Returns the stacked states of the seeds and their data-order keys.

    With one seed, all entries start from the same trunk and use the same batches.
    """
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    init_keys, order_keys = training.split_run_key(keys)
    return common.stack([program.init(key) for key in init_keys]), order_keys


def steps_per_epoch(config: Config, problem: Problem | data.Dataset) -> int:
    """Returns the number of complete batches in the training canvases."""
    size = len(problem.train["image"])
    check_batch("batch_size", config.batch_size, size)
    return size // config.batch_size


def epochs_of(config: Config, entry: Entry) -> int:
    """Passes over the training canvases."""
    return config.epochs * entry.lengths(config)[-1]


def run_entry(
    config: Config,
    problem: Problem,
    entry: Entry,
    program: Program,
    *,
    seeds: list[int],
    folder: pathlib.Path,
) -> list[dict[str, Any]]:
    """Trains or resumes an entry. A finished entry is only read."""
    state, order_keys = initial_state(program, seeds)
    epoch = steps_per_epoch(config, problem)
    plan = common.Plan(
        state=state,
        step=program.step,
        data=problem.train,
        order=order_keys,
        steps=epochs_of(config, entry) * epoch,
        batch_size=config.batch_size,
        eval_every=config.eval_every * epoch,
        log_every=epoch,
        evaluate=program.evaluate,
        labels=seeds,
        folder=folder,
        about=config,
        title=entry.label,
        task_names=problem.names,
        may_differ=MAY_DIFFER,
        checkpoint_every=config.checkpoint_every * epoch,
    )
    return common.train(config, plan)
