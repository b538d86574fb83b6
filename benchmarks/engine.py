"""Engines of the balanced gradient: time, memory, the choice of "auto".

``python -m benchmarks.engine`` (five minutes on two idle CPU cores) steps several kinds
of models with equal weights (one backward pass), with stacked gradients (unrolled and
by ``vmap``), and with the Gramian engine. The steps are interleaved so that drift
affects all equally. The balancer is a cheap function of the Gramian, so that the times
are those of the engines.

Samples are dropped if other processes used the machine, as far as ``--patience``
allows. The results contain the remaining load as a share of a core. Overhead is
relative to equal weights. Memory is that of the compiled step without arguments and
results, as XLA reports it. ``auto`` marks the engine and the strategy of the defaults.
``regret`` is its additional time relative to the best measured row. Rows without a time
were only compiled. ``--only`` and ``--tasks`` select models. Their rows replace the old
rows in the results.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mtljax
from mtljax.balancer import Balancer, from_weights
from mtljax.gradients.gramian import choose

OUT = pathlib.Path(__file__).parent / "results" / "engine.json"
LABELS = {"trunk": "shared", "heads": "own"}
ENOUGH = 8  # undisturbed samples per row


class Case(NamedTuple):
    """A model with T heads and a batch."""

    name: str
    tasks: int
    size: str
    task_losses: Callable[..., Any]
    params: Any
    batch: Any


def normal(seed: int, *shape: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    scale = np.sqrt(np.prod(shape[:-1]))
    return jnp.asarray(rng.normal(size=shape) / scale, jnp.float32)


def conv(x, w, stride=1, padding="SAME"):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=numbers
    )


def make_case(name, tasks, size, x, *, trunk, params, outputs=10) -> Case:
    """Builds linear heads on features ``[n, d]``, for regression or ten classes."""
    rng = np.random.default_rng(1)
    width = jax.eval_shape(trunk, params, x).shape[-1]
    heads = [normal(100 + i, width, outputs) for i in range(tasks)]
    y = jnp.asarray(rng.integers(0, 10, (tasks, len(x))))

    def loss(out, y):
        if outputs == 1:
            return jnp.mean((out[:, 0] - 0.1 * y) ** 2)
        return -jnp.mean(jax.nn.log_softmax(out)[jnp.arange(len(y)), y])

    def task_losses(p, batch):
        h = trunk(p["trunk"], batch[0])
        pairs = zip(p["heads"], batch[1], strict=True)
        return jnp.stack([loss(h @ w, target) for w, target in pairs])

    everything = {"trunk": params, "heads": heads}
    return Case(name, tasks, size, task_losses, everything, (x, y))


def mlp(tasks: int, examples: int) -> Case:
    sizes = [256, 512, 512, 512]
    pairs = itertools.pairwise(sizes)
    params = [{"w": normal(i, *s), "b": jnp.zeros(s[1])} for i, s in enumerate(pairs)]

    def trunk(layers, x):
        for layer in layers:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x

    x = normal(9, examples, 256) * 16
    return make_case(
        "mlp", tasks, f"N={examples}", x, trunk=trunk, params=params, outputs=1
    )


def lenet(tasks: int, examples: int) -> Case:
    shapes = {"c1": (9, 9, 1, 10), "c2": (5, 5, 10, 20), "d": (500, 50)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    params |= {"b1": jnp.zeros(10), "b2": jnp.zeros(20), "b3": jnp.zeros(50)}

    def pool(h):
        window = (1, 2, 2, 1)
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, window, "VALID")
        return jax.nn.relu(h)

    def trunk(p, x):
        h = pool(conv(x, p["c1"], padding="VALID") + p["b1"])
        h = pool(conv(h, p["c2"], padding="VALID") + p["b2"])
        return jax.nn.relu(h.reshape(len(x), -1) @ p["d"] + p["b3"])

    x = normal(9, examples, 36, 36, 1)
    return make_case("lenet", tasks, f"N={examples}", x, trunk=trunk, params=params)


def resnet(tasks: int, examples: int) -> Case:
    """Three blocks with strides and batch statistics, on 32x32 images."""
    widths = [16, 32, 64, 128]
    params: dict[str, Any] = {"in": normal(0, 3, 3, 3, 16)}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        params[f"first{i}"] = normal(i, 3, 3, a, b)
        params[f"second{i}"] = normal(i, 3, 3, b, b)
        params[f"skip{i}"] = normal(i, 1, 1, a, b)
        params[f"scale{i}"], params[f"bias{i}"] = jnp.ones(b), jnp.zeros(b)

    def trunk(p, x):
        h = jax.nn.relu(conv(x, p["in"]))
        for i in range(3):
            z = conv(h, p[f"first{i}"], 2)
            z = (z - z.mean((0, 1, 2))) * jax.lax.rsqrt(z.var((0, 1, 2)) + 1e-5)
            z = jax.nn.relu(z * p[f"scale{i}"] + p[f"bias{i}"])
            h = jax.nn.relu(conv(z, p[f"second{i}"]) + conv(h, p[f"skip{i}"], 2))
        return h.mean((1, 2))

    x = normal(9, examples, 32, 32, 3)
    return make_case("resnet", tasks, f"N={examples}", x, trunk=trunk, params=params)


def transformer(tasks: int, sequences: int) -> Case:
    """Two layers of width 256 with eight heads, 64 tokens per sequence."""
    d, heads = 256, 8
    layers = []
    for i in range(2):
        layer = {name: normal(i, d, heads, d // heads) for name in "qkv"}
        layer |= {"o": normal(i, heads, d // heads, d)}
        layer |= {"up": normal(i, d, 4 * d), "down": normal(i, 4 * d, d)}
        layer |= {"norm1": jnp.ones(d), "norm2": jnp.ones(d), "bias": jnp.zeros(4 * d)}
        layers.append(layer)

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def trunk(layers, x):
        for p in layers:
            h = norm(x, p["norm1"])
            q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
            scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(d / heads)
            mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
            x = x + jnp.einsum("bthk,hkd->btd", mixed, p["o"])
            h = jax.nn.gelu(norm(x, p["norm2"]) @ p["up"] + p["bias"])
            x = x + h @ p["down"]
        return x.mean(1)

    x = normal(9, sequences, 64, d) * 100
    size = f"{sequences}x64 tokens"
    return make_case("transformer", tasks, size, x, trunk=trunk, params=layers)


def several_batches(tasks: int, examples: int) -> Case:
    """A trunk with a separate batch and forward pass per task."""
    single = mlp(tasks, examples)
    xs = jnp.stack([normal(i, examples, 256) * 16 for i in range(tasks)])

    def task_losses(p, batch):
        xs, y = batch
        each = []
        for i, head in enumerate(p["heads"]):
            alone = {"trunk": p["trunk"], "heads": [head]}
            each.append(single.task_losses(alone, (xs[i], y[i : i + 1]))[0])
        return jnp.stack(each)

    batch = xs, single.batch[1]
    size = f"N={examples} each"
    return Case("mlp, T batches", tasks, size, task_losses, single.params, batch)


def cases() -> list[Case]:
    return [
        mlp(2, 128),
        mlp(3, 128),
        mlp(11, 128),
        mlp(40, 128),
        mlp(100, 32),
        mlp(11, 512),
        several_batches(5, 128),
        lenet(3, 64),
        lenet(11, 64),
        lenet(40, 64),
        resnet(3, 32),
        transformer(3, 4),
        transformer(24, 4),
        transformer(3, 32),
        transformer(40, 32),
    ]


class NormState(NamedTuple):
    task_weights: Any


def inverse_norms(tasks: int) -> Balancer:
    """Weights ``1/‖g_i‖``, a method without additional cost beyond its Gramian."""

    def weigh(state, *, losses, gramian, mask):
        del losses, mask
        return jax.lax.rsqrt(jnp.diag(gramian) + 1e-12), state

    return from_weights(
        "inverse_norms",
        tasks,
        init=lambda: NormState(jnp.ones(tasks)),
        weigh=weigh,
        needs="gramian",
        native="free",
        scale="mean",
    )


def contenders(case: Case) -> dict[str, Any]:
    """Returns the steps to compare. Forty tasks are not unrolled, to save time."""
    few = case.tasks <= 16
    options = {"equal weights": (mtljax.linear(case.tasks), "losses", "auto")}
    balancer = inverse_norms(case.tasks)
    if few:
        options["stacked, unrolled"] = (balancer, "stacked", "unrolled")
    options["stacked, vmap"] = (balancer, "stacked", "vmap")
    if not few:
        options["stacked, chunked"] = (balancer, "stacked", "chunked")
        options["stacked, map"] = (balancer, "stacked", "map")
    options["gramian"] = (balancer, "gramian", "auto")
    return options


def compiled(case: Case, balancer: Balancer, engine: Any, strategy: Any):
    """Returns the compiled step, its arguments and the compile time in seconds."""
    step = mtljax.value_and_balanced_grad(
        case.task_losses,
        balancer,
        labels=LABELS,
        engine=engine,
        strategy=8 if strategy == "chunked" else strategy,
    )
    arguments = case.params, balancer.init({}), case.batch
    start = time.perf_counter()
    program = jax.jit(step).lower(*arguments).compile()
    return program, arguments, time.perf_counter() - start


class Sample(NamedTuple):
    """Several runs of one program."""

    seconds: float  # time of the median run
    others: float  # number of cores that other processes used meanwhile


def busy_seconds() -> float:
    """Returns the CPU time of the whole machine, or 0 if it is not available."""
    try:
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft = (int(field) for field in fields[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def sample(program: Any, arguments: Any, least: float = 0.05) -> Sample:
    """Runs for ``least`` seconds, long enough for the clock ticks of the system."""
    runs: list[float] = []
    busy, own = busy_seconds(), time.process_time()
    while sum(runs) < least:
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        runs.append(time.perf_counter() - start)
    others = busy_seconds() - busy - (time.process_time() - own)
    return Sample(statistics.median(runs), max(others, 0) / sum(runs))


def quiet(samples: list[Sample]) -> list[Sample]:
    """Returns the undisturbed samples, or the less disturbed half."""
    undisturbed = [one for one in samples if one.others < 0.1]
    if len(undisturbed) >= min(ENOUGH, max(2, len(samples) // 2)):
        return undisturbed
    return sorted(samples, key=lambda one: one.others)[: max(2, len(samples) // 2)]


def memory(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def default_of(case: Case) -> str:
    """Returns the name of the row that ``engine="auto"`` selects."""
    found = []

    def probe(params, batch):
        found.append(
            choose(
                "auto",
                lambda p: case.task_losses(p, batch),
                params,
                Options(labels=LABELS),
            )
        )

    jax.eval_shape(probe, case.params, case.batch)  # traced as in a step
    uses, passes = found[0]
    if uses is not None:
        return "gramian"
    return f"stacked, {passes.strategy}"


def take_turns(programs: dict[str, Any], patience: float) -> dict[str, list[Sample]]:
    """Samples each program until enough samples are undisturbed, or time is over."""
    samples: dict[str, list[Sample]] = {name: [] for name in programs}
    for program, arguments, _ in programs.values():
        jax.block_until_ready(program(*arguments))
    end = time.perf_counter() + patience
    while True:
        for name, (program, arguments, _) in programs.items():
            samples[name].append(sample(program, arguments))
        turns = min(map(len, samples.values()))
        calm = min(sum(s.others < 0.1 for s in each) for each in samples.values())
        if turns > 1 and (calm >= ENOUGH or time.perf_counter() > end):
            return samples


def measure(case: Case, patience: float) -> list[dict[str, Any]]:
    """Measures a row per contender, interleaved, for at most ``patience`` seconds."""
    programs = {name: compiled(case, *how) for name, how in contenders(case).items()}
    samples = take_turns(programs, patience)
    rows = []
    default = default_of(case)
    for name, (program, _, compile_s) in programs.items():
        row = {
            "model": case.name,
            "tasks": case.tasks,
            "size": case.size,
            "engine": name,
            "auto": name == default,
            "memory_mb": memory(program) / 2**20,
        }
        if not jax.config.values[
            "jax_compilation_cache_dir"
        ]:  # otherwise most of it is cached
            row["compile_s"] = compile_s
        kept = quiet(samples[name])
        seconds = [one.seconds for one in kept]
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        row |= {"ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}
        row["samples"] = len(kept)
        row["others"] = statistics.mean(s.others for s in kept)
        rows.append(row)
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the overhead over the first row and the regret of the default."""
    for row in rows[1:]:
        row["overhead"] = row["ms"] / rows[0]["ms"]
        if row["auto"]:
            row["regret"] = row["ms"] / min(r["ms"] for r in rows[1:]) - 1
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    lines = [
        "# Engines of the balanced gradient",
        "",
        "`python -m benchmarks.engine`: median and quartiles of a step in ms, "
        "overhead over equal weights, temporary memory of the compiled step.",
        "",
        "| model | T | batch | engine | ms | overhead | MB | compile s | auto |",
        "|:--|--:|:--|:--|--:|--:|--:|--:|:--|",
    ]
    disturbed = max((row.get("others", 0) for row in rows), default=0)
    if disturbed > 0.1:
        lines.insert(4, f"Other processes kept up to {disturbed:.1f} cores busy.\n")
    for row in rows:
        over, auto = "", "auto" if row["auto"] else ""
        ms = f"{row['ms']:.3g} ({row['low_ms']:.3g} to {row['high_ms']:.3g})"
        if "overhead" in row:
            over = f"{row['overhead']:.2f}"
        if row.get("regret", 0) > 0.005:
            auto += f", {row['regret']:+.0%}"
        head = f"| {row['model']} | {row['tasks']} | {row['size']} | {row['engine']} |"
        compile_s = f"{row['compile_s']:.1f}" if "compile_s" in row else ""
        tail = f" {row['memory_mb']:.1f} | {compile_s} | {auto} |"
        lines.append(f"{head} {ms} | {over} |{tail}")
    lines += ["", ", ".join(f"{k} {v}" for k, v in about.items())]
    return "\n".join(lines) + "\n"


