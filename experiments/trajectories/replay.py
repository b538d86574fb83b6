"""A committed row of the target of FashionMTL alone, trained again."""

import dataclasses
import pathlib
from typing import Any

from experiments.common.report import read_rows
from experiments.trajectories import data, model, train
from experiments.trajectories.config import PRESETS, Config

CONFIG = dataclasses.replace(PRESETS["cpu"][1], seeds=1)
RESULTS, LINES = "results.jsonl", 1
KEYS = ("setting", "tasks", "method", "lr", "seed", "row", "task", "others", "factor")


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns the line of the first seed, at the committed rate, all measurements."""
    row, scale = train.Row((data.TARGET,)), config.fashion_mtl
    _, lines = read_rows(pathlib.Path(__file__).parent / "results" / RESULTS)
    rate = next(line["lr"] for line in lines if line.get("tasks") == list(row.tasks))
    problem = data.load(config, "fashion_mtl").select(row.tasks)
    functions = model.make_functions(config, scale, problem)
    return train.run_at(config, scale, problem, functions, row, lr=rate, edge=False)
