"""The IGB experiment: rows, conventions, files, and what its users are told."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from experiments.igb import __main__ as command
from experiments.igb import report, train
from experiments.igb.config import (
    PRESETS,
    ROWS,
    SINGLE_TASK,
    TABLE_3,
    Agent,
    Config,
    Training,
)
from mtljax.data._qm9 import _SUBSET_KEYS, TARGETS
from mtljax.training import plots

SMOKE = PRESETS["smoke"][1]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up files in the layout of the real ones."""
    root = tmp_path_factory.mktemp("data")
    (root / "mulan_mtr").mkdir()
    x = RNG.normal(size=(120, 4))
    y = np.stack([x @ RNG.normal(size=4), 50 * np.sin(x[:, 0])], -1)
    np.savez(root / "mulan_mtr" / "enb.npz", x=x, y=y, y_names=np.array(["y1", "y2"]))
    (root / "qm9_subset").mkdir()
    count = 60
    z = np.zeros((count, 9), np.uint8)
    z[:, :4] = RNG.integers(6, 10, (count, 4))
    adj = np.zeros((count, 9, 9), np.uint8)
    for i in range(3):
        adj[:, i, i + 1] = adj[:, i + 1, i] = RNG.integers(1, 5, count)
    np.savez(
        root / "qm9_subset" / "qm9_graphs.npz",
        z=z,
        num_h=z % 3,
        charge=np.zeros_like(z, np.int8),
        hyb=z % 2,
        in_ring=0 * z,
        adj=adj,
        y=RNG.normal(size=(count, 19)),
        y_names=np.array([key for key, _ in _SUBSET_KEYS.values()] + list("abcdefgh")),
    )
    return root


def test_every_row_has_its_own_label():
    labels = [row.label for row in ROWS.values()]
    assert len(set(labels)) == len(labels) == 27
    assert set(TABLE_3) <= set(ROWS)


def test_presets_are_complete():
    assert set(PRESETS) == {"smoke", "cpu", "paper"}
    alone = ("linear", "random_loss_weighting", "scale_invariant", "uncertainty")
    alone += ("dwa", "igb_v1", "igb_v2", "mgda", "pcgrad", "cagrad", "imtl_g")
    for name in ("cpu", "paper"):
        config = PRESETS[name][1]
        command.check(config)
        assert config.seeds >= 3
        assert set(alone) | {"nash_mtl"} <= set(config.graph.methods)
        assert set(ROWS) == set(config.table.methods)
    for _, config in PRESETS.values():
        for data in config.data:
            settings = config.training_of(data)
            key, ones = jax.random.key(0), jnp.ones(3)
            for row in ROWS.values():  # raises where a phase lies outside the run
                train.loss_balancer(row, 3, settings, key=key, constants=ones)


def test_phases_follow_the_run():
    # The paper's NYUv2 run: 398 steps an epoch, 500 epochs.
    found = train.phases(Agent(), 398 * 500)
    assert found == mtljax.IGBPhases((398, 796), 3 * 398, 5 * 398, 398 * 500)
    assert train.phases(Agent(), 20).window == (0, 1)


def test_the_rate_is_halved_at_every_fifth():
    rate = train.learning_rate(Training(steps=100, lr=0.8))
    found = [float(rate(step)) for step in (0, 19, 21, 41, 61, 81, 99)]
    np.testing.assert_allclose(found, [0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.05], rtol=1e-6)


def row(seed, step, val, test, task="all"):
    label = {"seed": seed, "step": step, "task": task, "kind": "eval"}
    return label | {"val_mae": val, "test_mae": test, "val_score": float(np.mean(val))}


SINGLE = [
    row(0, 1, [2.0, 9.0], [1.0, 9.0], "a"),
    row(0, 2, [3.0, 9.0], [7.0, 9.0], "a"),
    row(1, 2, [4.0, 9.0], [3.0, 9.0], "a"),
    row(0, 1, [9.0, 10.0], [9.0, 20.0], "b"),
    row(1, 1, [9.0, 30.0], [9.0, 40.0], "b"),
]


