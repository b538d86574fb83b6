"""Command line of an experiment: presets, options and exit statuses.

The exit status is 0 after success and 1 after an error of the run or its data. It is 2
after an invalid option, and 130 or 143 after a signal.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from experiments.common.config import ConfigError
from mtljax.training.cli import run_cli


def make_cli(
    main: Callable[[Any, str], object], name: str, default: str | None = None
) -> Callable[[], None]:
    """Returns the command of an experiment, which calls ``main(config, command)``.

    Its presets are those of ``experiments.NAME.config``, and the description is the
    docstring of the package. An error is printed as one sentence. With
    ``MTLJAX_TRACEBACK=1`` it is raised.

    Args:
      main: Runs the experiment.
      name: Name of the package in ``experiments``.
      default: Preset that is used if the command names none. With None, the command
        shows the help instead.
    """

    def guarded(config: Any, command: str) -> None:
        try:
            main(config, command)
        except ConfigError as error:
            if os.environ.get("MTLJAX_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return functools.partial(
        run_cli,
        guarded,
        importlib.import_module(f"experiments.{name}.config").PRESETS,
        prog=f"python -m experiments.{name}",
        description=str(importlib.import_module(f"experiments.{name}").__doc__)
        + (f" Without a preset, `{default}` runs." if default else ""),
        default=default,
    )
