import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from mtljax import training
from mtljax.training import tree_digest
from mtljax.training.fit import own_state
from mtljax.training.run_dir import holds_run


def test_resumed_in_process_equals_uninterrupted(tmp_path):
    whole = toy.run(20, run_dir=tmp_path / "a")
    toy.run(7, run_dir=tmp_path / "b")
    resumed = toy.run(20, run_dir=tmp_path / "b", resume=True)
    assert tree_digest(resumed.state) == tree_digest(whole.state)
    assert toy.comparable(tmp_path / "a") == toy.comparable(tmp_path / "b")
    strip = lambda rows: [{**r, "seconds": 0} for r in rows]
    assert strip(resumed.rows) == strip(whole.rows)
    header, rows = training.read_jsonl(tmp_path / "b")
    assert [s["from_step"] for s in header["sessions"]] == [0, 7]
    assert [r["step"] for r in rows if r["kind"] == "train"] == [4, 8, 12, 16, 20]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == [6, 12, 18, 20]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = toy.run(8, run_dir=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = toy.run(8, run_dir=tmp_path, resume=True)
    assert tree_digest(again.state) == tree_digest(whole.state)
    assert again.rows == whole.rows
    assert again.best == whole.best
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_train_rows_are_means_over_the_steps_between():
    every = toy.run(12, log_every=1).rows
    every = np.array([r["losses"] for r in every if r["kind"] == "train"])
    fourth = toy.run(12, log_every=4).rows
    fourth = np.array([r["losses"] for r in fourth if r["kind"] == "train"])
    np.testing.assert_allclose(fourth, every.reshape(3, 4, 2).mean(1), rtol=1e-12)


def test_seeds_equal_single_runs_and_resume(tmp_path):
    init_keys, order_keys = training.split_run_key(
        jnp.stack([jax.random.key(s) for s in range(3)])
    )
    evaluate = jax.vmap(toy.make_eval())
    settings = {
        "state": jax.vmap(toy.init)(init_keys),
        "order_key": order_keys,
        "seeds": [0, 1, 2],
        "eval_fn": evaluate,
    }
    whole = toy.run(20, run_dir=tmp_path / "a", **settings)
    toy.run(9, run_dir=tmp_path / "b", **settings)
    resumed = toy.run(20, run_dir=tmp_path / "b", resume=True, **settings)
    assert tree_digest(resumed.state) == tree_digest(whole.state)
    assert toy.comparable(tmp_path / "a") == toy.comparable(tmp_path / "b")
    for seed in range(3):
        single = toy.run(20, key=seed)
        mine = [r for r in whole.rows if r["seed"] == seed]
        assert [r["step"] for r in mine] == [r["step"] for r in single.rows]
        for a, b in zip(mine, single.rows, strict=True):
            name = "losses" if a["kind"] == "train" else "val_losses"
            np.testing.assert_allclose(a[name], b[name], rtol=2e-5)


def test_keeps_best_and_last(tmp_path):
    scores = dict(zip(range(2, 13, 2), [0.1, 0.9, 0.5, 0.3, 0.9, 0.2], strict=True))

    def evaluate(state):
        return {"acc": jnp.float32(scores[int(state.step)])}

    result = toy.run(
        12,
        run_dir=tmp_path,
        eval_fn=evaluate,
        eval_every=2,
        select="acc",
        mode="max",
        checkpoint_every=2,
    )
    assert result.best is not None
    assert result.best.step == 4
    names = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert names == [4, 10, 12]
    target = jax.eval_shape(lambda: result.state)
    assert training.load_run(tmp_path, target, "best", mode="max").step == 4
    assert int(training.load_run(tmp_path, target, "latest").state.step) == 12


def test_the_best_survives_a_resume(tmp_path):
    def evaluate(state):  # best at step 6, then worse
        return {"val_loss": jnp.abs(state.step - 6.0)}

    settings = {"eval_fn": evaluate, "eval_every": 3, "run_dir": tmp_path}
    toy.run(9, **settings)
    result = toy.run(18, resume=True, **settings)
    assert result.best is not None
    assert (result.best.step, result.best.value) == (6, 0.0)
    assert (tmp_path / "checkpoints" / "6").is_dir()


def test_an_existing_run_is_not_touched(tmp_path):
    toy.run(4, run_dir=tmp_path)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(training.RunExistsError, match="resume=True"):
        toy.run(8, run_dir=tmp_path)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_overwrite_removes_only_our_files(tmp_path):
    toy.run(20, run_dir=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "mine").mkdir()
    toy.run(4, run_dir=tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["4", "mine"]
    assert training.read_jsonl(tmp_path)[1][-1]["step"] == 4


def test_resume_auto_starts_where_there_is_nothing(tmp_path):
    assert not holds_run(tmp_path)
    toy.run(4, run_dir=tmp_path, resume="auto")
    result = toy.run(8, run_dir=tmp_path, resume="auto")
    assert tree_digest(result.state) == tree_digest(toy.run(8).state)


def test_resume_auto_keeps_the_rows_of_a_run_without_checkpoints(tmp_path):
    toy.run(4, run_dir=tmp_path)
    rows = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    toy.run(4, run_dir=tmp_path, resume="auto")
    assert (tmp_path / "metrics.jsonl.1").read_text() == rows
    assert len(toy.comparable(tmp_path)) == len(rows.splitlines()) - 1  # the header


def test_resume_needs_a_checkpoint_and_room(tmp_path):
    with pytest.raises(
        training.CheckpointError, match=r"No checkpoint in .* to resume"
    ):
        toy.run(4, run_dir=tmp_path, resume=True)
    toy.run(8, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="has made 8 steps already, more than num_st"):
        toy.run(4, run_dir=tmp_path / "run", resume=True)


def test_resume_with_another_configuration(tmp_path):
    config = {"lr": 0.1, "model": {"width": 8}, "num_steps": 4, "note": "a"}
    toy.run(4, run_dir=tmp_path, config=config)
    other = {"lr": 0.2, "model": {"width": 16}, "num_steps": 8, "note": "b"}
    resume = {"run_dir": tmp_path, "resume": True}
    with pytest.raises(training.ConfigMismatchError) as error:
        toy.run(8, config=other, may_differ=["note"], **resume)
    assert "(lr: 0.1 -> 0.2; model.width: 8 -> 16)" in str(error.value)
    with pytest.raises(training.ConfigMismatchError, match=r"fit.batch_size: 8 -> 4"):
        toy.run(8, config=config, batch_size=4, **resume)
    with pytest.raises(training.ConfigMismatchError, match=r"fit.order_key"):
        toy.run(8, config=config, order_key=jax.random.key(9), **resume)
    same = {**config, "num_steps": 8, "note": "b"}
    toy.run(8, config=same, may_differ=["note"], **resume)


def test_resume_with_another_state(tmp_path):
    toy.run(4, run_dir=tmp_path)
    init_key, _ = training.split_run_key(jax.random.key(0))
    state = toy.init(init_key)
    wide = state._replace(stats=state.stats.astype(jnp.float32))
    step = lambda s, b: (
        toy.step(s, b)[0]._replace(stats=s.stats),
        toy.step(s, b)[1],
    )
    with pytest.raises(
        training.TreeMismatchError,
        match=r"has bfloat16\[5\] at .stats, but the state has float32\[5\]",
    ):
        toy.run(8, run_dir=tmp_path, resume=True, state=wide, step=step)


def damaged_data(row):
    data = toy.make_data()
    data["y"][row, 1] = np.nan
    return data


def test_a_nonfinite_loss_stops_the_run_and_leaves_a_good_checkpoint(tmp_path):
    _, order_key = training.split_run_key(jax.random.key(0))
    order = np.concatenate([training.epoch_order(order_key, e, 70, 8) for e in (0, 1)])
    first = {int(r): i for i, batch in enumerate(order) for r in batch[::-1]}
    row = next(r for r, i in first.items() if i == 11 and r not in order[:11])
    with pytest.raises(training.NonFiniteLossError) as error:
        toy.run(20, data=damaged_data(row), run_dir=tmp_path, checkpoint_every=5)
    assert error.value.step == 12
    assert error.value.task == "right"
    good = tmp_path / "checkpoints" / "10"
    assert str(error.value) == (
        f"The loss of task 'right' became nan in step 12; the last good checkpoint is "
        f"{good}."
    )
    assert max(int(p.name) for p in good.parent.iterdir()) == 10
    steps = [r["step"] for r in training.read_jsonl(tmp_path)[1]]
    assert steps == [4, 6, 8]
    result = toy.run(20, run_dir=tmp_path, resume=True)  # with mended data
    assert tree_digest(result.state) == tree_digest(toy.run(20).state)


def test_a_nonfinite_loss_names_the_seed():
    init_keys, order_keys = training.split_run_key(
        jax.random.split(jax.random.key(0), 3)
    )
    state = jax.vmap(toy.init)(init_keys)
    state.params["b"] = state.params["b"].at[1, 0].set(jnp.inf)
    with pytest.raises(
        training.NonFiniteLossError,
        match=r"'left' became inf in step 1 \(seed 7\); no checkpoint had been written",
    ):
        toy.run(
            20, state=state, order_key=order_keys, seeds=[5, 7, 9], eval_fn=None,
            eval_every=None, select=None,
        )  # fmt: skip


def test_nonfinite_parameters_are_never_saved(tmp_path):
    def step(state, batch):  # the loss of step 5 is fine, its gradient is not
        w = jnp.where(state["step"] == 4, jnp.nan, state["params"]["w"])
        losses = jnp.ones(1)
        return {"params": {"w": w}, "step": state["step"] + 1}, {"losses": losses}

    state = {"params": {"w": jnp.ones(2)}, "step": jnp.int32(0)}
    with pytest.raises(training.NonFiniteLossError, match=r"Parameter \['w'\] is not"):
        training.fit(
            state, step, jnp.ones(8), num_steps=5, batch_size=2,
            order_key=jax.random.key(0), logging=training.Logging(progress=False),
            checkpointing=training.Checkpointing(tmp_path, every=2),
        )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]


def test_compiles_once(tmp_path):
    traces = []

    def step(state, batch):
        traces.append(1)
        return toy.step(state, batch)

    toy.run(200, step=step, run_dir=tmp_path, checkpoint_every=37, chunk=16)
    first = len(traces)
    assert first <= 4  # the check, shapes of the metrics, the body of the loop
    toy.run(201, step=step, chunk=16, eval_every=5)  # compiled already
    assert len(traces) <= first + 1


def grain_stream(seed=0, num_epochs=None):
    grain = pytest.importorskip("grain")
    data = toy.make_data()
    index = grain.MapDataset.range(70).seed(seed).shuffle().repeat(num_epochs)
    batches = index.batch(8, drop_remainder=True).map(
        lambda rows: {name: a[rows] for name, a in data.items()}
    )
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.to_iter_dataset(options))


