"""The committed line of equal weights, trained and measured again."""

import dataclasses
from typing import Any

from experiments.fs_mtl import analysis, problem, report, train
from experiments.fs_mtl.config import PRESETS, Config, Entry

CONFIG, RESULTS = PRESETS["cpu"][1], "results.jsonl"
KEYS, LINES = ("entry", "seed"), 3


def rows(config: Config) -> list[dict[str, Any]]:
    """Its reported lines, without the landscape."""
    config, entry = dataclasses.replace(config, landscape=0), Entry("linear", "plain")
    subject = problem.make_problem(config, problem.load(config, "multi_mnist"))
    probe, score = train.make_probe(config, subject), train.make_score(subject)
    program = train.make_program(config, subject, entry, probe, score)
    seeds = list(config.seed_range)
    place: dict[str, Any] = {"seeds": seeds, "folder": config.out / "run"}
    found = train.run_entry(config, subject, entry, program, **place)
    tools = analysis.make_instruments(config, subject, None)
    measured = analysis.analyse(config, entry, found.state, tools, **place)
    name, tasks = "multi_mnist", subject.names
    runs = report.Runs(name, tasks, {entry: found.rows}, {entry: measured}, 1)
    return report.result_lines(runs)
