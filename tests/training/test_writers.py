import json
import sys

import numpy as np
import pytest

from mtljax import training


def row(step, **more):
    return {"step": step, "kind": "train", "losses": np.array([0.5, step]), **more}


def write(path, steps, resume_step=None):
    writer = training.JsonlWriter(path)
    writer.open(
        {"config": {"lr": 0.1}, "sessions": [{"from": resume_step}]}, resume_step
    )
    for step in steps:
        writer.write(row(step))
    writer.close()
    return writer


def test_a_resume_drops_later_and_final_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    with path.open("a") as file:
        file.write(json.dumps({"step": 2, "kind": "eval", "final": True}) + "\n")
        file.write('{"step": 5, "ki')
    assert [r["step"] for r in training.read_jsonl(path)[1]] == [1, 2, 3, 4, 2]
    writer = write(path, [3, 4, 5], resume_step=2)
    header, rows = training.read_jsonl(path)
    assert rows == writer.rows
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]
    assert header["sessions"] == [{"from": 2}]  # the caller gives all of them
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_nan_becomes_null(tmp_path):
    writer = training.JsonlWriter(tmp_path / "m.jsonl")
    writer.open({}, None)
    writer.write({"step": 1, "kind": "eval", "x": np.array([np.nan, 1.0]), "y": np.inf})
    writer.close()
    assert training.read_jsonl(tmp_path / "m.jsonl")[1][0]["x"] == [None, 1.0]
    assert writer.rows[0]["y"] is None


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*m\.jsonl is damaged"):
        training.read_jsonl(path)


def test_writing_to_a_closed_writer(tmp_path):
    with pytest.raises(ValueError, match="not open"):
        training.JsonlWriter(tmp_path / "m.jsonl").write(row(1))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = training.TensorBoardWriter(tmp_path)
    tags = []
    writer.open({"task_names": ["a", "b"], "seeds": [0, 1], "config": {}}, None)
    writer._events.add_scalar = lambda tag, value, step: tags.append((tag, value, step))
    writer.write(row(3, seed=1, seconds=0.5, nested={"c": [1.0, 2.0, 3.0]}))
    writer.flush()
    writer.close()
    assert tags == [
        ("train/losses/a/seed_1", 0.5, 3),
        ("train/losses/b/seed_1", 3.0, 3),
        ("train/seconds/seed_1", 0.5, 3),
        ("train/nested/c/0/seed_1", 1.0, 3),
        ("train/nested/c/1/seed_1", 2.0, 3),
        ("train/nested/c/2/seed_1", 3.0, 3),
    ]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_tensorboard_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'mtljax\[tensorboard\]'"):
        training.TensorBoardWriter(tmp_path)
