"""The experiment: rows that mean what their names say, data, measures, files."""

import dataclasses
import itertools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.alternating import __main__ as command
from experiments.alternating import data, problem, report, train
from experiments.alternating.config import (
    CPU,
    PRESETS,
    ROWS,
    SETS,
    TASKS,
    check,
)
from experiments.common.config import ConfigError
from mtljax import training
from mtljax.data import MISSING, MissingDataError

SMOKE = PRESETS["smoke"][1]
TINY = {"hidden": (8,), "batch_size": 8}


def data_dir():
    folder = pathlib.Path(os.environ.get("MTLJAX_DATA_DIR", "nowhere"))
    if not (folder / "cmu_faces").is_dir():
        pytest.skip(
            "no real data sets: set MTLJAX_DATA_DIR to the folder of cmu_faces/"
        )
    return folder


def configured(name, folder=None, **changes):
    setting = dataclasses.replace(SMOKE.setting(name), **{**TINY, **changes})
    return dataclasses.replace(SMOKE, sets=(name,), data_dir=folder, **{name: setting})


def test_passes_per_batch():
    costs = {name: train.cost_of(name, 21)[:2] for name in ROWS if "35" not in name}
    assert costs["joint"] == (1, 1)
    assert costs["alternating"] == costs["alternating:shared"] == (21, 21)
    assert costs["groups_4"] == (4, 4)
    assert costs["adatask"] == (1, 21)


def test_how_far_a_batch_may_go():
    reach = {name: train.inner_steps(name, 12) for name in ROWS}
    assert reach["alternating"] == reach["alternating:shared"] == reach["adatask"] == 12
    assert reach["groups_4"] == 4
    assert reach["joint"] == 1


def test_measures_of_travel():
    points = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    trip = train.Exploration(
        jnp.asarray(points[0]), jnp.zeros(3), jnp.zeros(()), jnp.zeros(())
    )
    for before, after in itertools.pairwise(points):
        trip = train.travel(trip, jnp.asarray(before), jnp.asarray(after))
    state = train.State(
        {"trunk": jnp.asarray(points[-1])},
        None,
        trip,
        jnp.float32(0),
        jnp.float32(1),
        jnp.int32(-1),
        jnp.int32(0),
        jnp.int32(4),
    )
    found = train.measures(state)
    moves = np.diff(points, axis=0)
    lengths = np.linalg.norm(moves, axis=1)
    cosines = (moves[1:] * moves[:-1]).sum(1) / (lengths[1:] * lengths[:-1])
    distance = np.linalg.norm(points[-1] - points[0])
    np.testing.assert_allclose(found["path"], lengths.sum(), rtol=1e-5)
    np.testing.assert_allclose(found["distance"], distance, rtol=1e-5)
    np.testing.assert_allclose(
        found["straightness"], distance / lengths.sum(), rtol=1e-5
    )
    np.testing.assert_allclose(found["turning"], cosines.mean(), rtol=1e-4)


def evaluated(lr, step, score, **more):
    return {
        "kind": "eval",
        "seed": 0,
        "lr": lr,
        "task": -1,
        "scale": 1.0,
        "step": step,
        "val_score": score,
        **more,
    }


def test_the_step_and_the_learning_rate_are_validations():
    rows = [
        evaluated(lr, s, v)
        for lr, s, v in [(0.1, 1, 0.5), (0.1, 9, 0.6), (0.2, 1, 0.4), (0.2, 9, 0.9)]
    ]
    (best,) = report.chosen_rows(rows)
    assert (best["lr"], best["step"]) == (0.2, 9)
    assert report.chosen_rate(rows) == 0.2
    (early,) = report.chosen_rows(rows, last_step=5)
    assert (early["lr"], early["step"]) == (0.1, 1)
    assert report.chosen_rows(rows, last_step=0) == []


def test_columns_of_joint_and_of_single_task_networks():
    columns = {"a": np.array([0.5, 0.5, 0]), "b": np.array([0, 0, 1.0])}
    joint = [evaluated(1, 1, 0, test_metrics=[0.2, 0.4, 0.9])]
    np.testing.assert_allclose(report.columns_of(columns, joint), [[0.3, 0.9]])
    alone = [
        evaluated(1, 1, 0, test_metric=value) | {"task": task, "seed": seed}
        for task, value in enumerate([0.2, 0.4, 0.9])
        for seed in (0, 1)
    ]
    np.testing.assert_allclose(report.columns_of(columns, alone), [[0.3, 0.9]] * 2)


