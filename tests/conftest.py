import gc
import os
import pathlib
import subprocess
import sys

import jax
import jaxtyping
import pytest
from registry import CLASSICS

import mtljax

jax.config.update("jax_numpy_rank_promotion", "raise")

CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache"


def pytest_configure(config):
    """The suite is bound by compilation: less of it by default, none of it twice.

    Programs are compiled as users compile them in deep runs, and not kept: XLA has
    crashed once in writing such a program. The environment is for the processes that
    tests start.
    """
    if config.getoption("markexpr") != "not deep":
        return
    # Programs of earlier tests stay in caches. Collections would visit all of them.
    gc.set_threshold(50_000, 50, 100)
    _skip_fusion_emitters()
    options = {
        "jax_compilation_cache_dir": str(CACHE),
        "jax_disable_most_optimizations": True,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


WITHOUT_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def _skip_fusion_emitters():
    """Shortens compilation by about a third if XLA has the flag.

    XLA aborts the process on an unknown flag, so another process tries it first. The
    workers of a parallel run find the flag in their environment.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if WITHOUT_EMITTERS.removesuffix("=false") in flags:
        return
    flags = f"{flags} {WITHOUT_EMITTERS}".strip()
    tried = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices('cpu')"],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        check=False,
    )
    if tried.returncode == 0:
        os.environ["XLA_FLAGS"] = flags


def pytest_collection_finish(session):
    """The tests of one process run on one device, whatever modules are imported."""
    del session
    flags = os.environ.get("XLA_FLAGS", "")
    if "device_count" in flags:
        raise pytest.UsageError(f"A collected module has set XLA_FLAGS to {flags!r}.")


@pytest.fixture
def as_users():
    """Signatures are checked in tests only; this shows the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def deep_run(request):
    """Whether deep tests run too, so that a test may take more examples."""
    return request.config.getoption("markexpr") != "not deep"


def pytest_terminal_summary(terminalreporter):
    """Counts the inputs on which the promises and the rules were checked."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call"
    ]
    counts = [
        (dict(report.user_properties)["property_cases"], report.failed)
        for report in reports
        if "property_cases" in dict(report.user_properties)
    ]
    if counts:
        total = sum(count for count, _ in counts)
        broken = sum(failed for _, failed in counts)
        terminalreporter.write_line(
            f"properties: {total} cases of {len(counts)} promises, {broken} violations"
        )
    faults = [
        properties
        for properties in (dict(report.user_properties) for report in reports)
        if "fault_cases" in properties
    ]
    if faults:
        total, broken = (
            sum(row[f"fault_{what}"] for row in faults)
            for what in ("cases", "violations")
        )
        terminalreporter.write_line(
            f"faults: {total} cases of {len(faults)} rows, {broken} violations"
        )


TESTS_OF_ONE_CACHE = 100
_finished = 0


def pytest_runtest_teardown(item):
    """Frees compiled programs now and then.

    XLA maps memory for every program, and the system limits the number of mappings: a
    worker that kept all programs of the suite has crashed.
    """
    global _finished  # noqa: PLW0603
    _finished += 1
    if _finished % TESTS_OF_ONE_CACHE == 0:
        jax.clear_caches()


LATE = {f"test_{name}" for name in set(mtljax.METHODS) - CLASSICS}
LATE |= {"test_wrappers", "test_implicit", "test_cone", "test_conditional"}
LATE |= {"test_fs_mtl", "test_igb", "test_experiment"}  # experiments of minutes
LATE |= {"test_gramian_engine", "test_flat_split", "test_perturbation"}
LATE |= {"test_driver", "test_branches", "test_auto_lambda"}  # forkmerge
LATE |= {"test_composition", "test_clocks"}  # alternating
LATE |= {"test_forkmerge", "test_trajectories"}  # experiments
LATE |= {"test_covariance", "test_curvature", "test_geometry"}  # trajectory
LATE |= {"test_probe", "test_sharpness", "test_fisher", "test_analysis"}
LATE |= {"test_bargaining", "test_max_min_ball"}  # their methods run by default


SLOW = pathlib.Path(__file__).with_name("slow.txt")


def pytest_collection_modifyitems(config, items):
    """What costs seconds of compilation runs in deep: see tests/registry.py, slow.txt.

    Every line of slow.txt is the name of one test. A line whose file is collected
    without such a test is an error, so that the list follows the tests.
    """
    lines = SLOW.read_text().splitlines()
    slow = {line for line in lines if line and not line.startswith("#")}
    names = {item.nodeid: item for item in items}
    for item in items:
        if item.path.stem in LATE or item.nodeid in slow:
            item.add_marker(pytest.mark.deep)
    whole = not any("::" in arg for arg in config.args)
    files = {name.split("::")[0] for name in names}
    lost = [n for n in slow - set(names) if n.split("::")[0] in files]
    if whole and lost:
        raise pytest.UsageError(f"tests/slow.txt names tests that are gone: {lost}")
