"""Cost of set-ups beyond one batch for all tasks.

``python -m benchmarks.reach`` (two minutes on two idle CPU cores) compares each set-up
with a lower bound of its cost. The set-ups are tasks with separate inputs, weights from
a representation, and weights that are kept for 16 steps. Steps of contenders alternate,
and medians are over paired rounds. The command writes ``benchmarks/results/reach.json``
and ``reach.md``.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mtljax
from benchmarks.alternating import cpu_model

OUT = pathlib.Path(__file__).parent / "results" / "reach.json"
ROUNDS = 15
EXAMPLES = 32


class Contender(NamedTuple):
    """A step, and the number of steps over which its time is averaged."""

    name: str
    step: Callable[..., Any]
    args: tuple[Any, ...]
    steps: int = 1


def normal(seed: int, *shape: int) -> jax.Array:
    """Samples numbers of the size of a layer's weights."""
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


def mlp(x, layers):
    """Applies a network with tanh between its layers."""
    for w in layers:
        x = jnp.tanh(x @ w)
    return x


def separate_tasks(tasks: int) -> list[Contender]:
    """MLP 40-64-64-1 with 32 separate examples per task, CAGrad."""
    params = [normal(0, 40, 64), normal(1, 64, 64), normal(2, 64, 1)]
    x, y = normal(3, tasks, EXAMPLES, 40), normal(4, tasks, EXAMPLES, 1)
    balancer = mtljax.cagrad(tasks)
    state = balancer.init(params)

    def one(p, x, y):
        return ((mlp(x, p[:-1]) @ p[-1] - y) ** 2).mean()

    def by_hand(p, state, x, y):
        losses, rows = jax.vmap(jax.value_and_grad(one), (None, 0, 0))(p, x, y)
        update, state = balancer.update(rows, state, p)
        return losses, update, state

    def equal(p, state, x, y):
        def mean(p):
            return jax.vmap(one, (None, 0, 0))(p, x, y).mean()

        return *jax.value_and_grad(mean)(p), state

    args = params, state, x, y
    balanced = mtljax.value_and_balanced_grad
    return [
        Contender("vmap(value_and_grad), then update", by_hand, args),
        Contender(
            "separate", balanced(mtljax.separate(one, (None, 0, 0)), balancer), args
        ),
        Contender(
            "one function of all tasks",
            balanced(jax.vmap(one, (None, 0, 0)), balancer),
            args,
        ),
        Contender("equal weights", equal, args),
    ]


def unequal_tasks() -> list[Contender]:
    """Three tasks with 16, 48 and 96 examples, as a dict."""
    params = [normal(0, 40, 256), normal(1, 256, 256), normal(2, 256, 1)]
    sizes = {"a": 16, "b": 48, "c": 96}
    x = {name: normal(n, n, 40) for name, n in sizes.items()}
    balancer = mtljax.cagrad(3)

    def one(p, x):
        return ((mlp(x, p[:-1]) @ p[-1]) ** 2).mean()

    def alone(p, x):
        return [jax.value_and_grad(one)(p, x[name]) for name in sizes]

    losses = mtljax.separate(dict.fromkeys(sizes, one))
    step = mtljax.value_and_balanced_grad(losses, balancer)
    return [
        Contender("the tasks alone", alone, (params, x)),
        Contender("separate", step, (params, balancer.init(params), x)),
    ]


def wide(tasks: int, width: int, balancer: mtljax.Balancer, engine: str = "auto"):
    """A trunk of three layers with linear heads, 128 examples."""
    params = {
        "trunk": [normal(i, width, width) for i in range(3)],
        "heads": normal(4, width, tasks),
    }
    x, y = normal(5, 128, width), normal(6, 128, tasks)
    labels = {"trunk": "shared", "heads": "own"}

    def encode(p, x, y):
        del y
        return mlp(x, p["trunk"])

    def losses(p, z, x, y):
        del x
        return ((z @ p["heads"] - y) ** 2).mean(0)

    def step(measure=None, rule=balancer):
        return mtljax.value_and_balanced_grad(
            mtljax.through(encode, losses),
            rule,
            labels=labels,
            measure=measure,
            engine=engine,
        )

    def heads(p, z, x, y):
        return jax.vmap(jax.vjp(lambda z: losses(p, z, x, y), z)[1])(jnp.eye(tasks))

    return params, (x, y), step, heads