def test_the_ends_of_the_line_of_groups():
    names = ("joint", "alternating", "alternating:shared", "groups_6", "groups_2")
    line = {1: "joint", 2: "groups_2", 6: "groups_6", 12: "alternating:shared"}
    assert report.group_line(dict.fromkeys(names), 12) == line


def curves(joint, alternating, rates=(0.01, 0.04, 0.16)):
    """Rows of two seeds: score and distance by rate."""
    return {
        name: [
            evaluated(lr, 9, score + seed, kind=kind, seed=seed)
            | {"distance": away * (1 + seed), "losses": [1 / away, 3 / away]}
            for kind in ("eval", "train")
            for seed in (0, 1)
            for lr, score, away in zip(rates, scores, (1.0, 2.0, 4.0), strict=True)
        ]
        for name, scores in (("joint", joint), ("alternating", alternating))
    }


def test_rates_and_exploration_are_compared_at_equal_steps():
    """With four tasks, alternation at a rate has the steps of four times the rate."""
    four = dataclasses.make_dataclass("P", ["num_tasks", "columns"])(4, {})
    rows = curves((0.1, 0.5, 0.9), (0.3, 0.6, 0.2))
    found = report.Results(four, rows, {}, 9)
    joint, other = report.tolerance(found)
    # Both from 0.04 to 0.16: the areas of straight lines over the logarithm.
    np.testing.assert_allclose(joint, [0.7, 1.7], rtol=1e-6)
    np.testing.assert_allclose(other, [0.45, 1.45], rtol=1e-6)
    trips = report.exploration(found)
    # Alternation chose 0.04; a step of 0.16 goes twice as far there.
    ratio = {name: other - joint for name, (joint, other) in trips.items()}
    np.testing.assert_allclose(ratio["at one rate"], 0)
    equal = ratio["against a step of equal length"]
    np.testing.assert_allclose(equal, -np.log(2), rtol=1e-6)
    np.testing.assert_allclose(ratio["at equal training loss"], 0)


def test_area_under_the_curve_counts_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 40).astype(np.float32)  # with ties
    positive, known = rng.random(40) < 0.4, rng.random(40) < 0.8
    wins = [
        (s > r) + (s == r) / 2
        for s in scores[known & positive]
        for r in scores[known & ~positive]
    ]
    found = jax.jit(problem.auc)(scores, positive, known)
    np.testing.assert_allclose(found, np.mean(wins), rtol=1e-5)


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("adam",)}, "--digits.rows: unknown name 'adam'. Choose from"),
        ({"rows": ("groups_35",)}, "has 35 groups, but digits has 21 tasks"),
        ({"rows": ()}, "--digits.rows is empty"),
        ({"lrs": ()}, "--digits.lrs is empty"),
        ({"scales": (-1.0,)}, "--digits.scales must be a positive number"),
        ({"batch_size": 0}, "--digits.batch-size must be a whole number from 1"),
    ],
)
def test_settings_that_cannot_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(configured("digits", **changes))


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": ()}, "--sets is empty. Give at least one name"),
        ({"sets": ("digit",)}, "--sets: unknown data set 'digit'. Choose from digits"),
        ({"sets": ("faces",)}, "faces is read from files. Pass --data-dir DIR"),
        ({"seeds": 0}, "--seeds must be a whole number from 1 to 1000, not 0"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude"),
    ],
)
def test_configurations_that_cannot_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(SMOKE, **changes))


def test_a_folder_without_the_file():
    config = configured("faces", pathlib.Path("nowhere"))
    with pytest.raises(MissingDataError, match=r"File 'nowhere/cmu_faces/cmu_face"):
        problem.make_problem(config, "faces")


@pytest.mark.data
def test_faces_are_judged_where_a_question_can_be_asked():
    folder = data_dir()
    arrays = data.faces_of(configured("faces", folder), 0)
    with np.load(folder / "cmu_faces" / "cmu_faces_q.npz") as found:
        images = found["x"].reshape(-1, 15, 2, 16, 2).astype(np.float32).mean((2, 4))
        owner = {
            image.tobytes(): p for image, p in zip(images, found["person"], strict=True)
        }
    people, seen = {}, {}
    for name in ("train", "val", "test"):
        split = {k: v[:, 0] for k, v in getattr(arrays, name).items()}
        back = np.round(split["x"][..., 0] * 255 * 4) / 4
        people[name] = np.array([owner[i.astype(np.float32).tobytes()] for i in back])
        seen[name] = {i.tobytes() for i in back}
    assert not seen["train"] & (seen["val"] | seen["test"])
    for name in ("val", "test"):
        split = {k: v[:, 0] for k, v in getattr(arrays, name).items()}
        known = np.unique(people["train"])
        strange = ~np.isin(people[name], known)
        assert (strange == (split["person"] == MISSING)).all()
        for label in ("pose", "expression", "sunglasses"):
            assert (strange == (split[label] != MISSING)).all()
        assert 0 < strange.sum() < len(strange)
    pairs = set(
        zip(
            people["train"].tolist(), arrays.train["person"][:, 0].tolist(), strict=True
        )
    )
    assert len(pairs) == 13  # one number a person


