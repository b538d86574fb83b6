"""Trains the committed single-task row again at each learning rate."""

from typing import Any

from experiments.forkmerge import problem, report, train
from experiments.forkmerge.config import PRESETS, Config

CONFIG, RESULTS = PRESETS["cpu"][1], "results.jsonl"
KEYS = ("part", "method", "target", "aux", "seed", "interval", "lambda", "column")
LINES = 100


def rows(config: Config) -> list[dict[str, Any]]:
    """Returns the reported lines of the row."""
    found = problem.make_problem(config)
    evaluate = problem.make_evaluate(found)
    job = train.make_job(config, found, evaluate, "stl", config.lrs)
    kept = report.reported(train.Run(config, job).finish())
    return list(report.result_lines(kept))