def test_the_baseline_is_every_task_alone_at_its_best():
    # val_score of a single-task run is its own task's; here the mean decides alike.
    found = report.baseline(SINGLE, ["a", "b"])
    np.testing.assert_allclose(found["val_mae"], [3.0, 20.0])
    np.testing.assert_allclose(found["test_mae"], [2.0, 30.0])


def test_the_step_is_chosen_by_delta_m_on_validation():
    single = report.baseline(SINGLE, ["a", "b"])
    rows = [
        row(0, 1, [3.3, 20.0], [2.0, 33.0]),  # Δm on validation 5 %
        row(0, 2, [3.0, 21.0], [3.0, 30.0]),  # 2.5 %, though its mean error is larger
        row(1, 1, [6.0, 20.0], [2.0, 30.0]),
    ]
    chosen = report.chosen_rows(rows, single)
    assert [(r["seed"], r["step"]) for r in chosen] == [(0, 2), (1, 1)]
    np.testing.assert_allclose(chosen[0]["val_delta"], 2.5)
    table = report.make_report(
        {SINGLE_TASK: SINGLE, "linear": rows}, ["a", "b"], "mulan_mtr/x", {}
    )
    np.testing.assert_allclose(table.rows["EW"][report.DM_METRICS], [25.0, 0.0])
    np.testing.assert_allclose(table.rows["EW"]["a"], [3.0, 2.0])


def test_energies_count_as_one_task_and_print_in_mev():
    names = TARGETS
    groups = report.groups_of(names, "qm9_subset")
    assert groups == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 7]
    factors = dict(zip(names, report.factors(names, "qm9"), strict=True))
    assert factors["homo"] == factors["u0"] == 1000
    assert factors["mu"] == factors["cv"] == factors["r2"] == 1
    assert report.groups_of(["x", "y"], "mulan_mtr/enb") == [0, 1]


def test_gaps_are_relative_to_the_window():
    rows = [
        {"kind": "train", "seed": s, "step": t, "losses": [10.0 * t, 1.0]}
        for s in (0, 1)
        for t in (5, 10, 15, 20)
    ]
    found = report.gap_curve(rows, (5, 15))
    np.testing.assert_allclose(found.values[0, :, 0], np.array([5, 10, 15, 20]) / 12.5)
    # A window between two rows is covered by the row that ends after it.
    found = report.gap_curve(rows, (11, 12))
    np.testing.assert_allclose(found.values[1, :, 0], np.array([5, 10, 15, 20]) / 15)


def small(folder, **options):
    table = dataclasses.replace(SMOKE.table, hidden=(6,))
    return dataclasses.replace(SMOKE, data_dir=folder, table=table, **options)


def first_gradient(folder, method, heads):
    """Gradients of the first step of seed 0: Adam's first moment is a tenth of it."""
    config = small(folder, heads=heads, seeds=1)
    problem = train.make_problem(config, "mulan_mtr/enb")
    program = train.make_program(config, problem, method)
    state, _ = train.initial_state(config, problem, method, program)
    batch = {k: v[:32] for k, v in problem.train.items()}
    state, logged = jax.jit(jax.vmap(program.step, (0, None)))(state, batch)
    return state.opt_state[0].mu, logged["task_weights"][0]


