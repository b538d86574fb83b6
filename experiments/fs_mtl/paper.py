"""Numbers of the paper (arXiv 2211.13723) and of its public logs.

The accuracies are in percent, for ResNet-18, 200 epochs, 3 seeds and the best epoch by
the *test* set. ``paper.json`` stores them by table, line and data set: task 1, task 2,
their average, and its standard deviation if it is published.

- ``table_1``: Table 1 of the paper.
- ``logs``: Tables and logs of the code as of the review. Two averages (LS on
  Fashion+MNIST, F-LS on MultiFashion) differ by 0.05 from those of their tasks.
- ``table_6``: Table 6 of the paper (CAGrad) and the same table of that code (others).
  The 87.49 of second-aggre MGDA is a misprint of the source. Its tasks, 86.76 and
  86.22, have the average 86.49.
"""

import json
import pathlib
from typing import NamedTuple


class Cell(NamedTuple):
    """Means over seeds. None marks a number that is not published."""

    one: float | None
    two: float | None
    average: float
    sd: float | None  # of the average


CONFLICT = {
    "plain": {0: 47, 25: 42, 50: 45, 100: 48, 200: 53},
    "split": {0: 47, 25: 10, 50: 8, 100: 3, 200: 1},
}
"""Figure 3, Multi-MNIST: percent of batches with <g_1, g_2> < 0, read off, ±2."""

_TABLES = json.loads(
    pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
)


def published(name: str, label: str) -> Cell | None:
    """Returns the published number for a line of our table, or None."""
    for table in _TABLES.values():
        if label in table and name in table[label]:
            return Cell(*table[label][name])
    return None
