"""Command line of an experiment: presets, overrides and errors."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mtljax.extras import require
from mtljax.training._signals import Signals


def run_cli(
    main: Callable[[Any, str], object],
    presets: Mapping[str, tuple[str, Any]],
    *,
    prog: str,
    description: str,
    default: str | None = None,
) -> None:
    """Reads ``sys.argv`` and calls ``main(config, command)``.

    A user error (``ValueError``, ``OSError``, ``RuntimeError``) is printed as one
    sentence, and the exit status is 1. If the environment variable ``MTLJAX_TRACEBACK``
    is 1, the error is raised. If the config has ``quick_compile`` set, XLA skips its
    optimisations.

    The exit status is 130 after SIGINT and 143 after SIGTERM, independently of
    ``main``. A signal inside :func:`~mtljax.training.fit` saves the run, and later
    calls of ``fit`` make no steps. Outside ``fit``, a signal stops ``main``
    immediately.

    Args:
      main: Function that runs the experiment. Its second argument is the command, a
        label for the results.
      presets: Descriptions and configurations (dataclasses) by name, as Tyro takes
        them.
      prog: The program name in the help text.
      description: Purpose of the command, for ``--help``.
      default: Preset of a command that names none. With None, the command shows the
        help instead.

    Examples:
      >>> import dataclasses, sys
      >>> from mtljax.training.cli import run_cli
      >>> @dataclasses.dataclass
      ... class Config:
      ...     steps: int = 10
      >>> sys.argv = ["prog", "short", "--steps", "3"]
      >>> run_cli(lambda config, command: print(config.steps, "-", command),
      ...         {"short": ("Seconds.", Config())}, prog="prog", description="")
      3 - prog short --steps 3
    """
    require("mtljax.training.cli", "train", "tyro")
    import tyro

    arguments = sys.argv[1:]
    help_wanted = bool({"-h", "--help"} & set(arguments[:1]))
    if not help_wanted and (not arguments or arguments[0].startswith("-")):
        arguments = ["--help"] if default is None else [default, *arguments]
    config = tyro.extras.overridable_config_cli(
        dict(presets), args=arguments, prog=prog, description=description
    )
    if getattr(config, "quick_compile", False):
        jax.config.update("jax_disable_most_optimizations", True)
    with Signals(leave=True) as signals:
        signals.reported = True
        status = 0
        try:
            main(config, " ".join([prog, *without_paths(arguments)]))
        except (ValueError, OSError, RuntimeError) as error:
            if os.environ.get("MTLJAX_TRACEBACK"):
                raise
            status = 1
            print(f"error: {error}", file=sys.stderr)
        except (KeyboardInterrupt, SystemExit):
            if signals.number is None:
                raise
        if signals.number is not None:
            status = 128 + signals.number
            print(f"Stopped by {signals.name}.", file=sys.stderr)
        if status:
            sys.exit(status)


def without_paths(arguments: Sequence[str]) -> list[str]:
    """Returns a command as results quote it, without paths of data and results.

    Examples:
      >>> from mtljax.training.cli import without_paths
      >>> without_paths(["cpu", "--data-dir", "/my/files", "--out=x", "--seeds", "2"])
      ['cpu', '--data-dir', 'DIR', '--seeds', '2']
    """
    shown: list[str] = []
    words = iter(arguments)
    for word in words:
        name, given, _ = word.partition("=")
        if name in ("--data-dir", "--data_dir", "--out", "--report-to"):
            if not given:
                next(words, None)
            shown += ["--data-dir", "DIR"] if name.startswith("--data") else []
        else:
            shown.append(word)
    return shown
