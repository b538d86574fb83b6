"""Runs in processes of their own, stopped by signals."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from mtljax import training

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def start(*args):
    command = [sys.executable, "-W", "error", toy.__file__, *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    out, err = start(run_dir).communicate(timeout=60)
    assert not err
    return run_dir, out


def wait_for_rows(run_dir, count, process):
    deadline = time.monotonic() + 40
    path = run_dir / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.01)


def test_output_off_a_terminal_is_plain_lines(uninterrupted):
    _, out = uninterrupted
    assert "toy: step 60/60 (100%)" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_kill_9_at_any_instant(tmp_path, uninterrupted):
    whole_dir, whole_out = uninterrupted
    rng, kills, out = random.Random(0), 0, ""
    for _ in range(30):
        process = start(tmp_path, "--resume", "auto")
        rows = tmp_path / "metrics.jsonl"
        have = rows.read_bytes().count(b"\n") if rows.exists() else 0
        if kills < 4:
            wait_for_rows(tmp_path, have + rng.randrange(2, 9), process)
            time.sleep(rng.uniform(0, 0.15))  # a save takes about 0.05 s
            process.kill()
        out, err = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, err
        kills += 1
    assert kills >= 3
    assert out.splitlines()[-1] == whole_out.splitlines()[-1]  # the digest
    assert toy.comparable(tmp_path) == toy.comparable(whole_dir)
    names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert all(name.isdecimal() for name in names)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_sets_the_exit_status(
    tmp_path, uninterrupted, number, status
):
    process = start(tmp_path, "--slow", 0.05)
    wait_for_rows(tmp_path, 5, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert not err
    last = out.splitlines()[-1] if "Stopped" in out.splitlines()[-1] else out
    assert f"Stopped by {number.name} after step" in last
    assert "the same command with --resume continues it" in last
    steps = training.Checkpointer(tmp_path / "checkpoints").steps()
    assert f"step {steps[-1]} of 60" in last
    if number == signal.SIGINT:  # the rest is the same
        return
    out, _ = start(tmp_path, "--resume").communicate(timeout=60)
    assert out.splitlines()[-1] == uninterrupted[1].splitlines()[-1]
    assert toy.comparable(tmp_path) == toy.comparable(uninterrupted[0])


@pytest.mark.parametrize("how", [("--resume", "auto"), ("--overwrite",)])
def test_two_starts_in_one_directory(tmp_path, uninterrupted, how):
    first = start(tmp_path, "--slow", 0.05, *how)
    wait_for_rows(tmp_path, 3, first)
    first.send_signal(signal.SIGSTOP)  # it must not finish before the other starts
    out, err = start(tmp_path, *how).communicate(timeout=60)
    first.send_signal(signal.SIGCONT)
    assert err.count("\n") == 1
    assert f"{tmp_path} is in use by process {first.pid} on " in err
    out, err = first.communicate(timeout=90)
    assert (first.returncode, err) == (0, "")
    assert out.splitlines()[-1] == uninterrupted[1].splitlines()[-1]
    assert toy.comparable(tmp_path) == toy.comparable(uninterrupted[0])


DISK = """
import resource, sys
import jax, toy, jax.numpy as jnp
from mtljax import training
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
w = jax.random.normal(jax.random.key(0), (20, 50_000))
# Many arrays: the first failure closes the event loop that the others report to.
state = {"w": list(w), "n": jnp.int32(0)}
step = lambda s, b: ({**s, "n": s["n"] + 1}, {"losses": b["x"].mean()[None]})
try:
    toy.run(20, state=state, step=step, task_names=None, eval_fn=None, select=None,
            eval_every=None, run_dir=sys.argv[1], checkpoint_every=4)
except training.TrainingError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "what"), [(100, "metrics"), (60_000, "checkpoint")])
def test_a_full_disk_is_one_sentence(tmp_path, limit, what):
    done = subprocess.run(
        [sys.executable, "-c", DISK, tmp_path, str(limit)],
        capture_output=True, text=True, timeout=300, check=True,
        env={
            **ENV,
            "PYTHONPATH": f"{ENV['PYTHONPATH']}:{Path(__file__).parent}",
            "JAX_ENABLE_COMPILATION_CACHE": "0",
        },
    )  # fmt: skip
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert what in done.stdout
    assert "File too large" in done.stdout


@pytest.mark.deep
def test_a_hundred_runs_with_three_hundred_interruptions():
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "interruptions.py"],
        capture_output=True, text=True, env=ENV, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    total = next(line for line in done.stdout.splitlines() if "interruptions" in line)
    assert int(total.split()[2]) >= 300


def test_importing_the_package_stays_cheap():
    code = (
        "import sys, mtljax.training; "
        "heavy = {'orbax.checkpoint', 'rich', 'matplotlib', 'grain', 'tensorboardX', "
        "'flax'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )
    assert out.stdout.strip() == "[]", out.stderr
