"""The committed row of one attribute of the faces alone, trained again."""

from typing import Any

from experiments.trajectories import data, model, train
from experiments.trajectories.config import PRESETS, Config

CONFIG, RESULTS = PRESETS["cpu"][1], "results.jsonl"
KEYS, LINES = ("setting", "tasks", "method", "seed"), 3


def rows(config: Config) -> list[dict[str, Any]]:
    """Its lines: the choice of the rate, and all measurements."""
    row, scale = train.Row(("pose",)), config.scale("cmu_faces")
    problem = data.load(config, "cmu_faces").select(row.tasks)
    functions = model.make_functions(config, scale, problem)
    return train.run_tuned(config, scale, problem, functions, row)