def test_streamed_resume(tmp_path):
    stream = {"batch_size": None, "order_key": None}
    whole = toy.run(20, data=grain_stream(), run_dir=tmp_path / "a", **stream)
    toy.run(7, data=grain_stream(), run_dir=tmp_path / "b", **stream)
    resumed = toy.run(
        20, data=grain_stream(), run_dir=tmp_path / "b", resume=True, **stream
    )
    assert tree_digest(resumed.state) == tree_digest(whole.state)
    assert toy.comparable(tmp_path / "a") == toy.comparable(tmp_path / "b")


def test_streams_that_cannot_do(tmp_path):
    stream = {"batch_size": None, "order_key": None}
    with pytest.raises(ValueError, match="stream ended after 8 steps"):
        toy.run(20, data=grain_stream(num_epochs=1), **stream)
    generator = (batch for batch in [])
    with pytest.raises(TypeError, match="get_state and set_state"):
        toy.run(20, data=generator, run_dir=tmp_path, **stream)


def test_stream_compiles_once():
    traces = []

    def step(state, batch):
        traces.append(1)
        return toy.step(state, batch)

    toy.run(20, step=step, data=grain_stream(), batch_size=None, order_key=None)
    assert len(traces) <= 2  # the check, and the program


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="exclude each other"):
        toy.run(4, run_dir="x", resume=True, overwrite=True)
    with pytest.raises(ValueError, match=r"Logging\.every=0 must be at least 1"):
        toy.run(4, log_every=0)
    with pytest.raises(ValueError, match="needs batch_size= and order_key="):
        toy.run(4, order_key=None)
    with pytest.raises(ValueError, match="There are 3 task_names but 2 losses"):
        toy.run(4, task_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="leading axis must be the 2 seeds"):
        toy.run(4, seeds=[0, 1])
    with pytest.raises(ValueError, match=r"select='acc' must be one of .*val_loss"):
        toy.run(4, select="acc")
    with pytest.raises(ValueError, match="metrics a flat dict"):
        toy.run(4, step=lambda s, b: (s, jnp.ones(2)))


