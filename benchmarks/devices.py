"""Data that devices exchange in a balanced step, by layout and engine.

``python -m benchmarks.devices`` (two minutes on two idle CPU cores) compiles steps of
two networks for eight virtual CPU devices. It reads from each compiled program:

- the bytes of the results of its collectives, per kind, on one device. A collective in
  a loop counts once. ``all-to-all`` and ``collective-permute`` are one column.
- the temporary memory of one device, as XLA reports it.

It then runs the step and reports the largest difference to ``jax.jacrev`` and the
method's ``update`` on one device, relative to the largest entry of a leaf.

Both networks have three layers with biases and T = 4 tasks with their own heads. "wide"
has width 256 and 64 examples, "tall" has width 64 and 1024 examples. The method is
CAGrad, or uncertainty weighting for the engine "losses". No time is measured, because
eight virtual devices on one CPU share its cores. ``--only`` measures one network and
keeps the rows of the other.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# The models, layouts and the reader of programs are those of the acceptance tests.
sys.path.insert(0, str(ROOT / "tests"))
DEVICES = 8
OUT = pathlib.Path(__file__).parent / "results" / "devices.json"
ENGINES = ("losses", "stacked", "gramian", "auto")
LAYOUTS = {"DP": "dp8", "FSDP": "fsdp8", "TP": "tp42"}
REGIONS = {"shard_map, axis_name": True, "shard_map unchecked, axis_name": False}


@functools.cache
def one_device(name: str, method: str) -> Any:
    """Returns losses and gradient without a mesh and without an engine."""
    import jax
    from devices.compare import balance_rows
    from devices.exchanged import TASKS, model_of
    from devices.layouts import Place

    import mtljax

    model = model_of(name)
    losses = model.losses(Place())
    (batch,) = model.batches.values()
    balancer = mtljax.get_method(method).build(TASKS, key=jax.random.key(0))

    def both(params):
        values, rows = losses(params, *batch), jax.jacrev(losses)(params, *batch)
        return values, balance_rows(model, balancer, values, rows)[0]

    return jax.jit(both)(model.params)


def measure(name: str, where: str, engine: str, make: Any) -> dict[str, Any]:
    """Returns one row of the table. A step that does not compile reports the error."""
    from devices import hlo
    from devices.compare import difference

    method = "uncertainty" if engine == "losses" else "cagrad"
    row = {"network": name, "where": where, "engine": engine, "method": method}
    try:
        step, args = make(method)
        sums = hlo.total(step.as_text())
        losses, grad, _ = step(*args)
        want = one_device(name, method)
        return row | {
            "all_reduce": sums["all-reduce"],
            "all_gather": sums["all-gather"],
            "reduce_scatter": sums["reduce-scatter"],
            "permute": sums["all-to-all"] + sums["collective-permute"],
            "temporaries": step.memory_analysis().temp_size_in_bytes,
            "losses_error": difference(losses, want[0]),
            "gradient_error": difference(grad, want[1]),
        }
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return row | {"error": f"{type(error).__name__}: {text}"}


def rows(networks: list[str]) -> Any:
    """Yields the rows of the given networks."""
    from devices.exchanged import compile_region, compile_step
    from devices.layouts import BY_NAME, Place, make_mesh

    for name in networks:
        for kind in ("auto", "explicit"):
            for label, layout in LAYOUTS.items():
                found = BY_NAME[layout]
                place = Place(found, make_mesh(found, kind), kind, constrain=True)
                for engine in ENGINES:
                    yield measure(
                        name,
                        f"{kind.capitalize()} {label}",
                        engine,
                        lambda method, p=place, n=name, e=engine: compile_step(
                            p, n, method, e
                        ),
                    )
        for label, tracked in REGIONS.items():
            for engine, exchange in (
                *((engine, "all") for engine in ENGINES),
                ("stacked", "scatter"),
            ):
                yield measure(
                    name,
                    f"{label}, {exchange}" if exchange != "all" else label,
                    engine,
                    lambda method, n=name, e=engine, t=tracked, x=exchange: (
                        compile_region(n, method, e, t, x)
                    ),
                )


def megabytes(size: int) -> str:
    """Formats three digits, which suffice to distinguish P from T x P."""
    return "0" if size == 0 else f"{size / 1e6:.3g}"


COLUMNS = ("all_reduce", "all_gather", "reduce_scatter", "permute", "temporaries")


def table(result: dict[str, Any]) -> str:
    """Formats the rows as Markdown."""
    lines = [
        "MB per device: results of collectives in the compiled step, and temporaries.",
        "",
        f"{result['devices']} virtual CPU devices, jax {result['jax']}. `TP` is"
        " (4 data, 2 model), all others have one axis. The error is that of the"
        " gradient, relative to one device.",
    ]
    for name, what in result["networks"].items():
        lines += [
            "",
            f"{name}: {what}",
            "",
            "| where | engine | all-reduce | all-gather | reduce-scatter |"
            " all-to-all, permute | temporaries | error |",
            "|:--|:--|--:|--:|--:|--:|--:|--:|",
        ]
        for row in (row for row in result["rows"] if row["network"] == name):
            start = f"| {row['where']} | {row['engine']} |"
            if "error" in row:
                lines.append(f"{start} | | | | | {row['error'].replace('|', ' ')} |")
                continue
            sizes = " | ".join(megabytes(row[column]) for column in COLUMNS)
            lines.append(f"{start} {sizes} | {row['gradient_error']:.0e} |")
    return "\n".join(lines) + "\n"


NETWORKS = {
    "wide": "width 256, 64 examples, P = 0.79 MB, T x P = 3.16 MB",
    "tall": "width 64, 1024 examples, P = 0.05 MB, T x P = 0.2 MB",
}


def identity(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the fields that identify a row."""
    return row["network"], row["where"], row["engine"]


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[Any]:
    """Replaces old rows by new rows of the same identity."""
    found = {identity(row): row for row in [*old, *new]}
    order = list(NETWORKS)
    return sorted(found.values(), key=lambda row: order.index(row["network"]))


def main() -> None:
    """Compiles, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NETWORKS, help="one of the networks")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    # Must be set before JAX starts.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    before = []
    if options.only and options.out.exists():
        before = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    found = []
    for row in rows([options.only] if options.only else list(NETWORKS)):
        found.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "what": "bytes of collectives and temporaries of one balanced step",
        "networks": NETWORKS,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rows": merge(before, found),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