@pytest.mark.data
def test_molecules_and_pupils_are_on_one_side():
    folder = data_dir()
    arrays = data.tox21(configured("tox21", folder))
    molecules = [
        {row.tobytes() for row in np.hstack([s["x"][:, 0], s["y"][:, 0]])}
        for s in (arrays.train, arrays.val, arrays.test)
    ]
    assert all(len(m) > 900 for m in molecules)
    arrays = data.load("school", configured("school", folder))
    assert arrays.train["y"].shape[1] == SMOKE.seeds
    arrays = data.school_of(configured("school", folder), 0)
    rounds = arrays.train["y"][:, 0]
    assert rounds.shape[1] == 139
    held = np.hstack([arrays.val["pupils"][:, 0], arrays.test["pupils"][:, 0]])
    sizes = (held != MISSING).sum(1)
    with np.load(folder / "school" / "school.npz") as found:
        pupils = np.bincount(found["task"])
    for task in (0, int(pupils.argmin()), int(pupils.argmax())):
        # Once through a school before anybody comes again.
        first = rounds[: pupils[task] - sizes[task], task]
        assert len(first) == min(pupils[task] - sizes[task], len(rounds))
    assert arrays.train["x"].shape == (len(rounds), 1, 139, 27)


@pytest.mark.data
@pytest.mark.parametrize("name", SETS)
def test_a_task_loss_is_its_entry_of_all(name):
    folder = None if name == "digits" else data_dir()
    found = problem.make_problem(configured(name, folder), name)
    assert found.num_tasks == TASKS[name]
    params = jax.jit(found.init)(jax.random.key(0))
    batch = found.split({k: v[:4] for k, v in found.train.items()}, 0)
    losses = jax.jit(found.task_losses)(params, batch)
    tasks = jnp.arange(found.num_tasks)

    @jax.jit
    @jax.vmap
    def each(task):
        return found.task_loss(found.alone(params, task), task, batch)

    assert losses.shape == (found.num_tasks,)
    assert len(np.unique(np.asarray(losses))) == found.num_tasks
    np.testing.assert_allclose(each(tasks), losses, rtol=1e-5)
    for column in found.columns.values():
        np.testing.assert_allclose(column.sum(), 1)
    np.testing.assert_array_equal(
        np.sum([column > 0 for column in found.columns.values()], 0), 1
    )


@pytest.mark.parametrize("name", ["joint", "alternating"])
def test_a_factor_scales_the_last_loss_only_and_is_not_shown(name):
    """Of what two steps of SGD see: the head of the ink moves twice as far."""
    found = problem.make_problem(configured("digits"), "digits")
    program = train.make_program(found, name)
    params = jax.jit(found.init)(jax.random.key(0))
    batch = {k: v[:8] for k, v in found.train.items()}

    @jax.jit
    @jax.vmap
    def once(scale):
        state = program.init(params, jax.random.key(1), 0.0, scale=scale)
        _, seen = program.step(state, batch)
        return seen["losses"]

    plain, scaled = once(jnp.array([1.0, 1000.0]))
    np.testing.assert_allclose(plain, scaled, rtol=1e-5)
    state = program.init(params, jax.random.key(1), 0.0, scale=1000.0)
    factors = train.factor(state, jnp.arange(21), 20)
    np.testing.assert_array_equal(factors, [1] * 20 + [1000])


