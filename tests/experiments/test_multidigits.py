"""The main job: floors, reproducibility, files, and what its users are told."""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.selection import select
from experiments.multidigits import __main__ as command
from experiments.multidigits import report, train
from experiments.multidigits.config import CLASSICS, PRESETS, SINGLE_TASK, Config
from mtljax import training

SMOKE = PRESETS["smoke"][1]
SMALL = dataclasses.replace(
    SMOKE, hidden=(96,), steps=400, train_size=3000, eval_size=500, lrs=(3e-3,)
)


@functools.cache
def problem(config=SMALL):
    return train.make_problem(config)


def run(config, method):
    """Final states [S, ...] and metrics [steps, S, ...] of all runs of a method."""
    program = train.make_program(config, problem(), method)
    state, order = train.initial_state(config, problem(), method, program)
    chunk = training.make_chunk(
        program.step, batch_size=config.batch_size, chunk=config.steps, seeds=True
    )
    return chunk(state, problem().train, order, 0, config.steps)


@functools.cache
def trained(method):
    return run(dataclasses.replace(SMALL, seeds=1), method)


BY_DEFAULT = {"linear", "uncertainty", "pcgrad", "cagrad", "nash_mtl"}  # others in deep


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in BY_DEFAULT else pytest.mark.deep)
        for m in CLASSICS
    ],
)
def test_every_method_beats_the_majority_class_by_far(method):
    state, metrics = trained(method)
    assert jnp.isfinite(metrics["losses"]).all()
    found = problem().evaluate(state)
    for split in ("val", "test"):
        labels = getattr(problem().dataset, split)
        for task in ("left", "right"):
            majority = np.bincount(labels[task]).max() / len(labels[task])
            assert majority < 0.15
            assert found[f"{split}_{task}_acc"][0] > 0.45
        assert found[f"{split}_ink_r2"][0] > 0.2  # the mean predicts 0


def test_a_seed_gives_the_same_bits_again():
    again = run(dataclasses.replace(SMALL, seeds=1), "pcgrad")
    chex.assert_trees_all_equal(_data(trained("pcgrad")), _data(again))


