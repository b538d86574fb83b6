"""Runs beside the table: the scale of a loss, and agreement under plain SGD."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.alternating.config import SCALED_ROWS, Config
from experiments.alternating.problem import Problem
from experiments.alternating.report import Rows, chosen_rate
from experiments.alternating.train import Evaluator, Run, run_row

ALIGNED_ROWS = ("sgd:mean_T", "sgd:alternating")


def scale(
    config: Config, problem: Problem, rows: Mapping[str, Rows], evaluator: Evaluator
) -> dict[str, Rows]:
    """The last task's loss times every factor, at the rate chosen for a factor of 1."""
    found = {}
    for name in SCALED_ROWS:
        if name in rows:
            lr = chosen_rate(rows[name])
            runs = [
                Run(seed, lr, scale=factor)
                for factor in config.setting(problem.name).scales
                for seed in config.seed_range
            ]
            found[name] = run_row(
                config, problem, name, evaluator, runs=runs, study="scale"
            )
    return {name: found[name] for name in found if found[name]}


def alignment(
    config: Config, problem: Problem, rows: Mapping[str, Rows], evaluator: Evaluator
) -> dict[tuple[str, int], Sequence[Mapping[str, Any]]]:
    """Alternation and the joint step on the sum at one rate, and at a quarter of it.

    The rate is the one chosen for alternation; the smaller one goes four times as long.
    """
    if "sgd:alternating" not in rows:
        return {}
    lr = chosen_rate(rows["sgd:alternating"])
    found = {}
    for part in (1, 4):
        runs = [Run(seed, lr / part) for seed in config.seed_range]
        for name in ALIGNED_ROWS:
            found[name, part] = run_row(
                config,
                problem,
                name,
                evaluator,
                runs=runs,
                study=f"alignment-{part}",
                longer=part,
            )
    return {key: found[key] for key in found if found[key]}
