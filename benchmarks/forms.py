"""Backward passes of convolutions and max pooling, rewritten and not.

``python -m benchmarks.forms`` (two minutes on two idle CPU cores) times T = 24 backward
passes after one forward pass. It compares the function of ``jax.vjp`` with the
rewritten one of the Gramian engine (``mtljax.gradients._rewrite``). Both run in
``jax.lax.map`` over the cotangents and one after the other. Other backward passes do
not lay out the patches for the gradients of kernels. In a loop, XLA:CPU runs the
convolutions of ``jax.vjp`` with generic code. The rewritten convolutions have an order
of axes for which it calls a library. Work that is shared by all passes is included in
full. All ways are interleaved. The command writes ``benchmarks/results/forms.json`` and
``forms.md``.
"""

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.alternating import cpu_model

OUT = pathlib.Path(__file__).parent / "results" / "forms.json"
PASSES = 24


class Case(NamedTuple):
    """An operation and the operand whose gradient is computed."""

    name: str
    function: Callable[..., jax.Array]
    wanted: tuple[int, ...]  # shape of this operand
    other: tuple[int, ...] | None = None  # shape of the other operand

    def __call__(self, x: jax.Array, other: jax.Array | None) -> jax.Array:
        """Applies the operation."""
        return self.function(x) if other is None else self.function(x, other)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves without padding."""
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=axes
    )


def of_kernel(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Convolves with exchanged operands."""
    return convolve(x, kernel)


def pool(size: int) -> Callable[[jax.Array], jax.Array]:
    """Returns a max pooling function."""
    window = (1, size, size, 1)
    return lambda x: jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, window, window, "VALID"
    )


SMALL, WIDE = (128, 36, 36, 1), (8, 18, 18, 128)
CASES = (
    Case("convolution, inputs", convolve, WIDE, (3, 3, 128, 128)),
    Case("convolution, kernel", of_kernel, (3, 3, 128, 128), WIDE),
    Case("LeNet's first kernel", of_kernel, (9, 9, 1, 10), SMALL),
    Case("max pooling 2x2", pool(2), (128, 28, 28, 10)),
    Case("max pooling 2x2, 64 channels", pool(2), (8, 56, 56, 64)),
)


def passes(case: Case, *, rewritten: bool, loop: bool) -> Callable[..., jax.Array]:
    """Returns a function ``(operands, cotangents [T, ...]) -> [T]``.

    A product reads each gradient, as in a network. The gradient is therefore computed
    but not stored.
    """

    def run(x, other, cotangents):
        out, pull = jax.vjp(lambda x: case(x, other), x)
        if rewritten:
            pull = rewritten(pull, out, len(cotangents))
        mix = jnp.cos(jnp.arange(x.shape[-1] ** 2.0)).reshape(x.shape[-1], -1)

        def one(cotangent):
            return jnp.square(pull(cotangent)[0] @ mix).mean()

        if loop:
            return jax.lax.map(one, cotangents)
        return jnp.stack([one(cotangent) for cotangent in cotangents])

    return run


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Returns the milliseconds per pass of each way."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], case.wanted)
    other = case.other and jax.random.normal(keys[1], case.other)
    shape = jax.eval_shape(case.__call__, x, other).shape
    operands = x, other, jax.random.normal(keys[2], (PASSES, *shape))
    programs, found = {}, {}
    for rewritten in (False, True):
        for loop in (True, False):
            name = ("rewritten" if rewritten else "jax.vjp") + ", loop" * loop
            run = jax.jit(passes(case, rewritten=rewritten, loop=loop))
            programs[name] = run.lower(*operands).compile()
            found[name] = np.asarray(programs[name](*operands))
    (_, first), *others = found.items()
    for name, one in others:
        scale = float(np.abs(first).max())
        np.testing.assert_allclose(one, first, 1e-3, 1e-5 * scale, err_msg=name)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*operands))
            times[name].append(1e3 * (time.perf_counter() - start) / PASSES)
    return {name: float(np.median(values)) for name, values in times.items()}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Formats the numbers and the speedups in a loop as Markdown."""
    ways = list(next(iter(rows.values())))
    lines = [
        f"Milliseconds per pass. The number of passes is {PASSES}.",
        "",
        f"| gradient of | {' | '.join(ways)} | faster in a loop |",
        "|:--|" + "--:|" * (len(ways) + 1),
    ]
    for name, row in rows.items():
        gain = row["jax.vjp, loop"] / row["rewritten, loop"]
        numbers = [f"{value:.3g}" for value in row.values()] + [f"{gain:.1f}x"]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures, prints a table and writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    rows = {}
    for case in CASES:
        rows[case.name] = measure(case, options.rounds)
        print(case.name, rows[case.name], flush=True)
    about: dict[str, Any] = {
        "backend": jax.default_backend(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "rounds": options.rounds,
    }
    about["python"] = platform.python_version()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": rows}, indent=1)
    options.out.write_text(text + "\n")
    options.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