def merged(old: list[Any], new: list[Any], order: list[Case]) -> list[Any]:
    """Replaces old rows of the same model by new rows, in the given order."""
    cells = [(case.name, case.tasks, case.size) for case in order]

    def cell(row):
        return row["model"], row["tasks"], row["size"]

    fresh = {cell(row) for row in new}
    kept = [row for row in old if cell(row) in cells and cell(row) not in fresh]
    return sorted(kept + new, key=lambda row: cells.index(cell(row)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--patience", type=float, default=15.0, help="seconds a model")
    parser.add_argument("--only", nargs="+", help="names of models")
    parser.add_argument("--tasks", type=int, nargs="+", help="only these T")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    about = {"backend": jax.default_backend(), "cores": os.cpu_count()}
    about |= {"python": platform.python_version()}
    about |= {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    rows: list[dict[str, Any]] = []
    if arguments.out.exists():
        found = json.loads(arguments.out.read_text())
        rows = found["rows"] if found["about"] == about else []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    everything = cases()
    for case in everything:
        if arguments.only is not None and case.name not in arguments.only:
            continue
        if arguments.tasks is not None and case.tasks not in arguments.tasks:
            continue
        start = time.perf_counter()
        rows = merged(rows, measure(case, arguments.patience), everything)
        results = json.dumps({"about": about, "rows": rows}, indent=1)
        arguments.out.write_text(results + "\n")
        taken = time.perf_counter() - start
        print(f"{case.name}, T={case.tasks}, {case.size}: {taken:.0f} s", flush=True)
    table = markdown(rows, about)
    arguments.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
