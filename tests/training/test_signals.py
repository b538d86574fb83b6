"""Signals inside and outside of a run, in this process."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from mtljax.training.cli import run_cli

BOTH = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)


def evaluate_and_send(number, at):
    def evaluate(state):
        if int(state.step) == at:
            os.kill(os.getpid(), number)
        return {"val_loss": jnp.float32(0.5)}

    return evaluate


@dataclasses.dataclass
class Config:
    pass


def command(monkeypatch, main):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as stop:
        run_cli(
            lambda config, command: main(), {"cpu": ("", Config())}, prog="prog",
            description="", default="cpu",
        )  # fmt: skip
    return stop.value.code


@BOTH
def test_in_the_last_evaluation(tmp_path, number, status):
    evaluate = evaluate_and_send(number, 6)
    result = toy.run(6, eval_fn=evaluate, eval_every=6, run_dir=tmp_path)
    assert (result.step, result.interrupted) == (6, True)
    assert (result.signal, result.exit_status) == (number.name, status)
    assert not toy.run(6, run_dir=tmp_path, resume=True).interrupted


def test_in_the_first_evaluation_and_again(tmp_path):
    evaluate = evaluate_and_send(signal.SIGTERM, 0)
    result = toy.run(6, eval_fn=evaluate, eval_at_start=True, run_dir=tmp_path)
    assert (result.step, result.signal) == (0, "SIGTERM")

    def twice(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        toy.run(6, eval_fn=twice, run_dir=tmp_path, resume=True)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    toy.run(2)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


@BOTH
def test_a_command_starts_no_further_run(tmp_path, monkeypatch, capsys, number, status):
    steps = []
    toy.run(2, run_dir=tmp_path / "b")
    before = sorted((tmp_path / "b").rglob("*"))

    def main():
        for name in ("a", "b"):
            evaluate = evaluate_and_send(number, 6)
            result = toy.run(
                6, eval_fn=evaluate, eval_every=6, run_dir=tmp_path / name,
                overwrite=True,
            )  # fmt: skip
            steps.append(result.step)

    assert command(monkeypatch, main) == status
    assert steps == [6, 0]
    assert sorted((tmp_path / "b").rglob("*")) == before  # not overwritten
    assert capsys.readouterr().err == f"Stopped by {number.name}.\n"


@BOTH
def test_a_command_stops_outside_of_a_run(number, status):
    """While a program is compiled, too, where an exception could crash the process."""
    code = """
import dataclasses, os, sys, threading, time
import jax, jax.numpy as jnp
from mtljax.training.cli import run_cli

@dataclasses.dataclass
class Config:
    steps: int = 1

def main(config, command):
    threading.Timer(0.5, os.kill, (os.getpid(), NUMBER)).start()
    while True:
        jax.jit(lambda x: jnp.sort(jnp.sin(x) @ jnp.cos(x).T))(jnp.ones((9, 9)))

NUMBER, sys.argv = int(sys.argv[1]), ["prog", "short"]
run_cli(main, {"short": ("Seconds.", Config())}, prog="prog", description="")
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(int(number))],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (found.returncode, found.stderr) == (status, f"Stopped by {number.name}.\n")


def test_an_error_after_a_signal_is_printed(monkeypatch, capsys):
    def main():
        toy.run(6, eval_fn=evaluate_and_send(signal.SIGINT, 6), eval_every=6)
        raise OSError("The disk is full.")

    assert command(monkeypatch, main) == 130
    said = "error: The disk is full.\nStopped by SIGINT.\n"
    assert capsys.readouterr().err == said
