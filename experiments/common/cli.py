"""The command of an experiment: presets, options, errors and exit statuses.

A command exits with 0 after it finished, with 1 after an error of the run or of its
data, with 2 after an option that cannot be run, and with 130 or 143 after a signal.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from experiments.common.config import ConfigError
from experiments.common.runs import Interrupted
from mtljax.training.cli import run_cli


def run(
    main: Callable[[Any, str], object],
    presets: Mapping[str, tuple[str, Any]],
    name: str,
    description: str,
    default: str | None = None,
) -> None:
    """Reads the command line and calls ``main(config, command)``.

    An error is printed as one sentence; with ``MTLJAX_TRACEBACK=1`` it is raised.

    Args:
      main: Runs the experiment.
      presets: Description and configuration by name.
      name: Of the package in ``experiments``.
      description: For ``--help``.
      default: Preset of a command that names none; None shows the help instead.
    """

    def guarded(config: Any, command: str) -> None:
        try:
            main(config, command)
        except Interrupted:
            return
        except ConfigError as error:
            if os.environ.get("MTLJAX_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    run_cli(
        guarded,
        presets,
        prog=f"python -m experiments.{name}",
        description=description
        + (f" Without a preset, `{default}` runs." if default else ""),
        default=default,
    )
