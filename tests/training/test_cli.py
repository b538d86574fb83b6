"""The command line that experiments share."""

import dataclasses
import sys

import pytest

from mtljax.training.cli import run_cli, without_paths


@dataclasses.dataclass
class Config:
    seeds: int = 3


def start(monkeypatch, main, *arguments, default="cpu"):
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    presets = {"cpu": ("Minutes.", Config()), "smoke": ("Seconds.", Config(seeds=1))}
    run_cli(main, presets, prog="prog", description="", default=default)


def test_presets_overrides_and_the_default(monkeypatch):
    seen = []
    main = lambda config, command: seen.append((config.seeds, command))
    start(monkeypatch, main)
    start(monkeypatch, main, "--seeds", "5")
    start(monkeypatch, main, "smoke")
    assert seen == [(3, "prog cpu"), (5, "prog cpu --seeds 5"), (1, "prog smoke")]


@pytest.mark.parametrize(("arguments", "default"), [(["--help"], "cpu"), ([], None)])
def test_help(monkeypatch, capsys, arguments, default):
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, pytest.fail, *arguments, default=default)
    assert stop.value.code == 0
    assert "Minutes." in capsys.readouterr().out


def test_an_error_is_one_sentence(monkeypatch, capsys):
    def main(config, command):
        raise ValueError(f"--seeds {config.seeds} is too many.")

    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, main)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: --seeds 3 is too many.\n"
    monkeypatch.setenv("MTLJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too many"):
        start(monkeypatch, main)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["cpu", "--data-dir=/a", "--seeds", "2"], "cpu --data-dir DIR --seeds 2"),
        (["cpu", "--data-dir", "/a"], "cpu --data-dir DIR"),
        (["--out", "/b", "--resume"], "--resume"),
        (["cpu", "--report-to", "/c"], "cpu"),
    ],
)
def test_results_do_not_quote_paths(given, shown):
    assert " ".join(without_paths(given)) == shown
