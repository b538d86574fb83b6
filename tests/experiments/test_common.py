"""What experiments share: selection, statistics, reports, signals, users' data sets."""

import concurrent.futures
import dataclasses
import importlib
import math
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.common import problem, provenance, replay, report, runs
from experiments.common.config import Common
from experiments.common.problem import Scorer
from experiments.common.selection import edge_notes, search, select, select_each
from experiments.common.statistics import (
    benjamini_hochberg,
    comparison_table,
    holm,
    minimum_detectable,
    paired,
)
from mtljax import training
from mtljax.data import MISSING, Dataset, Task

ROOT = pathlib.Path(__file__).parents[2]

# --- selection ----------------------------------------------------------------------


def rows_of(table, **more):
    """``{lr: {seed: values over steps}}`` as rows."""
    return [
        {
            "kind": "eval",
            "lr": lr,
            "seed": seed,
            "step": step,
            "val_score": v,
            **more,
        }
        for lr, seeds in table.items()
        for seed, values in seeds.items()
        for step, v in enumerate(values, 1)
    ]


def test_the_earliest_of_equal_steps_and_the_smaller_of_equal_rates():
    choice = select(rows_of({0.3: {0: [0.5, 0.7, 0.7]}, 0.1: {0: [0.7, 0.1, 0.2]}}))
    assert (choice.lr, choice.edge) == (0.1, "low")
    assert [row["step"] for row in choice.rows] == [1]
    assert [row["step"] for row in choice.last] == [3]
    choice = select(rows_of({0.3: {0: [0.5, 0.7, 0.7]}}))
    assert (choice.rows[0]["step"], choice.edge) == (2, None)


def test_a_rate_with_a_diverged_seed_is_the_last_choice():
    table = {0.1: {0: [0.2], 1: [0.2]}, 0.3: {0: [0.9], 1: [math.nan]}}
    assert select(rows_of(table)).lr == 0.1
    table[0.3][1] = [None]
    assert select(rows_of(table)).lr == 0.1
    everything = {0.1: {0: [None]}, 0.3: {0: [None]}}
    assert select(rows_of(everything)).lr == 0.1


def test_test_metrics_are_never_read():
    class Blind(dict):
        def __getitem__(self, key):
            assert not key.startswith("test_")
            return super().__getitem__(key)

    rows = [Blind(row, test_acc=math.nan) for row in rows_of({0.1: {0: [0.1, 0.2]}})]
    assert select(rows).rows[0]["step"] == 2


def test_groups_choose_rates_of_their_own_and_less_can_be_better():
    rows = rows_of({0.1: {0: [0.9]}, 0.3: {0: [0.5]}}, task="a")
    rows += rows_of({0.1: {0: [0.4]}, 0.3: {0: [0.5]}}, task="b")
    assert [row["lr"] for row in select_each(rows)] == [0.1, 0.3]
    assert [row["lr"] for row in select_each(rows, maximise=False)] == [0.3, 0.1]
    assert select_each(rows, last_step=0) == []


def test_ends_of_a_grid_and_late_steps_are_noted():
    table = {lr: {0: [0.1, 0.2, 0.3, lr]} for lr in (1.0, 2.0, 3.0)}
    choice = select(rows_of(table))
    assert (choice.edge, choice.late) == ("high", 1.0)
    notes = edge_notes({"sum": choice, "middle": choice._replace(edge=None, late=0.5)})
    assert len(notes) == 2
    assert all(note.endswith(": sum.") for note in notes)


# --- statistics: values of scipy and statsmodels -------------------------------------


def test_a_paired_comparison():
    a = [77.64, 78.10, 76.90, 78.30, 77.25]
    b = [78.48, 79.05, 77.10, 79.40, 78.60]
    found = paired(a, b)
    wanted = (0.888, 0.4295, 5, 0.009858, 0.354706, 1.421294)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
    narrow = paired(a, b, level=0.9)
    np.testing.assert_allclose(narrow[-2:], (0.478519, 1.297481), rtol=1e-5)
    same = paired(a, a)
    assert np.isnan(same.p)
    assert (same.low, same.high) == (0, 0)
    many = paired(np.stack([a, a], 1), np.stack([b, a], 1))
    np.testing.assert_allclose(many.p, [0.009858, np.nan], rtol=1e-4)
    with pytest.raises(ValueError, match="at least two seeds, not 1"):
        paired([1.0], [2.0])


