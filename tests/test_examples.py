"""The programs of docs/examples train, and stay short."""

import importlib.util
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
QUICK = {"optax_microbatching", "reinforcement_learning"}


def test_there_are_examples():
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            file,
            id=file.stem,
            marks=() if file.stem in QUICK else pytest.mark.deep,
        )
        for file in EXAMPLES
    ],
)
def test_it_trains(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 60
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, last = module.train()
    assert last < 0.5 * first
