"""No public function asks for more than twelve things."""

import importlib
import inspect
import pkgutil

import mtljax

LIMIT = 12


def public_functions():
    """All functions and methods with public names, of all modules of the package."""
    for info in pkgutil.walk_packages(mtljax.__path__, "mtljax."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            if inspect.isclass(value):
                for key, method in vars(value).items():
                    if key == "__init__" or not key.startswith("_"):
                        function = getattr(method, "__func__", method)
                        if inspect.isfunction(function):
                            yield f"{info.name}.{name}.{key}", function
            elif callable(value):
                yield f"{info.name}.{name}", value


def too_many():
    found = {}
    for name, function in public_functions():
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            continue
        count = len([p for p in parameters if p != "self"])
        if count > LIMIT:
            found[name] = count
    return found


def test_every_interface_is_small():
    assert too_many() == {}
