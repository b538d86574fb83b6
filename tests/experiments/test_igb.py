"""The IGB experiment: rows, conventions, files, and what its users are told."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtljax
from experiments.common import claims
from experiments.igb import __main__ as command
from experiments.igb import report, train
from experiments.igb.config import (
    PRESETS,
    ROWS,
    SINGLE_TASK,
    TABLE,
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
    assert len(set(labels)) == len(labels)
    assert set(TABLE) <= set(ROWS)


def test_claims_read_rows_of_the_presets():
    """Every label of a claim is a row, and every set of its lines is trained."""
    known = {name: {ROWS[m].label for m in TABLE} for name in ("cpu", "large", "gpu")}
    paper = claims.load_claims(claims.claims_path("igb"))
    for claim in paper.entries:
        sets = claim.where["data"]
        if sets == "qm9":
            methods = PRESETS["qm9"][1].graph.methods
            labels = {ROWS[method].label for method in methods}
            assert {*claim.row, *claim.against} <= labels, claim.id
            continue
        for name, labels in known.items():
            assert {*claim.row, *claim.against} <= labels, claim.id
            assert set(sets) <= set(PRESETS[name][1].data)
    cpu = PRESETS["cpu"][1]
    splits = {c.scope for c in paper.entries if "tables" in c.scope}
    assert splits == {f"six tables, MLP 64-64, {cpu.seeds} splits"}


def made_up_lines(data, names, signal=0.9):
    """Claim lines of two rows and three seeds on a set; IGBv1 is 10 % better."""
    errors = {"linear": (10.0, 10.0, 10.0), "igb_v1": (8.9, 9.0, 9.1)}
    found: dict = {
        method: [row(s, 1, [v] * 2, [v] * 2) for s, v in enumerate(values)]
        for method, values in errors.items()
    }
    found[SINGLE_TASK] = [row(0, 1, [8.0] * 2, [8.0] * 2, name) for name in names]
    values = report.Values(found, names)
    by_seed = data.startswith("mulan_mtr")
    problem = SimpleNamespace(name=data, by_seed=by_seed, signal=[signal] * 3)
    return report.claim_lines(values, problem, {"linear": [1.0] * 3})


def test_lines_have_the_metrics_of_the_claims():
    lines = made_up_lines("mulan_mtr/enb", ["y1", "y2"])
    mine = [x for x in lines if x["row"] == "IGBv1" and x["column"] == "last"]
    np.testing.assert_allclose(
        [x["delta_m"] for x in mine], [11.25, 12.5, 13.75], rtol=1e-5
    )
    np.testing.assert_allclose([x["signal_r2"] for x in mine], 0.9)
    ratios = {x["row"]: x.get("step_ratio") for x in lines}
    assert ratios == {"single task": None, "EW": 1.0, "IGBv1": None}
    # Energies of molecules in meV.
    lines = made_up_lines("qm9", ["u0", "mu"])
    paper = claims.load_claims(claims.claims_path("igb"))
    found = {d.claim.id: d for d in claims.decide(paper, lines)}
    energies = found["igb.qm9-energies"].evidence
    assert energies is not None
    np.testing.assert_allclose(energies.mean, 1000)
    assert found["igb.igb1-over-si"].evidence is None


def test_presets_are_complete():
    assert set(PRESETS) == {"smoke", "cpu", "large", "molecules", "gpu", "qm9"}
    for name in ("cpu", "large", "gpu"):
        config = PRESETS[name][1]
        command.check(config)
        assert config.seeds >= 5
        compared = {method for pair in report.COMPARED for method in pair}
        assert compared <= set(config.table.methods)
        assert len(config.data) >= 6
        # The paper's buffer: a twentieth of the run, and its cadence.
        agent = config.table.agent
        assert agent.period == 50
        assert agent.capacity <= config.table.steps / 10
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
    rate = train.learning_rate(Training(steps=100))
    found = [float(rate(step)) for step in (0, 19, 21, 41, 61, 81, 99)]
    np.testing.assert_allclose(
        found, [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], rtol=1e-6
    )


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
    chosen = report.choose(rows, single).rows
    assert [(r["seed"], r["step"]) for r in chosen] == [(0, 2), (1, 1)]
    np.testing.assert_allclose(chosen[0]["val_delta"], 2.5)
    values = report.Values({SINGLE_TASK: SINGLE, "linear": rows}, ["a", "b"])
    table = report.make_report(values, "mulan_mtr/x")
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


def small(folder, **options):
    table = dataclasses.replace(SMOKE.table, hidden=(6,))
    return dataclasses.replace(SMOKE, data_dir=folder, table=table, **options)


def first_gradient(folder, method, heads):
    """Gradients of the first step of seed 0: Adam's first moment is a tenth of it."""
    config = small(folder, heads=heads, seeds=1)
    problem = train.make_problem(config, "mulan_mtr/enb")
    program = train.make_program(config, problem, method)
    runs = train.runs_of(config, problem, method, (1.0,))
    state, _ = train.initial_state(problem, method, program, runs)
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
    # At the chosen and the last step; two tasks alone at the chosen one.
    assert len(lines) == config.seeds * (2 * len(config.table.methods) + 2)
    assert len(about["signal_r2"]) == config.seeds
    assert all(0 < x["signal_r2"] < 1 for x in lines if x["row"] != "single task")
    assert about["config"]["table"]["steps"] == 24
    png = (out / "rows.png").read_bytes()
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
    values = {"EW": [8.0, 9.0], "IGBv2": [1.0, 2.0], "IGBv2, mean reward": [5.0, 4.0]}
    path = plots.save(report.rows_figure(values), tmp_path / "a.png")
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--table.methods", "igb_v3"],
            "--table.methods: unknown name 'igb_v3'. Choose from linear",
        ),
        (["--table.steps", "0"], "--table.steps must be a whole number from 1"),
        (["--table.lrs", "-1"], "--table.lrs must be a positive number, not -1"),
        (["--table.lrs", "inf"], "--table.lrs must be a positive number, not inf"),
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


