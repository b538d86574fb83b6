import dataclasses
import enum
import os
import pathlib
import subprocess
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.training import records


class Colour(enum.Enum):
    RED = 1


class Pair(typing.NamedTuple):
    a: int
    b: float


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1
    path: pathlib.Path = pathlib.Path("runs")
    colour: Colour = Colour.RED
    pair: Pair = dataclasses.field(default_factory=lambda: Pair(1, 2.5))


def test_to_json():
    assert records.to_json(Config()) == {
        "lr": 0.1,
        "path": "runs",
        "colour": "RED",
        "pair": {"a": 1, "b": 2.5},
    }
    assert records.to_json(jnp.ones(2, jnp.bfloat16)) == [1.0, 1.0]
    assert records.to_json({3: {2, 1}, "n": np.int64(4)}) == {"3": [1, 2], "n": 4}
    assert records.to_json(True) is True
    with pytest.raises(TypeError, match="A function cannot be written as JSON"):
        records.to_json(lambda: None)


def test_differences_name_absent_fields():
    assert records.differences({"a": 1, "m": {"x": 1}}, {"m": {"x": 1}, "b": []}) == [
        "a: 1 -> (absent)",
        "b: (absent) -> []",
    ]
    assert records.differences({"m": {"x": 1}}, {"m": {"x": 2}}, ["m"]) == []
    assert records.differences({"m": {"x": 1}}, {"m": {"x": 2}}, ["m.x"]) == []


def test_bytes_round_trip():
    for value in [b"\x00\xff", {"next_index": 5}, None]:
        assert records.unpack_bytes(records.pack_bytes(value)) == value


def test_git_commit_does_not_write_the_index(tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    file = tmp_path / "file"
    file.write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    os.utime(file, (1, 1))  # git status would store the new time
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    assert len(records.git_commit(str(tmp_path))) == 40
    assert index.read_bytes() == before
    file.write_text("2")
    records.git_commit.cache_clear()
    assert records.git_commit(str(tmp_path)).endswith("+changes")


def test_git_commit_outside_a_checkout(tmp_path):
    assert records.git_commit(str(tmp_path)) is None
