"""Step time of IGBv1 and IGBv2 relative to equal weights.

``python -m benchmarks.igb`` (about six minutes on two CPU cores) trains the
message-passing network of the QM9 tables on synthetic molecules with 11 tasks and
batches of 120. The widths are that of the experiment and twice that. All methods are
interleaved. A round is 50 steps of each method, one period of the agent, so that the
training of the agent is amortised as in a run. The buffer of IGBv2 is full (the most
expensive case, 50 updates of 256 transitions) or nearly empty. The cost of the agent
does not depend on the network, so its share falls as the cost of the step grows. The
command writes ``benchmarks/results/igb.json``.
"""

import argparse
import json
import os
import pathlib
import platform
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtljax
from mtljax import models, training
from mtljax.models.mpnn import MPNN

TASKS, ATOMS, PERIOD = 11, 9, 50
OUT = pathlib.Path(__file__).parent / "results" / "igb.json"
EMPTY = "IGBv2, empty buffer"
TARGETS = {"IGBv1": 1.03, "IGBv2, full buffer": 1.20}


class Entry(NamedTuple):
    """A balancer, and a function that prepares a state as in mid-training."""

    balancer: mtljax.Balancer
    prepare: Any = None


def molecules(count: int) -> np.ndarray:
    """Builds chains of carbons with random bonds, in the layout of ``qm9_subset``."""
    rng = np.random.default_rng(0)
    x = np.zeros((count, ATOMS, 5 + ATOMS), np.uint8)
    x[..., 0], x[..., 2] = 6, 1
    for i in range(ATOMS - 1):
        kind = rng.integers(1, 5, count)
        x[:, i, 5 + i + 1] = x[:, i + 1, 5 + i] = kind
    return x[..., None]


def filled(state: Any, share: float) -> Any:
    """Returns the state of IGBv2 in use, with a share of its buffer filled."""
    key = jax.random.key(1)

    def leaf(x):
        if x.dtype == bool:
            return jnp.ones_like(x)
        return jax.random.uniform(key, x.shape, minval=0.5, maxval=1.5)

    rows = jax.tree.map(leaf, state.memory.rows)
    written = jnp.int32(share * len(rows.reward))
    memory = state.memory._replace(rows=rows, written=written)
    return state._replace(memory=memory, step=jnp.int32(10 * PERIOD))


def entries() -> dict[str, Entry]:
    """Returns the methods, with equal weights first."""
    v2 = mtljax.igb_v2(
        TASKS,
        key=jax.random.key(0),
        phases=mtljax.IGBPhases(window=(1, 2)),
        schedule=1e-3,
        agent=mtljax.IGBAgent(period=PERIOD),
    )
    return {
        "EW": Entry(mtljax.linear(TASKS)),
        "SI": Entry(mtljax.scale_invariant(TASKS)),
        "IGBv1": Entry(mtljax.igb_v1(TASKS, window=(1, 2))),
        "IGBv2, full buffer": Entry(v2, lambda s: filled(s, 1.0)),
        EMPTY: Entry(v2, lambda s: filled(s, 0.01)),
    }


def make_round(balancer: mtljax.Balancer, model: models.Model, batch: Any):
    """Builds fifty training steps as one program."""
    images, targets = batch
    optimizer = optax.adam(1e-3)

    def task_losses(params):
        outputs, _ = model.apply((params, {}), images, train=True)
        predicted = jnp.stack([o[:, 0] for o in outputs.values()])
        return jnp.square(predicted - targets).mean(1)

    gradient = mtljax.value_and_balanced_grad(
        task_losses,
        balancer,
        labels={"trunk": "shared", "heads": "own"},
        heads="weighted",
    )

    def step(carry, _):
        params, opt_state, state = carry
        _, grad, state = gradient(params, state)
        updates, opt_state = optimizer.update(grad, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    def run(carry):
        return jax.lax.scan(step, carry, length=PERIOD)[0]

    return optimizer, jax.jit(run, donate_argnums=0)


def cpu_model() -> str:
    """Returns the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_all(rounds: int, width: int, batch_size: int) -> dict[str, Any]:
    """Measures one row of numbers per method."""
    heads = {f"task {i}": 1 for i in range(TASKS)}
    model = models.multitask(MPNN(width=width), heads)
    images = jnp.asarray(molecules(batch_size))
    targets = jax.random.normal(jax.random.key(0), (TASKS, batch_size))
    runs, carries = {}, {}
    for name, (balancer, prepare) in entries().items():
        params = jax.jit(model.init)(jax.random.key(0), images).params
        optimizer, run = make_round(balancer, model, (images, targets))
        state = balancer.init(params)
        state = state if prepare is None else prepare(state)
        carry = jax.tree.map(jnp.copy, (params, optimizer.init(params), state))
        runs[name], carries[name] = run, jax.block_until_ready(run(carry))

    def measure(name: str) -> np.ndarray:
        """Returns wall-clock and processor milliseconds of one step."""
        start, busy = time.perf_counter(), time.process_time()
        carries[name] = jax.block_until_ready(runs[name](carries[name]))
        spent = time.perf_counter() - start, time.process_time() - busy
        return 1e3 * np.array(spent) / PERIOD

    pairs = {name: [] for name in runs if name != "EW"}
    for _ in range(rounds):
        for name, found in pairs.items():
            found.append([measure("EW"), measure(name)])  # directly one after the other
        # A full buffer remains full. A nearly empty buffer is emptied again.
        emptied = list(carries[EMPTY])
        emptied[2] = filled(emptied[2], 0.01)
        carries[EMPTY] = tuple(emptied)
    return {name: summary(name, np.array(found)) for name, found in pairs.items()}


def summary(name: str, times: np.ndarray) -> dict[str, Any]:
    """Summarises ``times`` [round, EW or method, wall or processor], in ms."""
    ratio = times[:, 1] / times[:, 0]
    low, high = np.quantile(ratio[:, 0], [0.25, 0.75])
    row = {
        "ms": float(np.median(times[:, 1, 0])),
        "ms_ew": float(np.median(times[:, 0, 0])),
        "ratio": float(np.median(ratio[:, 0])),
        "ratio_quartiles": [float(low), float(high)],
        "ratio_of_minima": float(np.divide(*times[:, ::-1, 0].min(0))),
        "processor_ratio": float(np.median(ratio[:, 1])),
        "target": TARGETS.get(name),
    }
    print(
        f"{name:20s} {row['ms']:7.2f} ms, EW {row['ms_ew']:7.2f} ms: "
        f"x{row['ratio']:.3f} (half of the rounds in [{low:.3f}, {high:.3f}]), "
        f"of the minima x{row['ratio_of_minima']:.3f}, "
        f"of processor time x{row['processor_ratio']:.3f}",
        flush=True,
    )
    return row


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--batch-size", type=int, default=120)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()

    widths = {}
    for width in options.widths:
        print(f"\nQM9 network of width {width}")
        widths[str(width)] = measure_all(options.rounds, width, options.batch_size)
    record = {
        "what": "one training step of the QM9 network, 11 tasks; ratios to EW",
        "rounds": options.rounds,
        "steps_per_round": PERIOD,
        "batch_size": options.batch_size,
        "widths": widths,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        **training.environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