def test_times_are_ratios_of_a_run_to_the_reference(folder):
    config = small(folder, seeds=2)
    problem = train.make_problem(config, "mulan_mtr/enb")
    found = train.run_times(config, problem, "igb_v1", "linear")
    assert len(found) == 2
    assert all(0 < ratio < 1000 for ratio in found)


def test_rows_beyond_a_chunk_are_evaluated_in_turn():
    x = jnp.arange(7.0)[:, None]
    for size in (3, 7, 10, 1):
        found = train.in_chunks(lambda v: 2 * v, x, size)
        np.testing.assert_array_equal(found, 2 * x)


def test_targets_keep_the_ratios_of_their_units_and_splits_are_of_seeds(folder):
    config = small(folder, seeds=3)
    problem = train.make_problem(config, "mulan_mtr/enb")
    y = np.load(folder / "mulan_mtr" / "enb.npz")["y"]
    ratio = y[:, 1].std() / y[:, 0].std()
    units = np.asarray(problem.units)
    np.testing.assert_allclose(units[:, 1] / units[:, 0], ratio, rtol=0.15)
    np.testing.assert_allclose((units**2).mean(1), 1, rtol=1e-5)
    assert problem.train["image"].shape[1] == 3
    images = np.asarray(problem.train["image"])
    assert np.abs(images[:, 0] - images[:, 1]).max() > 0.1
    # A linear target, and one that is nearly so.
    assert (np.asarray(problem.signal) > 0.5).all()
    # The static weights are those of standardised targets.
    program = train.make_program(config, problem, "static")
    runs = train.runs_of(config, problem, "static", (0.1,))
    state, _ = train.initial_state(problem, "static", program, runs)
    np.testing.assert_array_equal(state.split, [0, 1, 2])
    product = np.asarray(state.constants) * units**2
    np.testing.assert_allclose(product[:, 0], product[:, 1], rtol=1e-4)
    np.testing.assert_allclose(state.constants.sum(1), 2, rtol=1e-5)


@pytest.mark.deep
def test_the_frozen_agent_acts_and_does_not_learn(folder):
    """Its actor is the first one at the end; the trained one's is another."""
    config = small(folder, seeds=1)
    problem = train.make_problem(config, "mulan_mtr/enb")
    batch = {k: v[:32] for k, v in problem.train.items()}
    moved, spread = {}, {}
    for method in ("igb_v2", "igb_v2:frozen"):
        program = train.make_program(config, problem, method)
        runs = train.runs_of(config, problem, method, (1e-3,))
        state, _ = train.initial_state(problem, method, program, runs)

        def steps(state, program=program):
            one = jax.vmap(program.step, (0, None))
            return jax.lax.scan(lambda s, _: one(s, batch), state, None, length=20)

        after, logged = jax.jit(steps)(state)
        actor = lambda s: jax.tree.leaves(s.loss_balancer.agent)
        leaves = zip(actor(state), actor(after), strict=True)
        changed = [
            float(jnp.abs(a - b).max())
            for a, b in leaves
            if jnp.issubdtype(a.dtype, jnp.floating)
        ]
        moved[method] = max(changed)
        spread[method] = float(logged["log_weights"][-8:].std())
    assert moved["igb_v2"] > 1e-6
    assert moved["igb_v2:frozen"] == 0
    assert spread["igb_v2:frozen"] > 1e-3


def test_the_gpu_preset_traces(folder):
    gpu = PRESETS["gpu"][1]
    config = dataclasses.replace(gpu, data_dir=folder, seeds=2)
    problem = train.make_problem(config, "mulan_mtr/enb")
    batch = {k: v[:16] for k, v in problem.train.items()}
    for method in (SINGLE_TASK, *config.table.methods):
        program = train.make_program(config, problem, method)
        runs = train.runs_of(config, problem, method, (1e-3,))

        def once(program=program, runs=runs, method=method):
            state, _ = train.initial_state(problem, method, program, runs)
            return jax.vmap(program.step, (0, None))(state, batch)

        _, logged = jax.eval_shape(once)
        assert logged["task_losses"].shape == (len(runs), 2)