def _data(tree):
    def plain(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return jax.tree.map(plain, tree)


def test_seeds_and_learning_rates_are_vmap_axes():
    rates = (1e-3, 3e-3)
    config = dataclasses.replace(SMALL, steps=20, seeds=2, lrs=rates)
    _, many = run(config, "cagrad")
    for i, (lr, seed) in enumerate(itertools.product(rates, (0, 1))):
        one = dataclasses.replace(config, seeds=1, first_seed=seed, lrs=(lr,))
        _, alone = run(one, "cagrad")
        np.testing.assert_allclose(
            many["losses"][:, i], alone["losses"][:, 0], rtol=2e-4
        )


def test_the_smoke_preset_writes_table_rows_and_plots(tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run", time_steps=2)
    command.main(config, "the command")
    printed = capsys.readouterr().out
    table = (config.out / "table.md").read_text()
    for method in config.methods:
        assert f"| {report.label_of(method)} |" in table
        assert report.label_of(method) in printed
    assert "single task" in table
    assert "`the command`" in table
    about, *lines = [json.loads(x) for x in rows_of(config)]
    assert len(lines) == config.seeds * (len(config.methods) + 3)
    assert about["config"]["steps"] == 12
    assert about["versions"]["jax"]
    for name in ("losses", "weights", "cosines", "tradeoff"):
        png = (config.out / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(png) > 5000
    # A second time without a word about it: nothing is touched.
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run_cli(config)
    assert stopped.value.code == 1
    assert "--resume" in capsys.readouterr().err
    after = {p: p.stat().st_mtime_ns for p in config.out.rglob("*") if p.is_file()}
    assert before == after
    # Resumed, it is complete: the same rows.
    run_cli(config, "--resume", "--no-plots")
    again = [json.loads(x) for x in rows_of(config)][1:]
    assert [x["test_left_acc"] for x in again] == [x["test_left_acc"] for x in lines]
    capsys.readouterr()
    # With another configuration, the field is named and nothing is lost.
    with pytest.raises(SystemExit):
        run_cli(config, "--resume", "--lrs", "0.5")
    assert "lrs" in capsys.readouterr().err


def rows_of(config: Config):
    return (config.out / "results.jsonl").read_text().splitlines()


def run_cli(config: Config, *more: str):
    arguments = ["smoke", "--out", str(config.out), "--time-steps", "0", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["multidigits", *arguments])
        command.cli()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "cagrd"],
            "no method has the name 'cagrd'; did you mean 'cagrad'",
        ),
        (
            ["--steps", "0"],
            "--steps must be a whole number from 1 to 2147483647",
        ),
        (["--lrs", "-1"], "--lrs must be a positive number, not -1"),
        (["--lrs", "nan"], "--lrs must be a positive number, not nan"),
        (["--hidden", "-3"], "--hidden must be a whole number from 1 to 65536, not -3"),
        (["--train-size", "-1"], "--train-size must be a whole number from 1"),
        (["--seeds", "9" * 20], "--seeds must be a whole number from 1 to 1000, not 9"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--batch-size", "100000"], "--batch-size 100000 is more than the 512"),
        (["--data", "multi_mist"], "unknown data set 'multi_mist'"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, *arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "multi_mnist"], "--data-dir"),
        (["--data", "multi_mnist", "--data-dir", "/nowhere"], "/nowhere"),
        (["--data", "no_such_module:f"], "No module named 'no_such_module'"),
        (["--model", "lenet"], "12"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_faults_of_the_data_are_one_sentence(arguments, message, tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, *arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 1
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_typing_error_names_the_option(capsys, tmp_path):
    config = dataclasses.replace(SMOKE, out=tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, "--learning-rte", "1")
    assert stopped.value.code == 2
    assert "--learning-rte" in capsys.readouterr().err


def test_the_learning_rate_is_chosen_by_validation():
    def row(seed, lr, step, val, test):
        label = {"seed": seed, "lr": lr, "task": "all", "kind": "eval"}
        return label | {"step": step, "val_score": val, "test_left_acc": test}

    rows = [
        row(0, 0.1, 1, 0.5, 0.99),
        row(0, 0.1, 2, 0.6, 0.50),
        row(1, 0.1, 1, 0.2, 0.99),
        row(0, 0.2, 1, 0.55, 0.40),
        row(1, 0.2, 2, 0.55, 0.30),
        row(1, 0.2, 1, 0.54, 0.98),
    ]
    chosen = select(rows).rows
    assert [(r["seed"], r["lr"], r["step"]) for r in chosen] == [
        (0, 0.2, 1),
        (1, 0.2, 2),
    ]


def test_single_task_rows_come_from_the_run_on_that_task():
    def row(task, seed, left, right):
        values = {"test_left_acc": left, "test_right_acc": right}
        label = {"seed": seed, "lr": 0.1, "task": task, "kind": "eval", "step": 1}
        return label | {"val_score": 0.5} | values

    rows = [row("left", 0, 0.9, 0.1), row("right", 0, 0.2, 0.8)]
    columns = {"left_acc": 0, "right_acc": 1}
    found = report.values_of(SINGLE_TASK, rows, columns, ["left", "right"])
    assert found == {"left_acc": [0.9], "right_acc": [0.8]}


@pytest.mark.data
def test_multimnist_from_files(tmp_path):
    folder = pathlib.Path(_data_dir())
    config = dataclasses.replace(
        SMOKE, data="multi_mnist", data_dir=folder, out=tmp_path, methods=("mgda",)
    )
    command.main(config, "")
    assert "MGDA" in (tmp_path / "table.md").read_text()


def _data_dir():
    import os

    folder = os.environ.get("MTLJAX_DATA_DIR")
    fallback = pathlib.Path(__file__).parents[3] / "shared" / "data"
    folder = pathlib.Path(folder) if folder else fallback
    if not (folder / "mnist").is_dir():
        pytest.skip(f"no mnist/ in {folder}; set MTLJAX_DATA_DIR")
    return folder
