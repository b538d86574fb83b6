"""``import mtljax`` names every module, imports the core, and explains extras."""

import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import mtljax
from mtljax import extras

ROOT = pathlib.Path(__file__).parent.parent

# Refuses to import the modules of a set, as if they were not installed.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""
TRAIN = {"flax", "orbax", "grain", "tensorflow_datasets", "sklearn", "rich", "tyro"}
TRAIN |= {"matplotlib", "PIL", "array_record", "tensorboardX", "chex"}


def run(code, blocked=frozenset()):
    """A fresh interpreter, in which some modules cannot be imported."""
    text = f"BLOCKED = {set(blocked)!r}\n{BLOCK}\n{code}"
    return process("-c", text)


def process(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def modules():
    found = {module.name for module in pkgutil.iter_modules(mtljax.__path__)}
    return sorted(name for name in found if not name.startswith("_"))


def test_every_public_module_is_an_attribute():
    names = modules()
    assert {"training", "trajectory", "models", "data", "gradients"} <= set(names)
    lines = "\n".join(f"assert mtljax.{name}.__name__" for name in names)
    done = run(f"import mtljax\n{lines}")
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_error_with_the_name_and_the_module():
    """Python compares these with ``dir``, and adds similar names to the traceback."""
    with pytest.raises(AttributeError, match="no attribute 'nashmtl'") as caught:
        mtljax.nashmtl  # noqa: B018
    assert (caught.value.name, caught.value.obj) == ("nashmtl", mtljax)


def test_dir_lists_modules_before_they_are_imported():
    done = run("import mtljax; print(*dir(mtljax))")
    names = done.stdout.split()
    assert set(names) >= {*modules(), *mtljax.__all__, "__version__"}
    assert not [name for name in names if name.startswith("_") and name[1] != "_"]


def test_modules_are_imported_at_their_first_use():
    code = """
import mtljax
lazy = {f"mtljax.{name}" for name in ("data", "models", "training", "trajectory")}
assert not lazy & set(sys.modules)
mtljax.trajectory.Probe
assert lazy & set(sys.modules) == {"mtljax.trajectory"}
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["nothing", "_modules_", "__wrapped__", "data.types"])
def test_other_names_are_no_attributes(name):
    with pytest.raises(AttributeError, match=f"'mtljax' has no attribute '{name}'"):
        getattr(mtljax, name)


def test_the_core_runs_without_the_extras():
    code = """
import jax.numpy as jnp
import mtljax
from mtljax import *
core = [n for n in NAMES if n not in ("data", "models", "training")]
assert all(getattr(mtljax, name) for name in core)
balancer = mtljax.upgrad(2)
update, _ = balancer.update(jnp.eye(2), balancer.init(None))
assert update.shape == (2,)
"""
    done = run(f"NAMES = {modules()!r}\n{code}", TRAIN)
    assert done.returncode == 0, done.stderr


STATEMENTS = {
    "import mtljax; mtljax.training.fit": "mtljax.training",
    "from mtljax import training": "mtljax.training",
    "import mtljax.training": "mtljax.training",
    "from mtljax.training import fit": "mtljax.training",
    "from mtljax.training.plots import loss_curves": "mtljax.training",
    "import mtljax; mtljax.models": "mtljax.models",
    "import mtljax.models": "mtljax.models",
    "import mtljax; mtljax.data.multidigits()": "mtljax.data.multidigits",
    "import mtljax; mtljax.data.tfds_source('m', 'a')": "mtljax.data.tfds_source",
    "from mtljax import data; data.stream({'x': [0]}, 1, seed=0)": "mtljax.data.stream",
}


def test_a_missing_extra_is_one_sentence():
    code = """
import traceback
for statement in STATEMENTS:
    try:
        exec(statement)
    except ImportError as error:
        assert error.__cause__ is None and error.__suppress_context__ is False
        assert error.__context__ is None
        print(traceback.format_exception_only(error)[-1].strip())
    else:
        print("no error")
"""
    done = run(f"STATEMENTS = {list(STATEMENTS)!r}\n{code}", TRAIN)
    assert done.returncode == 0, done.stderr
    lines = dict(zip(STATEMENTS, done.stdout.splitlines(), strict=True))
    for statement, user in STATEMENTS.items():
        start = f'ModuleNotFoundError: {user} needs the extra "train": '
        start += "pip install 'mtljax[train]' (no module named '"
        assert lines[statement].startswith(start), lines[statement]


def test_a_missing_extra_can_be_caught():
    code = """
try:
    from mtljax import training
except ImportError as error:
    assert error.name == "orbax.checkpoint"
import mtljax
assert "training" in dir(mtljax)
"""
    done = run(code, {"orbax"})
    assert done.returncode == 0, done.stderr


def test_require_searches_and_does_not_import():
    done = run(
        "from mtljax.extras import require\n"
        "require('x', 'train', 'orbax.checkpoint', 'sklearn')\n"
        "print('orbax.checkpoint' in sys.modules, 'sklearn' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("module", ["missing_module", "json.missing", "sys.x"])
def test_require_names_the_module(module):
    with pytest.raises(ModuleNotFoundError, match=module) as caught:
        extras.require("user", "train", "json", module)
    assert caught.value.name == module


def test_the_version_needs_no_installation():
    code = """
import importlib.metadata
def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
kept = importlib.metadata.version
importlib.metadata.version = lambda n: missing(n) if n == "mtljax" else kept(n)
import mtljax
print(mtljax.__version__)
"""
    done = run(code)
    assert done.stdout.split() == [mtljax.__version__], done.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", mtljax.__version__)


def test_the_distribution_reads_the_version_from_the_package():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "mtljax/__init__.py"


def test_chex_is_an_extra_of_the_tests_only():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    holders = {
        extra
        for extra, requirements in extras.items()
        if any(re.match(r"chex\b", requirement) for requirement in requirements)
    }
    assert holders == {"test"}
    for file in (ROOT / "mtljax").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) chex", file.read_text(), re.M), file


@pytest.mark.parametrize("command", [["--version"], ["--help"], []])
def test_the_command(command):
    done = process("-m", "mtljax", *command)
    assert done.returncode == 0, done.stderr
    first = {"--version": f"mtljax {mtljax.__version__}", "--help": "usage: mtljax"}
    expected = first[command[0]] if command else "nash_mtl"
    assert expected in done.stdout
    assert ("nash_mtl" in done.stdout) == (not command)


def test_the_command_survives_a_reader_that_stops():
    with subprocess.Popen(
        [sys.executable, "-m", "mtljax"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # as of a process that SIGPIPE stopped