def representation(tasks: int) -> list[Contender]:
    """Trunk 3 x 512, UPGrad."""
    balancer, equal = mtljax.upgrad(tasks), mtljax.linear(tasks)
    params, batch, step, heads = wide(tasks, 512, balancer)
    state = balancer.init(params)
    z = normal(9, 128, 512)
    return [
        Contender("equal weights", step(None, equal), (params, equal.init({}), *batch)),
        Contender("T passes through the heads", heads, (params, z, *batch)),
        Contender("representation", step("representation"), (params, state, *batch)),
        Contender("last layer", step("trunk/2"), (params, state, *batch)),
        Contender("all parameters", step(), (params, state, *batch)),
    ]


def reused(tasks: int, every: int) -> list[Contender]:
    """Trunk 3 x 512, UPGrad, a scan over eight times ``every`` steps."""
    length = 8 * every
    upgrad, equal = mtljax.upgrad(tasks), mtljax.linear(tasks)
    reuse = mtljax.reuse(upgrad, every=every)
    found = []
    for name, rule in (("equal weights", equal), ("reuse", reuse), ("UPGrad", upgrad)):
        params, batch, step, _ = wide(tasks, 512, rule)
        grad = step()

        def steps(params, state, *batch, grad=grad):
            def body(carry, _):
                params, state = carry
                losses, g, state = grad(params, state, *batch)
                params = jax.tree.map(lambda p, d: p - 1e-3 * d, params, g)
                return (params, state), losses

            return jax.lax.scan(body, (params, state), None, length=length)

        args = params, rule.init(params), *batch
        found.append(Contender(name, steps, args, length))
    return found


CASES: dict[str, Callable[[], list[Contender]]] = {
    "own inputs, T = 3": lambda: separate_tasks(3),
    "own inputs, T = 10": lambda: separate_tasks(10),
    "own inputs, T = 50": lambda: separate_tasks(50),
    "own inputs of unequal shapes": unequal_tasks,
    "weights from a representation, T = 11": lambda: representation(11),
    "weights from a representation, T = 40": lambda: representation(40),
    "weights kept for 16 steps, T = 11": lambda: reused(11, 16),
}


def measure(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Returns the rows of one set-up."""
    rows, programs = [], []
    for one in contenders:
        program = jax.jit(one.step).lower(*one.args).compile()
        cost: Any = program.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        rows.append(
            {
                "name": one.name,
                # XLA counts the body of a loop once.
                "mflop": cost["flops"] / 1e6 if one.steps == 1 else None,
                "temp_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
            }
        )
        programs.append(program)
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(ROUNDS + 2):
        for one, program, found in zip(contenders, programs, times, strict=True):
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < 0.03:
                jax.block_until_ready(program(*one.args))
                count += 1
            seconds = (time.perf_counter() - start) / count / one.steps
            if turn > 1:
                found.append(1e3 * seconds)
    for row, found in zip(rows, times, strict=True):
        row["ms"] = statistics.median(found)
        pairs = zip(found, times[0], strict=True)
        row["times_the_first"] = statistics.median(a / b for a, b in pairs)
    return rows


def table(results: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    lines = [
        "# Cost of set-ups",
        "",
        f"`python -m benchmarks.reach`, {results['machine']}, jax {results['jax']}. "
        f"Medians of {ROUNDS} interleaved rounds; the ratio is the median of the "
        "paired ratios to the first row. XLA counts the Mflop (not those of loops).",
        "",
        "| set-up | step | Mflop | ms | times the first | temporary MB |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for case, rows in results["cases"].items():
        for row in rows:
            mflop = "" if row["mflop"] is None else f"{row['mflop']:.4g}"
            lines.append(
                f"| {case} | {row['name']} | {mflop} | {row['ms']:.3g} | "
                f"{row['times_the_first']:.2f} | {row['temp_mb']:.3g} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all set-ups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    out = parser.parse_args().out
    results: dict[str, Any] = {"machine": cpu_model(), "jax": jax.__version__}
    results["cases"] = {}
    for name, build in CASES.items():
        results["cases"][name] = measure(build())
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
