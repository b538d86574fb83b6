"""What is measured on finished runs: weight noise, sharpness, landscapes, strangers."""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.fs_mtl.config import Config, Entry
from experiments.fs_mtl.problem import LABELS, Problem, in_parts
from experiments.fs_mtl.train import State
from mtljax import metrics, sharpness, training
from mtljax.metrics.robustness import weight_noise_robustness

FILE = "analysis.json"
SHOWN = ("linear-plain", "linear-split", "cagrad-plain", "cagrad-split")
"""Entries whose landscapes are drawn, if they were run: two pairs with and without."""


class Instruments(NamedTuple):
    """Compiled once for all entries of a problem."""

    sharpness: Callable[[Any, Any], Any]  # gaps [R, T] in evaluation mode
    accuracy: Callable[[Any, Any], Array]  # mean over tasks
    loss: Callable[[Any, Any], Array]  # mean over tasks
    strangers: Callable[[Any, Any], Array] | None  # mean entropy on the other set


def make_instruments(
    config: Config, problem: Problem, strangers: np.ndarray | None
) -> Instruments:
    """Binds the measurements to a subset of the test split."""
    batch = {k: v[: config.analysis_size] for k, v in problem.test.items()}
    rise = sharpness.surrogate_sharpness(
        lambda params, stats: problem.losses(params, stats, batch),
        config.radii,
        labels=LABELS,
    )

    def accuracy(params, stats):
        outputs = problem.logits(params, stats, batch["image"])
        each = [metrics.accuracy(outputs[n], batch[n]) for n in problem.names]
        return jnp.stack(each).mean()

    def entropy(params, stats):
        images = jnp.asarray(strangers)[: config.analysis_size]
        outputs = in_parts(lambda x: problem.logits(params, stats, x), images)
        each = [metrics.predictive_entropy(outputs[n]).mean() for n in problem.names]
        return jnp.stack(each).mean()

    return Instruments(
        jax.jit(rise),
        jax.jit(accuracy),
        jax.jit(lambda params, stats: problem.losses(params, stats, batch).mean()),
        None if strangers is None else jax.jit(entropy),
    )


def directions(params: Any, key: Array) -> Any:
    """A random direction, every filter (column) as long as that of the weights.

    Vectors (biases, normalisation) stay, as is usual for landscapes.
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def leaf(w, k):
        if w.ndim < 2:
            return jnp.zeros_like(w)
        axes = tuple(range(w.ndim - 1))
        z = jax.random.normal(k, w.shape, w.dtype)
        lengths = [jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (w, z)]
        return z * lengths[0] / lengths[1]

    return jax.tree.unflatten(
        treedef, [leaf(w, k) for w, k in zip(leaves, keys, strict=True)]
    )


def landscape(
    loss: Callable[[Any, Any], Array], state: State, *, points: int, span: float
) -> list[list[float]]:
    """Loss on a square of the plane through the weights, ``[points, points]``."""
    one, two = (directions(state.params, jax.random.key(i)) for i in (0, 1))

    @jax.jit
    def at(a, b):
        return jax.tree.map(lambda w, x, y: w + a * x + b * y, state.params, one, two)

    axis = np.linspace(-span, span, points, dtype=np.float32)
    return [[float(loss(at(a, b), state.batch_stats)) for b in axis] for a in axis]


def measure(
    config: Config, entry: Entry, state: State, tools: Instruments, seed: int
) -> dict[str, Any]:
    """All measurements of one seed of an entry."""
    params, stats = state.params, state.batch_stats
    _, gaps = tools.sharpness(params, stats)
    noise = weight_noise_robustness(
        lambda p: tools.accuracy(p, stats),
        params,
        key=jax.random.key(0),  # the same directions for every entry
        magnitudes=config.noise,
        num_draws=config.noise_draws,
    )
    row: dict[str, Any] = {
        "entry": entry.name,
        "seed": seed,
        "step": int(state.step),
        "gaps": gaps,
        "noise": noise,
    }
    if tools.strangers is not None:
        row["ood_entropy"] = tools.strangers(params, stats)
    if config.landscape and entry.name in SHOWN and seed == config.first_seed:
        row["landscape"] = landscape(
            tools.loss, state, points=config.landscape, span=config.landscape_span
        )
    return row


def options_of(config: Config) -> dict[str, Any]:
    """The fields that the measurements depend on."""
    fields = ("noise", "noise_draws", "radii", "landscape", "landscape_span", "ood")
    return training.to_json({f: getattr(config, f) for f in (*fields, "analysis_size")})


def stored(config: Config, folder: pathlib.Path) -> list[dict[str, Any]]:
    """What is on file and was measured with the same options."""
    path = folder / FILE
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["rows"] if found["about"]["options"] == options_of(config) else []


def analyse(
    config: Config,
    entry: Entry,
    state: State,
    tools: Instruments,
    *,
    seeds: list[int],
    folder: pathlib.Path,
) -> list[dict[str, Any]]:
    """Measures the seeds of a finished run; what is on file is not done again."""
    path = folder / FILE
    about = {"options": options_of(config), "step": int(state.step[0])}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["about"] == about:
            return stored["rows"]
    rows = []
    for i, seed in enumerate(seeds):
        one = jax.tree.map(lambda x, i=i: x[i], state)
        rows.append(measure(config, entry, one, tools, seed))
    rows = training.to_json(rows)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"about": about, "rows": rows}), encoding="utf-8")
    fresh.replace(path)
    return rows