def test_a_balancer_of_equal_weights_is_the_joint_row(monkeypatch):
    """Adam divides by the size of gradients, so the sum and the mean are one row."""
    found = problem.make_problem(configured("digits", steps=5), "digits")
    monkeypatch.setitem(ROWS, "linear", ROWS["pcgrad"]._replace(balancer="linear"))
    params = jax.jit(found.init)(jax.random.key(0))
    ends = []
    for name in ("joint", "linear"):
        program = train.make_program(found, name)
        state = program.init(params, jax.random.key(1), 0.01)
        step = jax.jit(program.step)
        for i in range(5):
            batch = {k: v[64 * i : 64 * i + 64] for k, v in found.train.items()}
            state, seen = step(state, batch)
        ends.append((state.params, seen["losses"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *ends
    )


@pytest.mark.deep
def test_smoke_and_resume(tmp_path):
    config = dataclasses.replace(SMOKE, out=tmp_path, plots=True)
    command.main(config, "smoke")
    folder = tmp_path / "digits"
    first = (folder / "results.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()][1:]
    labels = {"joint", "alternating, states per task"}
    assert {row["row"] for row in rows} == {"single task", "mean", *labels}
    joint = [row for row in rows if row["row"] in labels]
    assert all(np.isfinite(row["test_metrics"]).all() for row in joint)
    for metric in ("delta_m", "val_score_area", "distance_same_rate"):
        assert all(np.isfinite(row[metric]) for row in joint)
    assert "| alternating, states per task |" in (folder / "table.md").read_text()
    assert {p.stem for p in folder.glob("*.png")} == {"losses", "rates"}
    for option in ("resume", "report_only"):
        later = dataclasses.replace(config, **{option: True})
        command.main(later, "smoke")
        lines = (folder / "results.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines][1:] == rows


@pytest.mark.deep
@pytest.mark.parametrize("name", [n for n in ROWS if "35" not in n])
def test_every_row_learns(name):
    config = configured("digits", steps=60, batch_size=64, hidden=(16,))
    found = problem.make_problem(config, "digits")
    program = train.make_program(found, name)
    state, order = train.initial_state(found, program, [train.Run(0, 3e-3)])
    run = training.make_chunk(program.step, batch_size=64, chunk=60, seeds=True)
    _, metrics = run(state, found.train, order, 0, 60)
    losses = np.asarray(metrics["losses"])[:, 0].mean(1)
    assert np.isfinite(losses).all()
    assert np.median(losses[-10:]) < np.median(losses[:5])


def test_runs_of_a_seed_have_its_split():
    """Two splits in one array, the second of other examples: what a seed trains on."""
    config = configured("digits", steps=2)
    one = problem.make_problem(config, "digits")
    more = {k: jnp.concatenate([v, v[::-1]], 1) for k, v in one.train.items()}
    both = dataclasses.replace(one, train=more, by_seed=True)
    program = train.make_program(both, "joint")
    runs = [train.Run(seed, 1e-3) for seed in (0, 1)]
    state, _ = train.initial_state(both, program, runs)
    np.testing.assert_array_equal(state.split, [0, 1])
    batch = {k: v[:8] for k, v in more.items()}
    after, seen = jax.jit(jax.vmap(program.step, (0, None)))(state, batch)
    second = jax.tree.map(lambda x: x[1], state)
    flipped = {k: v[-8:][::-1] for k, v in one.train.items()}
    alone = train.make_program(one, "joint")
    expected, wanted = jax.jit(alone.step)(second._replace(split=jnp.int32(0)), flipped)
    np.testing.assert_allclose(seen["losses"][1], wanted["losses"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6),
        after.params,
        expected.params,
    )


def test_the_gpu_preset_traces():
    """Its widths and batch sizes on the embedded set."""
    gpu = PRESETS["gpu"][1]
    for setting in (gpu.camvid, gpu.tox21):
        config = dataclasses.replace(gpu, sets=("digits",), digits=setting)
        found = problem.make_problem(config, "digits")
        batch = {
            k: jax.ShapeDtypeStruct((setting.batch_size, *v.shape[1:]), v.dtype)
            for k, v in found.train.items()
        }
        for name in setting.rows:
            program = train.make_program(found, name)

            def step(batch, program=program, found=found):
                params, key = found.init(jax.random.key(0)), jax.random.key(1)
                return program.step(program.init(params, key, 1e-3), batch)

            state, seen = jax.eval_shape(step, batch)
            assert seen["losses"].shape == (21,)
            assert state.step.shape == ()


def test_the_presets_can_run():
    for _, config in PRESETS.values():
        check(dataclasses.replace(config, data_dir=pathlib.Path("nowhere")))
    for name in CPU.sets:
        setting = CPU.setting(name)
        # The cheapest row's passes end on an evaluation of the dearest.
        dearest = max(train.cost_of(r, TASKS[name]).backward for r in setting.rows)
        if dearest < setting.steps // setting.eval_every:
            assert (setting.steps // dearest) >= setting.eval_every