def test_corrections_for_many_comparisons():
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216]
    wanted = [0.01, 0.072, *[0.312] * 5, *[0.615] * 3]
    np.testing.assert_allclose(holm(p), wanted, rtol=1e-9)
    wanted = [0.01, 0.04, 0.084, 0.084, 0.084, 0.1, 0.105714, 0.216, 0.216, 0.216]
    np.testing.assert_allclose(benjamini_hochberg(p), wanted, rtol=1e-5)
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(holm(np.array(p)[order]), holm(p)[order])


def test_the_minimum_detectable_effect_is_near_the_noncentral_one():
    for n, exact in ((5, 1.682), (10, 0.996), (20, 0.6604)):
        assert abs(minimum_detectable(n) / exact - 1) < 0.02


# --- files and signals ----------------------------------------------------------------


def test_rows_come_back_without_the_paths_of_a_machine(tmp_path):
    config = Common(data_dir=tmp_path / "secret", out=tmp_path / "out")
    path = report.write_rows(
        tmp_path / "r" / "results.jsonl", config, [{"a": 1}], set="x"
    )
    head, rows = report.read_rows(path)
    assert (head["kind"], head["set"], rows) == ("header", "x", [{"a": 1}])
    assert head["config"]["seeds"] == 3
    assert "secret" not in path.read_text()


def test_overwriting_leaves_the_files_of_others(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "analysis.json", "notes.txt"):
        (folder / name).write_text('{"kind": "header"}')
    runs.prepare(Common(overwrite=False), [folder], extra=("analysis.json",))
    assert len(list(folder.iterdir())) == 4
    runs.prepare(Common(overwrite=True), [folder], extra=("analysis.json",))
    assert {path.name for path in folder.iterdir()} == {".lock", "notes.txt"}
    with (
        training.lock_run(folder),
        pytest.raises(training.RunLockedError, match="is in use by process"),
    ):
        runs.prepare(Common(overwrite=True), [folder])


