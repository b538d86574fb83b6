"""Experiments that use mtljax. Each package has its own command."""

import os
import signal
import sys


def _leave(number: int, _frame: object) -> None:
    """Ends a command that is still importing; there is nothing to save yet."""
    os.write(2, b"Interrupted.\n")
    os._exit(128 + number)


if sys.argv[:1] == ["-m"]:  # `python -m experiments.NAME` is locating its module
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