@pytest.mark.deep
def test_heads_of_the_composition(folder):
    """Algorithm 3 leaves heads to their weighted log losses; the code does not."""
    alone, outer = first_gradient(folder, "igb_v1", "algorithm3")
    paper, both = first_gradient(folder, "igb_v1+mgda", "algorithm3")
    code, _ = first_gradient(folder, "igb_v1+mgda", "code")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    inner = both / outer
    assert np.abs(inner - 1).max() > 0.01
    for i, task in enumerate(("y1", "y2")):
        for name, grad in alone["heads"][task].items():
            close(paper["heads"][task][name], grad)
            close(code["heads"][task][name], inner[i] * grad)
    jax.tree.map(close, code["trunk"], paper["trunk"])
    kernels = [x["trunk"]["dense_0"]["kernel"] for x in (alone, paper)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_the_smoke_preset_writes_table_rows_and_plots(folder, tmp_path, capsys):
    config = small(folder, out=tmp_path / "run")
    command.main(config, "the command")
    printed = capsys.readouterr().out
    out = config.out / "mulan_mtr-enb"
    table = (out / "table.md").read_text()
    for method in config.table.methods:
        assert f"| {report.label_of(method)} |" in table
        assert report.label_of(method) in printed
    assert "`the command`" in table
    assert str(folder) not in table
    text = (out / "results.jsonl").read_text()
    assert str(folder) not in text
    about, *lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == config.seeds * (len(config.table.methods) + 2)
    assert about["config"]["table"]["steps"] == 24
    for name in ("weights", "gaps", "agent"):
        png = (out / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(png) > 5000
    # A second time without a word about it: nothing is touched.
    with pytest.raises(SystemExit) as stopped:
        run_cli(config)
    assert stopped.value.code == 1
    assert "--resume" in capsys.readouterr().err
    # Resumed, it is complete: the same rows, at once.
    run_cli(config, "--resume", "--no-plots")
    text = (out / "results.jsonl").read_text()
    again = [json.loads(x) for x in text.splitlines()][1:]
    assert [x["test_mae"] for x in again] == [x["test_mae"] for x in lines]
    assert "DIR" in (out / "table.md").read_text()


def run_cli(config: Config, *more: str):
    arguments = ["smoke", "--out", str(config.out), "--table.hidden", "6", *more]
    if config.data_dir is not None:
        arguments += ["--data-dir", str(config.data_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["igb", *arguments])
        command.cli()


def test_the_figure_of_ablations(tmp_path):
    values = {"EW": [8.0, 9.0], "IGBv2": [1.0], "IGBv2, mean reward": [5.0, 4.0, 6.0]}
    path = plots.save(report.ablation_figure(values), tmp_path / "a.png")
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--table.methods", "igb_v3"],
            "--table.methods: unknown name 'igb_v3'. Choose from linear",
        ),
        (["--table.steps", "0"], "--table.steps must be a whole number from 1"),
        (["--table.lr", "-1"], "--table.lr must be a positive number, not -1"),
        (["--table.lr", "inf"], "--table.lr must be a positive number, not inf"),
        (["--data", "schol"], "--data: unknown data set 'schol'. Choose from"),
        (["--seeds", "0"], "--seeds must be a whole number from 1 to 1000, not 0"),
        (["--table.agent.use-from", "1.5"], "--table.agent.use-from must be a number"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_bad_options_are_one_sentence(arguments, message, tmp_path, capsys):
    assert run_badly(arguments, tmp_path, capsys, message) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass --data-dir DIR with DIR/mulan_mtr/enb.npz"),
        (["--data-dir", "nowhere"], "'nowhere/mulan_mtr/enb.npz'"),
        (["--data", "qm9", "--graph.methods", "linear"], "DIR/qm9/qm9.npz"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_missing_files_are_one_sentence(arguments, message, tmp_path, capsys):
    assert run_badly(arguments, tmp_path, capsys, message) == 1


def run_badly(arguments, tmp_path, capsys, message):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, *arguments)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.jsonl"))
    return stopped.value.code


@pytest.mark.deep
def test_molecules(folder, tmp_path):
    settings = dataclasses.replace(
        SMOKE.table,
        methods=("linear", "igb_v1"),
        steps=12,
        batch_size=10,
        width=4,
        edge_width=4,
        features=4,
        eval_every=6,
        eval_size=8,
    )
    config = dataclasses.replace(
        SMOKE,
        data=("qm9_subset",),
        data_dir=folder,
        graph=settings,
        out=tmp_path / "run",
        plots=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        load = train.problems.load
        sizes = {"val_size": 10, "test_size": 10}
        patch.setattr(train.problems, "load", lambda *a, **k: load(*a, **k, **sizes))
        command.main(config, "")
    table = (tmp_path / "run" / "qm9_subset" / "table.md").read_text()
    assert "| IGBv1 |" in table
    assert "homo ↓" in table


def test_rows_beyond_a_chunk_are_evaluated_in_turn():
    x = jnp.arange(7.0)[:, None]
    for size in (3, 7, 10, 1):
        found = train.in_chunks(lambda v: 2 * v, x, size)
        np.testing.assert_array_equal(found, 2 * x)
