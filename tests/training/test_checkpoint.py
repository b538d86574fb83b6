import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

from mtljax import training


def state_of(step):
    params = {"w": jnp.arange(600.0).reshape(20, 30) + step, "b": jnp.ones(3)}
    return {
        "params": params,
        "half": jnp.ones(4, jnp.bfloat16) * step,
        "opt": optax.adam(1e-3).init(params),
        "keys": jax.random.split(jax.random.key(step), 3),
        "none": None,
    }


def fill(directory, steps=(1, 2, 3), **kwargs):
    with training.Checkpointer(directory, **kwargs) as ckpt:
        for step in steps:
            ckpt.save(step, state_of(step), {"n": step})


def flip_a_byte(folder):
    """Flips a byte of the largest array file, where Orbax notices nothing."""
    files = [p for p in folder.glob("state/**/d/*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(content)


def truncate(folder):
    files = [p for p in folder.glob("state/**/d/*") if p.is_file()]
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])


def edit_record(folder):
    record = folder / "meta" / "metadata"
    record.write_text(re.sub(r'"n": \d', '"n": 9', record.read_text()))


def lose_record(folder):
    (folder / "meta" / "metadata").unlink()


# Orbax leaves coroutines behind when a restore fails; they complain when collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
DAMAGES = [flip_a_byte, truncate, edit_record, lose_record]


def test_everything_comes_back_exactly(tmp_path):
    fill(tmp_path)
    with training.Checkpointer(tmp_path) as ckpt:
        restored = ckpt.restore(jax.eval_shape(lambda: state_of(0)))
    assert (restored.step, restored.meta) == (3, {"n": 3})
    expected = state_of(3)
    assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
    assert training.tree_digest(restored.state) == training.tree_digest(expected)
    assert restored.state["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_from_a_damaged_checkpoint(tmp_path, damage):
    fill(tmp_path)
    damage(tmp_path / "3")
    notes = []
    with training.Checkpointer(tmp_path) as ckpt:
        restored = ckpt.restore(state_of(0), warn=notes.append)
        assert restored.step == 2
        assert len(notes) == 1
        assert notes[0].startswith(f"Checkpoint {tmp_path / '3'} is damaged: its ")
        assert notes[0].endswith("; trying the one before it.")
        with pytest.warns(RuntimeWarning, match="is damaged"):
            ckpt.restore(state_of(0))
        with pytest.raises(training.CheckpointError, match="3 is damaged"):
            ckpt.restore(state_of(0), 3)


def test_says_so_when_none_is_good(tmp_path):
    fill(tmp_path)
    for step in (2, 3):
        flip_a_byte(tmp_path / str(step))
    with (
        training.Checkpointer(tmp_path) as ckpt,
        pytest.raises(
            training.CheckpointError,
            match=r"2 is damaged: its arrays .* \(and 1 newer ones\)\.$",
        ),
    ):
        ckpt.restore(state_of(0), warn=lambda text: None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_checkpoint_before(tmp_path, damage, capsys):
    toy.run(12, run_dir=tmp_path, checkpoint_every=4)
    damage_me = tmp_path / "checkpoints" / "12"
    if damage is edit_record:
        record = damage_me / "meta" / "metadata"
        record.write_text(record.read_text().replace('"count": 0', '"count": 3'))
    else:
        damage(damage_me)
    result = toy.run(16, run_dir=tmp_path, resume=True, checkpoint_every=4)
    assert "12 is damaged" in capsys.readouterr().out
    assert training.tree_digest(result.state) == training.tree_digest(toy.run(16).state)
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir()
    assert result.step == 16


def test_last_and_best_are_kept(tmp_path):
    scores = {1: 0.5, 2: 0.1, 3: None, 4: 0.4, 5: float("nan"), 6: 0.1}
    with training.Checkpointer(tmp_path, mode="min", keep_last=1) as ckpt:
        for step, score in scores.items():
            ckpt.save(step, state_of(step), {}, metric=score)
            ckpt.wait()
            assert step in ckpt.steps()
        assert ckpt.steps() == [2, 6]
    with training.Checkpointer(tmp_path, mode="min", keep_last=1) as ckpt:
        assert ckpt.best_step() == 2
        assert ckpt.restore(state_of(0), "best").step == 2


def test_clear_errors(tmp_path):
    with training.Checkpointer(tmp_path / "none") as ckpt:
        with pytest.raises(training.CheckpointError, match=r"No checkpoint in .*none"):
            ckpt.restore(state_of(0))
        assert not (tmp_path / "none").exists()
    fill(tmp_path)
    with training.Checkpointer(tmp_path) as ckpt:
        with pytest.raises(training.CheckpointError, match=r"3 exists already"):
            ckpt.save(3, state_of(3), {})
        with pytest.raises(training.CheckpointError, match=r"step 9 .* are \[2, 3\]"):
            ckpt.restore(state_of(0), 9)
        with pytest.raises(training.CheckpointError, match="saved with a metric"):
            ckpt.restore(state_of(0), "best")
        more = {**state_of(0), "extra": jnp.ones(2)}
        with pytest.raises(
            training.TreeMismatchError,
            match=r"has nothing at \['extra'\], but the state has float32\[2\]",
        ):
            ckpt.restore(more)
        with pytest.raises(training.TreeMismatchError, match=r"\['half'\]"):
            ckpt.restore({**state_of(0), "half": jnp.ones(4)})
    with pytest.raises(ValueError, match="keep_last=0"):
        training.Checkpointer(tmp_path, keep_last=0)


def test_donating_right_after_a_save_is_safe(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"w": jnp.ones((500, 500))}
    with training.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state, {})
        state = change(state)
        ckpt.wait()
        np.testing.assert_array_equal(ckpt.restore(state).state["w"], 1.0)


def test_leftovers_are_cleaned(tmp_path):
    fill(tmp_path)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "deleted" / "1").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    with training.Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == [2, 3]
        ckpt.clean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "mine"]
