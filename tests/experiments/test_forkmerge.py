"""The ForkMerge experiment: rows, files, resumption, and what its users are told."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from experiments.forkmerge import __main__ as command
from experiments.forkmerge import problem, report, train
from experiments.forkmerge.config import LABELS, PRESETS, Config

SMOKE = PRESETS["smoke"][1]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains in the layout of the real ones: bars of ink, at a place per class."""
    root = tmp_path_factory.mktemp("data")

    def bars(count, peak):
        digits = (np.arange(count) % 10).astype(np.uint8)
        images = RNG.integers(0, peak // 4 + 1, (count, 16, 16))
        images[np.arange(count), digits + 3] = peak
        return images.astype(np.uint8), digits

    for name in ("usps", "semeion"):
        (root / name).mkdir()
    (x, y), (u, v) = bars(160, 255), bars(60, 255)
    np.savez(root / "usps" / "usps.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    x, y = bars(520, 1)
    np.savez(root / "semeion" / "semeion.npz", x=x, y=y)
    return root


def small(folder, out, **options):
    options = {"plots": False, **options}
    return dataclasses.replace(SMOKE, data_dir=folder, out=out, **options)


def rows_of(config):
    text = (config.out / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_smoke_preset_writes_table_rows_and_plots(folder, tmp_path, capsys):
    config = small(folder, tmp_path / "run", plots=True)
    command.main(config, "the command")
    printed = capsys.readouterr().out
    table = (config.out / "table.md").read_text()
    for method in config.methods:
        assert f"| {LABELS[method]} |" in table
        assert LABELS[method] in printed
    assert "`the command`" in table
    lines = rows_of(config)
    assert len(lines) == 3 * 2 * 2  # methods, targets, seeds
    assert str(folder) not in json.dumps(lines) + table
    merged = [row for row in lines if row["method"] == "forkmerge"]
    assert all(row["step"] == config.steps for row in merged)
    np.testing.assert_allclose([sum(r["weights"]) for r in merged], 1, rtol=1e-5)
    assert (config.out / "weights.png").stat().st_size > 5000
    # A second time without a word about it: nothing is touched.
    with pytest.raises(SystemExit) as stopped:
        run_cli(config)
    assert stopped.value.code == 1
    assert "--resume" in capsys.readouterr().err
    # Another configuration: it is named.
    with pytest.raises(SystemExit):
        run_cli(config, "--resume", "--lr", "0.5")
    assert "lr: 0.03 -> 0.5" in capsys.readouterr().err


def run_cli(config: Config, *more: str):
    arguments = ["smoke", "--out", str(config.out), "--no-plots", *more]
    if config.data_dir is not None:
        arguments += ["--data-dir", str(config.data_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["forkmerge", *arguments])
        command.cli()


@pytest.mark.deep
@pytest.mark.parametrize("stop", ["4", "8"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_rows(folder, tmp_path, stop):
    """Also between the merge that prunes and the next checkpoint."""
    options = {
        "domains": ("usps", "semeion", "optdigits"),
        "methods": ("forkmerge_each",),
        "keep": 2,
        "eval_every": 2,
    }
    (folder / "optdigits").mkdir(exist_ok=True)
    source = np.load(folder / "usps" / "usps.npz")
    scaled = {k: v // 16 if k[0] == "x" else v for k, v in source.items()}
    np.savez(folder / "optdigits" / "optdigits.npz", **scaled)
    whole = small(folder, tmp_path / "whole", **options)
    found = problem.make_problem(whole)
    evaluate = problem.make_evaluate(found)
    expected = train.Run(whole, found, "forkmerge_each", evaluate).finish()

    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    run = train.Run(cut, found, "forkmerge_each", evaluate)
    save = run._save

    def save_and_die(state):
        save(state)
        if int(state.step) == int(stop):
            raise KeyboardInterrupt

    run._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    again = dataclasses.replace(cut, resume=True)
    rows = train.Run(again, found, "forkmerge_each", evaluate).finish()
    assert rows == expected
    assert {len(row["weights"]) for row in rows} == {2, 3}


@pytest.mark.deep
def test_every_row_learns(folder, tmp_path):
    config = small(
        folder,
        tmp_path,
        methods=tuple(LABELS),
        steps=120,
        interval=40,
        eval_every=40,
        lr=0.1,
        lambdas=(0.5, 2.0),
        seeds=1,
        plots=True,
        held_out=True,
    )
    command.main(config, "")
    rows = rows_of(config)
    assert {row["method"] for row in rows} == set(LABELS)
    for row in rows:
        assert row["test"] > 0.5, row  # chance is a tenth
    merged = [row for row in rows if row["method"] == "forkmerge"]
    assert all(np.isfinite(row["gap"]) for row in merged)
    for name in ("weights", "transfer"):
        assert (config.out / f"{name}.png").stat().st_size > 5000


def test_methods_see_the_same_data_and_start(folder, tmp_path):
    config = small(folder, tmp_path)
    found = problem.make_problem(config)
    states = [
        train.make_driver(config, found, method)[1]
        for method in ("stl", "forkmerge", "gcs")
    ]
    for state in states[1:]:
        for a, b in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(states[0].params),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(states[0].order, [[0, 1]] * 2 + [[1, 0]] * 2)


def test_what_is_reported():
    def row(method, step, val, test, **more):
        return {
            "method": method,
            "target": "usps",
            "seed": 0,
            "step": step,
            "val": val,
            "test": test,
            **more,
        }

    rows = [row("ew", 1, 0.9, 0.1), row("ew", 2, 0.8, 0.2), row("ew", 3, 0.9, 0.3)]
    assert [r["test"] for r in report.chosen(rows, "ew")] == [0.1]
    rows = [row("forkmerge", s, v, v) for s, v in ((4, 0.9), (8, 0.5))]
    assert [r["test"] for r in report.chosen(rows, "forkmerge")] == [0.5]
    config = dataclasses.replace(SMOKE, domains=("usps",), lambdas=(0.5, 1.0), steps=2)
    rows = [row("stl", 2, 0.5, 0, csd=0.1), row("stl", 1, 0.7, 0, csd=0.1)]
    rows += [
        row("lambda_grid", 2, v, 0, csd=c) | {"lambda": lam}
        for lam, v, c in ((0.5, 0.6, 0.2), (1.0, 0.4, 0.3))
    ]
    found = report.transfer(rows, config)
    np.testing.assert_allclose(found["gain"], [[0, 0.1, -0.1]], atol=1e-6)
    np.testing.assert_allclose(found["csd"], [[0.1, 0.2, 0.3]])
    assert not found["strong"][0]
    assert found["best_lambda"][0] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mgda"], "--methods: there is no 'mgda'; there are stl, ew"),
        (["--domains", "usps"], "must name a target and an auxiliary"),
        (["--domains", "usps", "usps"], "names one twice"),
        (["--steps", "0"], "--steps must be positive, not 0"),
        (["--interval", "5"], "--interval 5 must be a multiple of --eval-every 4"),
        (["--batch-size", "1"], "below the 2 domains"),
        (["--resume", "--overwrite"], "exclude each other"),
        ([], "pass --data-dir DIR with DIR/usps/usps.npz"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, *arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 1
    assert printed.startswith("error: ")
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_presets_are_complete():
    assert set(PRESETS) == {"smoke", "cpu", "paper"}
    from experiments.forkmerge.config import check

    for name in ("cpu", "paper"):
        config = PRESETS[name][1]
        check(config)
        assert set(config.methods) == set(LABELS)
        assert config.seeds >= 3
        assert config.steps % config.interval == 0
    shown = command.hidden_paths(["cpu", "--data-dir", "/x/y", "--data-dir=/z"])
    assert shown == ["cpu", "--data-dir", "DIR", "--data-dir=DIR"]
