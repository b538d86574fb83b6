"""Trains the committed row of equal weights on a table again."""

from typing import Any

from experiments.igb import train
from experiments.igb.config import PRESETS, Config

CONFIG, KEYS, LINES = (
    PRESETS["cpu"][1],
    ("method", "column", "seed", "lr", "step", "task"),
    10,
)
RESULTS = "mulan_mtr-enb/results.jsonl"
DERIVED = ("val_delta", "delta_m", "late", "signal_r2")


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns all evaluations, because the selection uses all single-task rows."""
    problem = train.make_problem(config, "mulan_mtr/enb")
    found = train.run_method(config, problem, "linear", config.table.lrs)
    return [
        {"method": "linear", "column": "chosen", **row}
        for row in found
        if row["kind"] == "eval"
    ]