def environment():
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.parametrize("name", ["multidigits", "forkmerge"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_while_importing_is_one_line(name, number, status):
    command = [sys.executable, "-m", f"experiments.{name}", "smoke"]
    run = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    time.sleep(0.6)  # python is up; jax takes longer
    run.send_signal(number)
    _, printed = run.communicate(timeout=60)
    assert run.returncode == status
    assert "Traceback" not in printed
    assert len(printed.splitlines()) <= 1


@pytest.mark.deep
@pytest.mark.parametrize(
    ("command", "number", "text"),
    [
        (["multidigits", "smoke", "--steps", "1000000"], signal.SIGTERM, "step 1/"),
        (
            ["forkmerge", "smoke", "--data", "own:shapes", "--domains", "a", "b"],
            signal.SIGINT,
            "writing to",
        ),
    ],
)
def test_a_signal_while_training_is_its_status(command, number, text, tmp_path):
    name, *options = command
    (tmp_path / "own.py").write_text(MINE)
    environ = environment()
    environ["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    run = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            f"experiments.{name}",
            *options,
            "--out",
            tmp_path / "run",
        ],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert run.stdout is not None
    while text not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(1)
    run.send_signal(number)
    _, printed = run.communicate(timeout=300)
    assert run.returncode == 128 + number
    assert "Traceback" not in printed
    assert "Stopped by" in printed


# --- grids and differences ------------------------------------------------------------


def at_rates(best):
    """Rows of two seeds whose score falls with the distance to the best rate."""
    score = lambda lr: -abs(np.log(lr / best))
    return lambda rates: [
        {"seed": seed, "lr": lr, "step": 1, "val_score": score(lr)}
        for lr in rates
        for seed in (0, 1)
    ]


def test_an_end_of_the_grid_extends_it_for_all_rows():
    calls = []

    def train(rates):
        calls.append(list(rates))
        return {"a": at_rates(0.27)(rates), "b": at_rates(0.03)(rates)}

    found, choices, grid = search(train, select, (0.01, 0.03))
    assert calls == [[0.01, 0.03], [0.09], [0.27]]  # "a" chose the end twice
    assert grid == [0.01, 0.03, 0.09, 0.27]
    assert {name: choice.lr for name, choice in choices.items()} == {
        "a": 0.27,
        "b": 0.03,
    }
    assert choices["a"].edge == "high"  # still the end after all extensions
    assert {len(rows) for rows in found.values()} == {8}
    calls.clear()
    assert search(train, select, (0.01, 0.03), 0)[2] == [0.01, 0.03]
    assert len(calls) == 1
    # Both ends at once, and no extension where nothing chose an end.
    train = lambda rates: {"a": at_rates(1e-3)(rates), "b": at_rates(0.3)(rates)}
    assert search(train, select, (0.01, 0.03), 1)[2] == [0.00333333, 0.01, 0.03, 0.09]
    train = lambda rates: {"a": at_rates(0.03)(rates)}
    assert search(train, select, (0.01, 0.03, 0.1))[2] == [0.01, 0.03, 0.1]


def test_a_table_of_differences_has_intervals_and_holms_p():
    a = np.array([77.64, 78.10, 76.90, 78.30, 77.25])
    b = np.array([78.48, 79.05, 77.10, 79.40, 78.60])
    text = comparison_table({"b - a": (a, b), "a - a": (a, a)})
    row = "| b - a | +0.89 | [+0.35, +1.42] | 0.0099 | 0.02 | 5 |"
    assert row in text.splitlines()
    assert "| a - a | +0.00 | [+0.00, +0.00] | nan | 1 | 5 |" in text
    assert comparison_table({"one": (a[:1], b[:1])}) == ""


# --- data sets of users ---------------------------------------------------------------

MINE = """
import numpy as np
from mtljax.data import Dataset, Task

def shapes(domain="a"):
    def split(n):
        rng = np.random.default_rng([n, ord(domain)])
        x = rng.normal(size=(n, 6, 1, 1)).astype(np.float32)
        left, right = (x[:, i, 0, 0] > 0 for i in (0, 1))
        return {"image": x, "left": left.astype(int), "right": right.astype(int)}
    tasks = (Task("left", "classification", 2), Task("right", "classification", 2))
    return Dataset("shapes", tasks, (6, 1, 1), *map(split, (240, 80, 90)), image_max=1)
"""
NUMBERS = MINE.replace("shapes", "sums").replace('classification", 2', 'regression", 1')
NUMBERS = NUMBERS.replace("> 0 for", "* 2 for").replace("int)", "np.float32)")
SMALL = {
    "multidigits": {"methods": ("mgda",), "steps": 4, "train_size": None},
    "fs_mtl": {},
    "igb": {},
    "alternating": {},
    "trajectories": {},
    "forkmerge": {"parts": ("table",), "domains": ("a", "b"), "methods": ("stl",)},
}


@pytest.mark.parametrize(
    "name",
    ["multidigits", *(pytest.param(n, marks=pytest.mark.deep) for n in [*SMALL][1:])],
)
def test_a_data_set_of_a_user(name, tmp_path, monkeypatch):
    """In at most fifteen lines, and in every experiment."""
    assert len(MINE.strip().splitlines()) <= 15
    (tmp_path / "users_own.py").write_text(MINE + NUMBERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    data = "users_own:sums" if name == "igb" else "users_own:shapes"
    command = importlib.import_module(f"experiments.{name}.__main__")
    settings = importlib.import_module(f"experiments.{name}.config")
    config = settings.PRESETS["smoke"][1]
    option = {"fs_mtl": "sets", "alternating": "sets", "trajectories": "settings"}
    value = (data,) if name in option or name == "igb" else data
    more = dict(SMALL[name])
    if name == "fs_mtl":
        more |= {f"{part}_size": None for part in ("train", "val", "test")}
    if name == "alternating":
        more["other"] = dataclasses.replace(config.digits, batch_size=16)
    if name == "trajectories":
        more["other"] = dataclasses.replace(config.cmu_faces, batch_size=16)
    config = dataclasses.replace(
        config, out=tmp_path / "out", plots=False, **{option.get(name, "data"): value},
        **more,
    )  # fmt: skip
    command.main(config, "x")
    (path,) = (tmp_path / "out").rglob("results.jsonl")
    _, rows = report.read_rows(path)
    assert rows
    assert {row["seed"] for row in rows if "seed" in row} == {0, 1}


def test_the_example_of_the_page_is_a_data_set(tmp_path, monkeypatch):
    page = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    found = problem.load(Common(), "mine:shapes")
    assert [len(part["image"]) for part in (found.train, found.val, found.test)] == [
        2000, 500, 500,
    ]  # fmt: skip


def test_missing_labels_are_masked():
    label = np.array([0, MISSING, 1, MISSING])
    target = np.array([1.0, np.nan, 3.0, np.nan], np.float32)
    split = {"image": np.zeros((4, 2, 1, 1)), "kind": label, "size": target}
    tasks = (Task("kind", "classification", 2), Task("size", "regression", 1))
    made = Dataset("gaps", tasks, (2, 1, 1), split, split, split)
    out = np.array([[2.0, 0], [9, 9], [0, 2], [-9, 9]], np.float32)
    kind, size = (Scorer(made, task) for task in tasks)
    assert kind.masked
    assert size.masked
    expected = np.log(1 + np.exp(-2.0))
    np.testing.assert_allclose(kind.loss(out, label), expected, rtol=1e-6)
    assert kind.scores(out, label)["kind_acc"] == 1
    predicted = np.array([[2.0], [5], [3], [5]], np.float32)
    np.testing.assert_allclose(size.loss(predicted, target), 0.5, rtol=1e-6)
    np.testing.assert_allclose(size.scores(predicted, target)["size_mae"], 0.5)
    np.testing.assert_allclose(size.scores(predicted, target)["size_r2"], 0.5)


@pytest.mark.skipif(
    not (ROOT / "experiments" / "igb" / "results").is_dir(),
    reason="the sdist has no rows",
)
def test_every_experiment_names_a_committed_row_to_replay():
    for name in replay.NAMES:
        module = importlib.import_module(f"experiments.{name}.replay")
        folder = ROOT / "experiments" / name / "results"
        head, rows = report.read_rows(folder / module.RESULTS)
        assert head["kind"] in ("about", "header")
        assert head["config"]["seeds"] >= module.CONFIG.seeds  # the first ones
        labels = {tuple(str(row.get(key)) for key in module.KEYS) for row in rows}
        assert len(labels) == len(rows) >= module.LINES > 0


def test_a_replay_sees_every_number():
    old = {"a": [1.0, [2.0, None]], "kind": "eval", "seconds": 3.0}
    assert replay.difference(old, old | {"seconds": 9.0, "b": 1}) == 0
    assert replay.difference(old, old | {"a": [1.0, [2.25, None]]}) == 0.25
    for other in ([1.0, [2.0, 3.0]], [1.0, [2.0]], None):
        assert replay.difference(old, old | {"a": other}) == math.inf


def test_a_replay_has_the_flags_and_cores_of_the_committed_rows():
    head = {"xla_flags": "--xla_dump_to=", "device": "1 x cpu (cpu)", "cores": 1}
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), replay.prepare, (head,)
    ) as process:
        flags = [process.submit(os.getenv, x) for x in ("XLA_FLAGS", "JAX_PLATFORMS")]
        cores = process.submit(provenance.usable_cores)
        assert [x.result() for x in flags] == [head["xla_flags"], "cpu"]
        if hasattr(os, "sched_setaffinity"):
            assert cores.result() == 1


def test_a_replay_says_what_is_missing(capsys):
    for names, status in ((["nothing"], 2), (["igb"], 1)):
        with pytest.raises(SystemExit) as stopped:
            replay.main(None, names)
        assert stopped.value.code == status
        assert {1: "pass --data-dir DIR", 2: "nothing"}[
            status
        ] in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.deep
@pytest.mark.parametrize("name", replay.NAMES)
def test_a_committed_row_comes_again(name, tmp_path):
    folder = pathlib.Path(os.environ.get("MTLJAX_DATA_DIR", "nowhere"))
    if not folder.is_dir():
        pytest.skip("no real data sets: set MTLJAX_DATA_DIR")
    assert max(replay.replay_apart(name, folder, tmp_path)) <= 1e-6
