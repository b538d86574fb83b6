"""Command line of an experiment: presets, options and exit statuses.

The exit status is 0 after success and 1 after an error of the run or its data. It is 2
after an invalid option, and 130 or 143 after a signal.
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

    An error is printed as one sentence. With ``MTLJAX_TRACEBACK=1`` it is raised.

    Args:
      main: Runs the experiment.
      presets: Descriptions and configurations by name.
      name: Name of the package in ``experiments``.
      description: Text for ``--help``.
      default: Preset that is used if the command names none. With None, the command
        shows the help instead.
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
