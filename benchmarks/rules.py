"""Savings of each rule that rewrites backward passes for XLA:CPU.

``python -m benchmarks.rules`` (ten minutes on two idle CPU cores) times a whole step
(forward pass, gradients, weights, SGD) with all rules, with the backward pass of
``jax.vjp``, and without one rule at a time. Steps of contenders alternate. The ratio is
the median of paired rounds. A rule is kept if a step of one model takes at least 10 %
longer without it. ``--models`` keeps the rows of other models. The command writes
``benchmarks/results/rules.json`` and ``rules.md``.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax

import mtljax
from benchmarks import peer_models
from benchmarks.alternating import cpu_model
from mtljax.gradients._primitives import CONVOLUTION, MAX_POOL_GRADIENT
from mtljax.gradients._rewrite import batch, cpu, sweep

OUT = pathlib.Path(__file__).parent / "results" / "rules.json"
ROUNDS = 9
LABELS = {"trunk": "shared", "heads": "own"}
MODELS = {
    "mlp, T=3": lambda: peer_models.mlp(3),
    "mlp, T=11": lambda: peer_models.mlp(11),
    "transformer, T=3": lambda: peer_models.transformer(3),
    "lenet, T=3": lambda: peer_models.lenet(3),
    "lenet, T=11": lambda: peer_models.lenet(11),
    "lenet, T=40": lambda: peer_models.lenet(40),  # passes in a loop
}
RULES = (
    *("constant axes", "max pooling", "order of axes", "patches"),
    "layout of tasks",
)


def _without(primitives: Any) -> Any:
    rewrite = cpu.rewrite

    def some(op, known, runs):
        return None if op.primitive in primitives else rewrite(op, known, runs)

    return mock.patch.object(sweep, "rewrite", some)


@contextlib.contextmanager
def without(rule: str) -> Iterator[None]:
    """Disables one rule while a step is traced."""
    with contextlib.ExitStack() as stack:
        if rule == "constant axes":
            stack.enter_context(mock.patch.object(sweep, "_rule", return_value=None))
        elif rule == "max pooling":
            stack.enter_context(_without(MAX_POOL_GRADIENT))
        elif rule == "order of axes":
            stack.enter_context(_without(CONVOLUTION))
        elif rule == "patches":
            stack.enter_context(mock.patch.object(cpu, "_REUSED", 1 << 30))
        elif rule == "layout of tasks":

            def as_vmap(function, rows, in_axes, out_axes):
                return jax.vmap(function, (in_axes,), out_axes)(rows)

            stack.enter_context(mock.patch.object(batch, "batch", as_vmap))
        yield


def compiled(problem: Any, balancer: Any, engine: str, backward: Any, rule: str) -> Any:
    """Returns a program of the step, and its arguments."""
    grad_fn = mtljax.value_and_balanced_grad(
        problem.task_losses, balancer, labels=LABELS, engine=engine, backward=backward
    )

    def step(params, state, batch):
        losses, grad, state = grad_fn(params, state, batch)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grad)
        return params, state, losses

    args = problem.params, balancer.init(problem.params), (problem.x, problem.y)
    with without(rule):
        return jax.jit(step).lower(*args).compile(), args


def measure(problem: Any, engine: str) -> dict[str, dict[str, float]]:
    """Returns milliseconds, and the ratio to the step with all rules."""
    method = mtljax.linear if engine == "losses" else mtljax.upgrad
    balancer = method(problem.tasks)
    programs = {"all rules": compiled(problem, balancer, engine, "rewritten", "")}
    programs["jax.vjp"] = compiled(problem, balancer, engine, "jax", "")
    for rule in RULES:
        made = compiled(problem, balancer, engine, "rewritten", rule)
        programs[f"without {rule}"] = made
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, (program, args) in programs.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < 0.05:
                jax.block_until_ready(program(*args))
                count += 1
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start) / count)
    first = times["all rules"]
    return {
        name: {
            "ms": statistics.median(found),
            "ratio": statistics.median(
                a / b for a, b in zip(found, first, strict=True)
            ),
        }
        for name, found in times.items()
    }


def table(results: dict[str, Any]) -> str:
    """Formats the results as Markdown."""
    # Rules that were deleted keep their column.
    names = list(dict.fromkeys(n for found in results["cases"].values() for n in found))
    lines = [
        "# Savings of the rules for XLA:CPU",
        "",
        f"`python -m benchmarks.rules`, {results['machine']}, jax {results['jax']}. "
        f"A whole step: ms with all rules, then the ratio to it (medians of {ROUNDS} "
        "paired rounds). A rule stays if a ratio without it is at least 1.1.",
        "",
        "| step | " + " | ".join(names) + " |",
        "|:--|" + "--:|" * len(names),
    ]
    for case, found in results["cases"].items():
        cells = [f"{found[names[0]]['ms']:.3g}"]
        ratios = [found.get(name, {}).get("ratio") for name in names[1:]]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all models and engines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="NAME")
    args = parser.parse_args()
    out, results = args.out, {"machine": cpu_model(), "jax": jax.__version__}
    results["cases"] = {}
    if args.models != list(MODELS) and out.exists():
        results["cases"] = json.loads(out.read_text())["cases"]
    for model in args.models:
        build = MODELS[model]
        for engine in ("losses", "stacked", "gramian"):
            results["cases"][f"{model}, {engine}"] = measure(build(), engine)
            out.write_text(json.dumps(results, indent=1) + "\n")
            out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
