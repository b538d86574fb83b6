"""Two linear regressions with a shared weight: seconds to run, all of the state."""

import argparse
import functools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# isort: split
from mtljax import training

OPT = optax.adam(3e-2)


class State(NamedTuple):
    params: dict
    stats: jax.Array  # a running mean in bfloat16, like a norm's statistics
    opt: optax.OptState
    key: jax.Array
    step: jax.Array


def make_data(n=70):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    y = x @ rng.normal(size=(5, 2)).astype(np.float32)
    return {"x": x, "y": y + 0.1 * rng.normal(size=y.shape).astype(np.float32)}


def init(key):
    key_w, key = jax.random.split(key)
    params = {"w": 0.1 * jax.random.normal(key_w, (5, 2)), "b": jnp.zeros(2)}
    stats = jnp.zeros(5, jnp.bfloat16)
    return State(params, stats, OPT.init(params), key, jnp.int32(0))


def task_losses(params, batch):
    error = batch["x"] @ params["w"] + params["b"][None] - batch["y"]
    return jnp.square(error).mean(0)


def step(state, batch):
    key, key_noise = jax.random.split(state.key)
    weights = jax.nn.softmax(jax.random.normal(key_noise, (2,)))

    def total(params):
        losses = task_losses(params, batch)
        return losses @ weights, losses

    grads, losses = jax.grad(total, has_aux=True)(state.params)
    updates, opt = OPT.update(grads, state.opt, state.params)
    params = optax.apply_updates(state.params, updates)
    stats = (0.9 * state.stats + 0.1 * batch["x"].mean(0)).astype(jnp.bfloat16)
    metrics = {"losses": losses, "task_weights": weights}
    return State(params, stats, opt, key, state.step + 1), metrics


@functools.cache
def make_eval():
    val = {name: jnp.asarray(a[:20]) for name, a in make_data().items()}

    @jax.jit
    def evaluate(state):
        losses = task_losses(state.params, val)
        return {"val_losses": losses, "val_loss": losses.mean()}

    return evaluate


GROUPS = {
    "evaluation": (
        training.Evaluation,
        {"eval_fn": "function", "eval_every": "every", "eval_at_start": "at_start",
         "select": "select", "mode": "mode"},
    ),
    "checkpointing": (
        training.Checkpointing,
        {"run_dir": "directory", "checkpoint_every": "every", "resume": "resume",
         "overwrite": "overwrite", "config": "config", "may_differ": "may_differ"},
    ),
    "logging": (
        training.Logging,
        {"log_every": "every", "progress": "progress", "title": "title",
         "writers": "writers", "tensorboard": "tensorboard"},
    ),
    "execution": (
        training.Execution,
        {"chunk": "chunk", "loop_on": "loop_on", "positive_losses": "positive_losses",
         "batch_sharding": "batch_sharding"},
    ),
}  # fmt: skip


def fit(**settings):
    """``training.fit`` with the options of all groups in one dictionary."""
    for group, (kind, names) in GROUPS.items():
        mine = {new: settings.pop(old) for old, new in names.items() if old in settings}
        if group == "evaluation" and mine.get("function") is None:
            continue
        if mine:
            settings[group] = kind(**mine)
    return training.fit(**settings)


def run(num_steps=20, key=0, **kwargs):
    data = make_data()
    init_key, order_key = training.split_run_key(jax.random.key(key))
    settings = {
        "state": init(init_key),
        "step": step,
        "data": data,
        "batch_size": 8,
        "order_key": order_key,
        "seeds": key,
        "task_names": ["left", "right"],
        "eval_fn": make_eval(),
        "eval_every": 6,
        "select": "val_loss",
        "log_every": 4,
        "progress": False,
    }
    return fit(**{**settings, "num_steps": num_steps, **kwargs})


def comparable(run_dir):
    """Header and rows without what depends on the clock."""
    header, rows = training.read_jsonl(run_dir)
    header.pop("sessions")
    return header, [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def main():
    """The command that the kill and signal tests start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=pathlib.Path)
    parser.add_argument("--num-steps", type=int, default=60)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--resume", default=False, const=True, nargs="?")
    args = parser.parse_args()

    evaluate = make_eval()

    def slow_eval(state):
        time.sleep(args.slow)
        return evaluate(state)

    try:
        result = run(
            args.num_steps,
            run_dir=args.run_dir,
            resume=args.resume,
            overwrite=args.overwrite,
            checkpoint_every=4,
            eval_fn=slow_eval,
            eval_every=2,
            progress=True,
            title="toy",
        )
    except training.TrainingError as error:
        sys.exit(f"error: {error}")
    if not result.interrupted:
        print("digest", training.tree_digest(result.state))
    sys.exit(result.exit_status)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    main()
