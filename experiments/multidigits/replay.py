"""Trains the committed row of equal weights again."""

from typing import Any

from experiments.common.selection import select
from experiments.multidigits import train
from experiments.multidigits.config import PRESETS, Config

CONFIG, RESULTS = PRESETS["demo"][1], "results.jsonl"
KEYS, LINES = ("method", "seed", "task"), 3


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns the reported lines of the row."""
    problem = train.make_problem(config)
    program = train.make_program(config, problem, "linear")
    found = train.run_method(config, problem, "linear", program)
    return [{"method": "linear", **row} for row in select(found).rows]
