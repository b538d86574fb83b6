"""Trains a committed line of equal weights again, with more epochs."""

import dataclasses
from typing import Any

from experiments.fs_mtl import problem, report, train
from experiments.fs_mtl.config import PRESETS, Config, Entry, seed_groups

CONFIG = dataclasses.replace(PRESETS["cpu"][1], seeds=1, equal_passes=False)
RESULTS, LINES = "results.jsonl", 2
KEYS = ("entry", "seed", "column", "study", "rho")
DERIVED = ("late", "plain_intra_conflict")  # of all seeds


def rows(config: Config) -> list[dict[str, Any]]:
    """Its reported lines, of the first seed."""
    entry, name = Entry("linear", "plain"), "multi_mnist"
    subject = problem.make_problem(config, problem.load(config, name))
    probe, score = train.make_probe(config, subject), train.make_score(subject)
    program = train.make_program(config, subject, entry, probe, score)
    found = []
    for seeds in seed_groups(config):
        folder = entry.folder(config, name, seeds)
        found += train.run_entry(
            config, subject, entry, program, seeds=seeds, folder=folder
        )
    epoch = train.steps_per_epoch(config, subject)
    lengths = report.at_lengths(config, entry, found, epoch)
    return report.result_lines(report.Runs(name, subject.names, lengths, {}, epoch))
