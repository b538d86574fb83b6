"""The committed rows of the target of FashionMTL alone, trained again."""

from typing import Any

from experiments.trajectories import data, model, train
from experiments.trajectories.config import PRESETS, Config

CONFIG, RESULTS = PRESETS["cpu"][1], "results.jsonl"
KEYS = ("setting", "tasks", "method", "lr", "seed", "row", "task", "others", "factor")
LINES = 5


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns its lines: the selected rate, and all measurements."""
    row, scale = train.Row((data.TARGET,)), config.fashion_mtl
    problem = data.load(config, "fashion_mtl").select(row.tasks)
    functions = model.make_functions(config, scale, problem)
    choice, _ = train.choose_rate(config, scale, problem, lambda _: functions)
    assert choice.lr is not None
    edge = choice.edge is not None
    return train.run_at(config, scale, problem, functions, row, lr=choice.lr, edge=edge)
