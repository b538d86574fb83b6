"""The programs of docs/examples train, and stay short."""

import importlib.util
import pathlib

import pytest

from mtljax.training import Writer

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "examples"
WRITERS = FOLDER / "writers.py"
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - {WRITERS})
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
    first, last = load(file).train()
    assert last < 0.5 * first


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Client:
    """Records the calls of the client of a logging service."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


ROWS = [
    {"step": 1, "kind": "train", "losses": [0.5, 0.25], "seconds": 1.0},
    {"step": 2, "kind": "train", "losses": [0.25, None], "accuracy": None},
]
WANTED = {
    (1, "train/losses/left", 0.5),
    (1, "train/losses/right", 0.25),
    (1, "train/seconds", 1.0),
    (2, "train/losses/left", 0.25),
}


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
@pytest.mark.parametrize("resume_step", [None, 1])
def test_writers_log_the_numbers_of_new_rows(service, resume_step):
    module, client = load(WRITERS), Client()
    writer = {
        "wandb": lambda: module.WandbWriter(client, "project", "run"),
        "mlflow": lambda: module.MlflowWriter(client, "run"),
    }[service]()
    assert isinstance(writer, Writer)
    writer.open({"task_names": ["left", "right"], "config": {}}, resume_step)
    for row in ROWS:
        writer.write(row)
    writer.flush(durable=True)
    writer.close()
    logged = set()
    for name, args, kwargs in client.calls:
        if name == "log":
            logged |= {(kwargs["step"], key, v) for key, v in args[0].items()}
        elif name == "log_metric":
            logged.add((kwargs["step"], args[1], args[2]))
    assert logged == {row for row in WANTED if resume_step is None or row[0] > 1}
    assert client.calls[-1][0] in ("finish", "set_terminated")
