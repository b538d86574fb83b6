"""The committed row of equal weights on a table, trained again."""

from typing import Any

from experiments.igb import train
from experiments.igb.config import PRESETS, Config

CONFIG, KEYS, LINES = PRESETS["cpu"][1], ("method", "seed", "step", "task"), 3
RESULTS, DERIVED = "mulan_mtr-wq/results.jsonl", ("val_delta",)


def rows(config: Config) -> list[dict[str, Any]]:
    """All its evaluations: the committed ones were chosen by all single-task rows."""
    problem = train.make_problem(config, "mulan_mtr/wq")
    program = train.make_program(config, problem, "linear")
    found = train.run_method(config, problem, "linear", program).rows
    return [{"method": "linear", **row} for row in found if row["kind"] == "eval"]