def test_the_initial_state_is_not_consumed():
    state = own_state(toy.init(jax.random.key(0)))
    toy.run(4, state=state)
    assert np.isfinite(np.asarray(state.params["w"])).all()


def test_evaluation_of_the_initial_state(tmp_path):
    result = toy.run(6, eval_at_start=True, run_dir=tmp_path)
    assert [r["step"] for r in result.rows] == [0, 4, 6, 6]


def test_a_loss_that_is_not_positive_stops_a_method_that_takes_logarithms():
    def step(state, batch):
        return state + 1, {"losses": jnp.stack([batch.mean(), 3.0 - state])}

    def run(**options):
        return training.fit(
            jnp.float32(0), step, jnp.ones(8), num_steps=6, batch_size=4,
            order_key=jax.random.key(0), task_names=["a", "b"],
            logging=training.Logging(progress=False),
            execution=training.Execution(**options),
        )  # fmt: skip

    run()
    with pytest.raises(
        training.NonPositiveLossError,
        match=r"task 'b' became 0.0 in step 4, but the method takes the logarithm",
    ):
        run(positive_losses=True)


def by_task(values):
    return {"right": values[..., 1], "left": values[..., 0]}


def named_step(state, batch):
    """The toy step with metrics that are dicts by task, in another order."""
    state, metrics = toy.step(state, batch)
    return state, {name: by_task(values) for name, values in metrics.items()}


