"""``python -m tests.rules [NAME ...]``: the table of all balancers and all rules.

A cell is the number of cases, and of violations if there is one; the violations
follow the table. Names restrict the run to the balancers whose id contains one.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from rules.checks import RULES
from rules.subjects import SUBJECTS


def main(names: list[str]) -> int:
    """Prints the table; the number of violations is the exit status, at most 1."""
    columns = [f"{rule.number} {rule.name}" for rule in RULES]
    print(f"{'balancer':44}" + "".join(f"{column:>17}" for column in columns))
    violations, total = [], 0
    for subject in SUBJECTS:
        if names and not any(name in subject.id for name in names):
            continue
        cells = []
        for rule in RULES:
            try:
                outcomes = list(rule.check(subject))
            except Exception as error:
                outcomes = [("the check", f"{type(error).__name__}: {error}")]
            broken = [(what, why) for what, why in outcomes if why is not None]
            violations += [
                f"{subject.id}: {rule.name}: {what}: {why}" for what, why in broken
            ]
            total += len(outcomes)
            cells.append(
                f"{len(outcomes)} ({len(broken)})" if broken else f"{len(outcomes)}"
            )
        print(f"{subject.id:44}" + "".join(f"{c:>17}" for c in cells), flush=True)
    print(*violations, sep="\n")
    print(f"rules: {total} cases, {len(violations)} violations")
    return int(bool(violations))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
