"""Who may import whom, read from the sources; design.md calls them floors."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "mtljax"

FLOORS = [
    {"types", "stack", "solvers", "balancer", "per_task", "metrics"},
    {"methods", "gradients", "wrappers"},
    {"sharpness", "alternating", "forkmerge", "trajectory"},
    {"catalogue", "__main__"},
    {"models", "data", "training"},
]
CORE = set().union(*FLOORS[:4])
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED = {"jax", "optax", "jaxtyping"}


def imports(file):
    """Absolute dotted names of everything a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the floor"
            # `from mtljax import stack` imports mtljax.stack.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    return [file for file in files if file != PACKAGE / "__init__.py"]


def rooms_imported(file):
    for name in imports(file):
        package, *rest = name.split(".")
        if package == "mtljax" and rest and rest[0] in LEVEL:
            yield rest[0]


def test_every_room_has_a_floor():
    assert {room_of(file) for file in sources()} <= set(LEVEL)


def test_floors():
    for file in sources():
        own = room_of(file)
        for room in rooms_imported(file):
            assert LEVEL[room] <= LEVEL[own], f"{file}: {own} must not import {room}"


def test_the_rooms_of_the_ground_floor():
    """What a method is built from, in order; none looks at a room to its right."""
    order = ["types", "stack", "solvers", "balancer", "per_task"]
    for file in sources():
        own = room_of(file)
        if own in order:
            for room in rooms_imported(file):
                assert order.index(room) <= order.index(own), f"{file} imports {room}"


def test_methods_and_gradients_do_not_know_each_other():
    for file in sources():
        other = {"methods": "gradients", "gradients": "methods"}.get(room_of(file))
        assert other not in set(rooms_imported(file)), file


def test_the_core_imports_jax_optax_jaxtyping_and_the_standard_library():
    standard = set(sys.stdlib_module_names)
    core = [file for file in sources() if room_of(file) in CORE]
    for file in [*core, PACKAGE / "__init__.py"]:
        roots = {name.split(".")[0] for name in imports(file)}
        assert roots <= ALLOWED | standard | {"mtljax"}, file
        assert not {"models", "data", "training"} & set(rooms_imported(file)), file


def defines_its_factory(file):
    """``_x.py`` with a function ``x`` is a method; the others help several."""
    body = ast.parse(file.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    return file.stem.removeprefix("_") in names


def test_methods_never_import_each_other():
    files = [f for f in (PACKAGE / "methods").glob("_[a-z]*.py")]
    methods = {f"mtljax.methods.{f.stem}" for f in files if defines_its_factory(f)}
    assert len(methods) >= 11
    for file in files:
        if file.stem == "_registry":
            continue
        found = {n.rpartition(".")[0] for n in imports(file)} & methods
        assert not found, f"{file} imports {found}"


def test_experiments_never_import_each_other_and_nobody_imports_them():
    for file in (ROOT / "experiments").rglob("*.py"):
        own = file.relative_to(ROOT / "experiments").parts[0].removesuffix(".py")
        for name in imports(file):
            package, *rest = name.split(".")
            if package == "experiments" and rest:
                assert rest[0] in (own, "common"), f"{file} imports {name}"
    for file in sources():
        assert not any(n.split(".")[0] == "experiments" for n in imports(file)), file


def test_the_reader_of_imports_reads_them_all(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b as c\nfrom mtljax import stack\ndef f():\n    from d import e\n"
    )
    assert set(imports(file)) == {"a.b", "mtljax.stack", "d.e"}
    file.write_text("from . import x\n")
    with pytest.raises(AssertionError, match="relative"):
        list(imports(file))


def test_importing_mtljax_loads_nothing_heavy():
    """jax itself brings numpy, scipy and etils, optax brings absl."""
    heavy = {"flax", "orbax", "tensorflow", "tensorflow_datasets", "grain", "sklearn"}
    heavy |= {"matplotlib", "chex", "equinox", "rich", "tyro", "tensorboardX", "PIL"}
    heavy |= {"pandas", "torch", "beartype"}
    code = (
        "import sys, mtljax; "
        f"print(*sorted({heavy!r} & {{m.split('.')[0] for m in sys.modules}}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert out.stdout.split() == []
