"""``python -m mtljax`` prints the tables of all methods and wrappers."""

import argparse
import os
import sys
from collections.abc import Sequence

import mtljax
from mtljax.catalogue import WRAPPERS, wrappers_table
from mtljax.methods import METHODS, methods_table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of methods and wrappers, or the version.

    Args:
      arguments: Command-line arguments. By default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="mtljax", description="Lists the methods and the wrappers of mtljax."
    )
    version = f"mtljax {mtljax.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.parse_args(arguments)
    try:
        print(methods_table())
        print()
        print(wrappers_table())
        print(f"\n{len(METHODS)} methods and {len(WRAPPERS)} wrappers.", flush=True)
    except BrokenPipeError:  # the reading process, for example `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
