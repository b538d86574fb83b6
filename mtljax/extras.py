"""The check for the optional dependencies of a module."""

import importlib.util
import sys


def require(user: str, extra: str, *modules: str) -> None:
    """Raises one sentence with the pip command if an optional dependency is missing.

    The function searches for the modules and does not import them, so that the check
    costs no import time.

    Args:
      user: Name of the module that needs them, for example ``"mtljax.training"``.
      extra: Name of the extra of this distribution that installs them.
      *modules: Absolute names of modules, for example ``"orbax.checkpoint"``.

    Raises:
      ModuleNotFoundError: If one of the modules is not installed. The attribute
        ``name`` is the name of that module.

    Examples:
      >>> from mtljax.extras import require
      >>> require("mtljax.training", "train", "json")
      >>> require("mtljax.training", "train", "module_that_is_missing")
      Traceback (most recent call last):
      ModuleNotFoundError: mtljax.training needs the extra "train": ...
    """
    for module in modules:
        if not _is_installed(module):
            raise ModuleNotFoundError(
                f"{user} needs the extra \"{extra}\": pip install 'mtljax[{extra}]' "
                f"(no module named {module!r}).",
                name=module,
            )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a missing parent; a module without a spec
        return module in sys.modules
