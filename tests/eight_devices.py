"""Cases that run in a process of their own with eight virtual CPU devices.

A module of cases calls :func:`main`; its test calls :func:`measure` and reads, for
every case, the largest relative difference to one device or what was raised.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LIMIT = 1e-5
SHAPES = {"dp": ((8,), ("data",)), "tp": ((4, 2), ("data", "model"))}
ROOT = pathlib.Path(__file__).parents[1]


@functools.cache
def measure(module: str, timeout: int = 900) -> dict[str, Any]:
    """The result of every case of a module, which is run once."""
    flags = os.environ.get("XLA_FLAGS", "")
    env = {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    out = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=timeout,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout.splitlines()[-1])


def check(module: str, case: str) -> None:
    """Asserts that a case gave the numbers of one device."""
    found = measure(module)[case]
    assert isinstance(found, float), found
    assert found < LIMIT


def main(cases: Mapping[str, Callable[[], float]]) -> None:
    """Runs the cases (those named on the command line) and prints the results."""
    assert len(jax.devices()) == 8
    wanted = sys.argv[1:]
    found: dict[str, Any] = {}
    for name, case in cases.items():
        if wanted and not any(part in name for part in wanted):
            continue
        try:
            found[name] = float(case())
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
        print(name, found[name], f"{time.process_time():.1f} s", file=sys.stderr)
    print(json.dumps(found))


def make_mesh(shape: str, kind: str) -> Mesh:
    """``"dp"`` or ``"tp"``, with ``"auto"`` or ``"explicit"`` axes."""
    sizes, names = SHAPES[shape]
    axis = AxisType.Auto if kind == "auto" else AxisType.Explicit
    return jax.make_mesh(sizes, names, axis_types=(axis,) * len(names))


def put(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """The tree with every array where its spec (or the spec of its branch) says."""

    def leaf(spec, sub):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), sub)

    return jax.tree.map(leaf, specs, tree, is_leaf=lambda x: isinstance(x, P))


def difference(got: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of a leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    worst = 0.0
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    for pair in pairs:
        have, want = (np.asarray(x, np.float64) for x in pair)
        assert have.shape == want.shape
        assert np.isfinite(have).all()
        scale = np.abs(want).max(initial=0) + 1e-30
        worst = max(worst, np.abs(have - want).max(initial=0) / scale)
    return worst


def check_placed(got: Any, like: Any) -> None:
    """Asserts that gradients lie where the parameters lie."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (
            f"{x.sharding} instead of {y.sharding}"
        )
