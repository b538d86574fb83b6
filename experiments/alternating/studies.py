"""Runs in addition to the table: the scale of a loss."""

from collections.abc import Mapping

from experiments.alternating.config import SCALED_ROWS, Config
from experiments.alternating.problem import Problem
from experiments.alternating.report import Rows, chosen_rate
from experiments.alternating.train import Evaluator, Run, run_row


def scale(
    config: Config, problem: Problem, rows: Mapping[str, Rows], evaluator: Evaluator
) -> dict[str, Rows]:
    """Multiplies the last task's loss by each factor, at the rate selected for 1."""
    found = {}
    for name in SCALED_ROWS:
        if name in rows:
            lr = chosen_rate(rows[name])
            runs = [
                Run(seed, lr, scale=factor)
                for factor in config.setting(problem.name).scales
                for seed in config.seeds_of(problem.name)
            ]
            found[name] = run_row(
                config, problem, name, evaluator, runs=runs, study="scale"
            )
    return {name: found[name] for name in found if found[name]}
