"""The experiment: rows that mean what their names say, measures, files."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.alternating import __main__ as command
from experiments.alternating import problem, report, train
from experiments.alternating.config import (
    PRESETS,
    ROWS,
    SINGLE_TASK,
    ConfigError,
    check,
)

SMOKE = PRESETS["smoke"][1]


def test_passes_per_batch():
    costs = {name: train.cost_of(row, 21)[:2] for name, row in ROWS.items()}
    assert costs["sum"] == costs["mean_T"] == (1, 1)
    assert costs["alternating"] == costs["sgd:alternating"] == (21, 21)
    assert costs["groups_4:slot"] == (4, 4)
    assert costs["groups_4:per_task"] == (4, 21)
    assert costs["adatask"] == costs["pcgrad"] == (1, 21)
    assert costs["alternating:per_batch"] == costs["uncertainty"] == (1, 1)


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
        jnp.ones(3, bool),
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


def test_the_step_and_the_learning_rate_are_validations():
    rows = [
        {"kind": "eval", "seed": 0, "lr": lr, "task": "all", "step": s, "val_score": v}
        for lr, s, v in [(0.1, 1, 0.5), (0.1, 9, 0.6), (0.2, 1, 0.4), (0.2, 9, 0.9)]
    ]
    (best,) = report.chosen_rows(rows)
    assert (best["lr"], best["step"]) == (0.2, 9)
    (early,) = report.chosen_rows(rows, last_step=5)
    assert (early["lr"], early["step"]) == (0.1, 1)
    assert report.chosen_rows(rows, last_step=0) == []


@pytest.mark.parametrize("tasks", ["classes", "modalities"])
def test_a_task_loss_is_its_entry_of_all(tasks):
    config = dataclasses.replace(SMOKE, tasks=tasks, ink_scale=0.1)
    found = problem.make_problem(config)
    params = jax.jit(found.init_model)(jax.random.key(0))
    batch = {k: v[:8] for k, v in found.train.items()}
    losses = jax.jit(found.task_losses)(params, batch)

    @jax.jit
    @jax.vmap
    def each(task):
        heads = params["heads"]
        if tasks == "classes":
            heads = jax.tree.map(lambda x: x[task], heads)
        return found.task_loss({**params, "heads": heads}, task, batch)

    assert losses.shape == (found.num_tasks,)
    np.testing.assert_allclose(each(jnp.arange(found.num_tasks)), losses, rtol=1e-5)
    ink = found.task_losses(params, batch | {"ink": batch["ink"] + 1.0})[-1]
    assert abs(float(ink - losses[-1])) > 1e-3


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ("adam",)}, "no row 'adam'; the rows are sgd:mean"),
        ({"rows": ("groups_4:slot",)}, "has 4 groups, but --tasks modalities"),
        ({"rows": ()}, "--rows is empty"),
        ({"sgd_lrs": (0.0,)}, "--sgd-lrs must be positive"),
        ({"ink_scale": -1.0}, "--ink-scale must be positive"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_configurations_that_cannot_run(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(dataclasses.replace(SMOKE, **changes))


@pytest.mark.deep
def test_smoke(tmp_path):
    config = dataclasses.replace(SMOKE, out=tmp_path)
    command.main(config, "smoke")
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["row"] for row in rows} == {SINGLE_TASK, *config.rows}
    assert all(np.isfinite(row["test_ink_r2"]) for row in rows)
    table = (tmp_path / "table.md").read_text()
    assert "| alternating, per task |" in table


@pytest.mark.deep
@pytest.mark.parametrize("name", ROWS)
def test_every_row_learns(name):
    config = dataclasses.replace(
        SMOKE, tasks="classes", steps=60, train_size=2000, batch_size=64
    )
    found = problem.make_problem(config)
    _, metrics = jax.jit(train.make_train(config, found, name))(jax.random.key(0))
    losses = np.asarray(metrics["losses"]).mean(1)
    assert np.isfinite(losses).all()
    assert losses[-5:].mean() < losses[20:25].mean()
