"""The committed joint row on the faces, trained again."""

from typing import Any

from experiments.alternating import problem, report, train
from experiments.alternating.config import PRESETS, Config

CONFIG, KEYS, LINES = (
    PRESETS["cpu"][1],
    ("study", "row", "column", "seed", "task", "scale"),
    5,
)
RESULTS = "faces/results.jsonl"
DERIVED = (
    *("edge", "late", "delta_m", "gain_over_joint", "val_score_area"),
    *("distance_same_rate", "distance_same_length", "distance_same_loss"),
)


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns the reported lines of the row."""
    faces = problem.make_problem(config, "faces")
    found = train.run_row(config, faces, "joint")
    return [
        {"row": "joint", "column": "chosen", **row} for row in report.chosen_rows(found)
    ]
