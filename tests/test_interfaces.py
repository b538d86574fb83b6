"""No public function asks for more than twelve things."""

import importlib
import inspect
import pkgutil

import mtljax

LIMIT = 12
# Above the limit today. The list is complete, and nothing may be added to it.
ABOVE = {
    "mtljax.alternating._alternate.alternate": 21,
    "mtljax.forkmerge._driver.ForkMerge.__init__": 20,
    "mtljax.forkmerge._search.search_merge": 14,
    "mtljax.methods._igb_v2.igb_v2": 24,
    "mtljax.sharpness._flat_grad.value_and_flat_grad": 20,
    "mtljax.sharpness._rows.make_engine": 13,
    "mtljax.sharpness._sam_grads.sam_task_grads": 14,
}


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
    found = too_many()
    assert {name: n for name, n in found.items() if n > ABOVE.get(name, LIMIT)} == {}
