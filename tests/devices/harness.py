"""Runs many cases on eight virtual devices in one process, and reports each of them.

The number of devices is fixed when JAX starts, so the cases of a file run in a
process of their own: ``python -m devices.harness devices.matrix`` reads the names of
cases from standard input and writes one JSON line for each. :func:`make_tests` makes a
parametrised test from the cases, which pytest selects and reports one by one.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 8
SECONDS = 900  # of one process; a case of a minute is a fault


class Case(NamedTuple):
    """One check, run in the process with eight devices.

    Attributes:
      name: The id of the test.
      run: Raises AssertionError if the result is wrong, :class:`Skip` if the case
        does not exist in this version of JAX.
      deep: Whether it runs in deep runs only.
    """

    name: str
    run: Callable[[], None]
    deep: bool = False


class Skip(Exception):
    """JAX itself cannot do what the case asks for."""


def environment(devices: int = DEVICES) -> dict[str, str]:
    """The environment of a process with virtual CPU devices."""
    env = dict(os.environ)
    # Programs for eight devices are not worth the space of the cache.
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    flags = env.get("XLA_FLAGS", "")
    return env | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }


def _report(case: Case) -> dict[str, Any]:
    """Runs a case; what went wrong is a text that can be read alone."""
    start = time.process_time()  # of all threads: other programs do not count
    status, message = "passed", ""
    try:
        case.run()
    except Skip as reason:
        status, message = "skipped", str(reason)
    except AssertionError as error:
        status = "failed"
        message = str(error) or traceback.format_exc(limit=-1)
    except Exception as error:
        status = "failed"
        lines = traceback.format_tb(error.__traceback__)
        text = f"{type(error).__name__}: {error}"[:1500]
        message = f"{text}\n{''.join(lines[-6:])}"
    seconds = round(time.process_time() - start, 2)
    return {"name": case.name, "status": status, "message": message, "s": seconds}


def main() -> None:
    """Runs the cases named on standard input, in the order of the module."""
    names = set(json.loads(sys.stdin.read()))
    module = importlib.import_module(sys.argv[1])
    for case in module.CASES:
        if case.name in names:
            print(json.dumps({"name": case.name, "status": "started"}), flush=True)
            print(json.dumps(_report(case)), flush=True)


def _process(module: str, names: Iterable[str], optimise: bool) -> dict[str, Any]:
    env = environment()
    if optimise:
        env.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, "-m", "devices.harness", module]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(list(names)),
            capture_output=True,
            text=True,
            env=env,
            cwd=ROOT,
            check=False,
            timeout=SECONDS,
        )
        out, err, end = done.stdout, done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        out, err = (
            (x or b"").decode(errors="replace") for x in (late.stdout, late.stderr)
        )
        end = f"no end after {SECONDS} s"
    reports = {}
    for line in out.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            reports[found["name"]] = found
    for report in reports.values():
        if report["status"] == "started":  # it took the process with it
            message = f"the process ended in this case ({end}): {err[-2000:]}"
            report |= {"status": "failed", "message": message}
    if not reports:
        raise RuntimeError(f"{module} ran no case ({end}): {err[-2000:]}")
    return reports


def run_cases(
    module: str, names: Iterable[str], *, optimise: bool = False
) -> dict[str, Any]:
    """A report for every name; a case that ends the process costs only itself."""
    missing, reports = list(names), {}
    while missing:
        reports |= _process(module, missing, optimise)
        missing = [name for name in missing if name not in reports]
    return reports


def make_tests(
    module: Any, *, normal: Iterable[str] = (), optimise: bool = False
) -> Callable[..., None]:
    """A parametrised test of the module's ``CASES``, from one process for all.

    Args:
      normal: The cases of the normal suite, by default all that are not deep.
      module: Has ``CASES``; it is imported here too, so it must not start devices.
      optimise: Compile as users do, for cases that read the compiled program.
    """
    names = [case.name for case in module.CASES]
    assert len(set(names)) == len(names), "two cases have one name"
    assert set(normal) <= set(names), set(normal) - set(names)
    chosen = set(normal) or set(names)
    found: dict[str, Any] = {}
    parameters = [
        pytest.param(
            case.name,
            marks=[pytest.mark.deep] if case.deep or case.name not in chosen else [],
            id=case.name,
        )
        for case in module.CASES
    ]

    @pytest.mark.xdist_group(f"devices_{module.__name__}")
    @pytest.mark.parametrize("case", parameters)
    def test(case, request):
        if case not in found:
            here = request.node.originalname, request.node.path
            selected = [
                item.callspec.params["case"]
                for item in request.session.items
                if (getattr(item, "originalname", None), item.path) == here
            ]
            found.update(run_cases(module.__name__, selected, optimise=optimise))
        report = found[case]
        if report["status"] == "skipped":
            pytest.skip(report["message"])
        if report["status"] != "passed":
            pytest.fail(report["message"], pytrace=False)

    return test


if __name__ == "__main__":
    # The cases raise the Skip of the imported module, not that of "__main__".
    importlib.import_module("devices.harness").main()
