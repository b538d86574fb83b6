"""``fit`` on 8 virtual devices and in two processes, each in processes of its own."""

import ast
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mesh_toy
import toy

from mtljax import training
from mtljax.training._feeds import placement_of

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    "kind", [pytest.param("Auto", marks=pytest.mark.deep), "Explicit"]
)
def test_8_devices_give_the_rows_of_one(kind):
    done = subprocess.run(
        [sys.executable, HERE / "on_devices.py", kind],
        capture_output=True, text=True, env=ENV, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok ") == 12


def start_both(folder, *args):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, HERE / "on_two_hosts.py", folder, "--port", str(port)]
    return [
        subprocess.Popen(
            [*command, "--process", str(i), *map(str, args)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
        )
        for i in range(2)
    ]  # fmt: skip


def finish(processes, statuses=(0, 0)):
    found = []
    for process, status in zip(processes, statuses, strict=True):
        out, err = process.communicate(timeout=180)
        if "gloo" in err.lower() and "not" in err and "implement" in err:
            pytest.skip("this jaxlib has no gloo collectives for the CPU")
        assert process.returncode == status, (out[-2000:], err[-3000:])
        lines = [line.split(" ", 1) for line in out.splitlines() if " " in line]
        found.append({a: b for a, b in lines if a in ("digest", "rows", "signal")})
    assert found[0] == found[1]
    return found[0]


def losses(found):
    return np.array([row[1] for row in ast.literal_eval(found["rows"]) if row[1]])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, finish(start_both(folder))


@pytest.mark.deep
def test_two_processes_give_the_rows_of_one_device(whole):
    folder, found = whole
    expected = mesh_toy.losses(mesh_toy.run())
    np.testing.assert_allclose(losses(found), expected, rtol=1e-5)
    _, rows = training.read_jsonl(folder)  # written once
    assert [r["step"] for r in rows if r["kind"] == "train"] == [4, 8, 12, 16, 20]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == list(range(2, 21, 2))


@pytest.mark.deep
def test_two_processes_feed_a_stream_together(tmp_path):
    found = finish(start_both(tmp_path, "--kind", "stream"))
    stream = {"data": mesh_toy.Stream(), "batch_size": None, "order_key": None}
    expected = mesh_toy.losses(mesh_toy.run(**stream))
    np.testing.assert_allclose(losses(found), expected, rtol=1e-5)


def wait_for(folder, count):
    rows, deadline = folder / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline:
        if rows.exists() and rows.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.02)


def test_one_of_two_processes_is_killed_and_both_start_again(tmp_path, whole):
    processes = start_both(tmp_path, "--slow", 0.2)
    wait_for(tmp_path, 5)
    processes[1].kill()
    for process in processes:  # the other one ends by itself
        process.communicate(timeout=120)
    assert processes[0].returncode != 0
    assert finish(start_both(tmp_path)) == whole[1]
    assert toy.comparable(tmp_path) == toy.comparable(whole[0])


@pytest.mark.deep
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path, whole):
    processes = start_both(tmp_path, "--slow", 0.2)
    wait_for(tmp_path, 5)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes, (143, 143))["signal"] == "SIGTERM"
    assert finish(start_both(tmp_path)) == whole[1]


@pytest.mark.deep
def test_two_processes_fall_back_to_an_older_step(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "20"
    for file in last.glob("state/**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.write_bytes(content)
    assert finish(start_both(tmp_path / "run")) == whole[1]
    assert (last.parent / "20.damaged").is_dir()
    assert toy.comparable(tmp_path / "run") == toy.comparable(whole[0])


@pytest.mark.deep
def test_a_run_of_two_processes_is_resumed_by_one(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    result = mesh_toy.run(
        24, run_dir=tmp_path / "run", resume=True,
        eval_fn=lambda state: {"sum": state["params"]["v"].sum(1)}, eval_every=2,
    )  # fmt: skip
    expected = mesh_toy.losses(mesh_toy.run(24))
    np.testing.assert_allclose(mesh_toy.losses(result), expected, rtol=1e-5)


def test_what_needs_a_mesh(monkeypatch):
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
    with pytest.raises(ValueError, match="batch_sharding needs a state on a mesh"):
        mesh_toy.run(batch_sharding=sharding)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="There are 2 processes, but the state lies"):
        placement_of(mesh_toy.init(jax.random.key(0)), training.Execution())