def named_evaluation(evaluate):
    def named(state):
        values = evaluate(state)
        return {**values, "val_losses": by_task(values["val_losses"])}

    return named


def rows_of(result):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in result.rows]


def test_metrics_by_task_have_the_rows_of_vectors():
    evaluate = toy.make_eval()
    named = toy.run(12, step=named_step, eval_fn=named_evaluation(evaluate))
    assert rows_of(named) == rows_of(toy.run(12))
    init_keys, order_keys = training.split_run_key(
        jnp.stack([jax.random.key(s) for s in range(3)])
    )
    settings = {
        "state": jax.vmap(toy.init)(init_keys),
        "order_key": order_keys,
        "seeds": [0, 1, 2],
    }
    evaluate = jax.vmap(evaluate)
    named = toy.run(6, step=named_step, eval_fn=named_evaluation(evaluate), **settings)
    assert rows_of(named) == rows_of(toy.run(6, eval_fn=evaluate, **settings))


def test_metrics_by_task_need_their_names():
    with pytest.raises(ValueError, match="is a dict by task"):
        toy.run(4, step=named_step, task_names=None)
    with pytest.raises(ValueError, match="Metric 'losses': the tasks are"):
        toy.run(4, step=named_step, task_names=["left", "other"])
    evaluate = named_evaluation(toy.make_eval())
    with pytest.raises(ValueError, match="Metric 'val_losses': the tasks are"):
        toy.run(6, eval_fn=evaluate, task_names=["left", "other"])

    def damaged(state, batch):
        state, metrics = named_step(state, batch)
        metrics["losses"]["left"] = metrics["losses"]["left"] / (3 - state.step)
        return state, metrics

    with pytest.raises(training.NonFiniteLossError, match="task 'left' became inf"):
        toy.run(6, step=damaged, eval_fn=None, eval_every=None, select=None)
