"""Branches on eight devices of their own, in another process."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.deep
def test_eight_devices_give_the_numbers_of_one():
    flags = os.environ.get("XLA_FLAGS", "")
    env = {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    out = subprocess.run(
        [sys.executable, "-W", "error", "-m", "forkmerge.sharded"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
        cwd=ROOT,
    )
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert max(found["differences"]) < 1e-5
    assert found["quarter"] < 1e-5
    assert found["merged"] < 1e-5
    assert found["weights"] == 0
    assert found["collectives"] == 0
    assert found["driver"] < 1e-5
