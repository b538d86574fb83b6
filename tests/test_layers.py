"""Who may import whom, read from the sources; design.md calls them floors."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "mtljax"

FLOORS = [
    {"types", "placement", "stack", "solvers", "balancer", "per_task", "metrics"}
    | {"extras"},
    {"methods", "gradients", "wrappers", "missing"},
    {"sharpness", "alternating", "forkmerge", "trajectory"},
    {"catalogue"},
    {"models", "data", "training"},
    {"__main__"},  # imports the extra when a command needs it
]
CORE = set().union(*FLOORS[:4])
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ALLOWED = {"jax", "optax", "jaxtyping", "numpy"}


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
    order = ["types", "placement", "stack", "solvers", "balancer", "per_task"]
    for file in sources():
        own = room_of(file)
        if own in order:
            for room in rooms_imported(file):
                assert order.index(room) <= order.index(own), f"{file} imports {room}"


TYPES = r"\b(mat\.varying|vma|pcast|pvary|AxisType|auto_axes|reshard)\b"


def test_only_placement_knows_about_varying_axes_and_explicit_shardings():
    """The names of these features differ between JAX versions."""
    allowed = {"placement.py", "_primitives.py"}
    for file in sources():
        # Runs make meshes of their own.
        if room_of(file) in CORE and file.name not in allowed:
            code = re.sub(r'""".*?"""|#.*', "", file.read_text(), flags=re.DOTALL)
            assert not re.search(TYPES, code), file


def test_the_gramian_engine_and_the_rewriting_do_not_know_each_other():
    folders = {"_gramian": "_rewrite", "_rewrite": "_gramian"}
    for folder, other in folders.items():
        for file in (PACKAGE / "gradients" / folder).glob("*.py"):
            assert not any(f".{other}" in name for name in imports(file)), file


def test_methods_and_gradients_do_not_know_each_other():
    for file in sources():
        other = {"methods": "gradients", "gradients": "methods"}.get(room_of(file))
        assert other not in set(rooms_imported(file)), file


def test_the_core_imports_its_dependencies_and_the_standard_library():
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


def private_imports(file, root=ROOT):
    """Names with an underscore that a file imports from another subpackage.

    A private name of ``a.b`` belongs to ``a.b`` and to everything below it. What is
    private in a package of the top belongs to that package alone, not to its
    subpackages.
    """
    own = file.relative_to(root).with_suffix("").parts
    for name in imports(file):
        parts = name.split(".")
        private = [part.startswith("_") and part != "__main__" for part in parts]
        if parts[0] not in PACKAGES or True not in private:
            continue
        holder = tuple(parts[: private.index(True)])
        inside = own[: len(holder)] == holder and (len(holder) > 1 or len(own) <= 2)
        if not inside:
            yield name


PACKAGES = {"mtljax", "experiments", "notebooks"}


def test_no_subpackage_imports_a_private_name_of_another():
    files = [file for top in sorted(PACKAGES) for file in (ROOT / top).rglob("*.py")]
    assert len(files) > 100
    found = {
        (file.relative_to(ROOT).as_posix(), name)
        for file in files
        for name in private_imports(file)
    }
    assert not found


@pytest.mark.parametrize(
    ("place", "line", "private"),
    [
        ("mtljax/a/_x.py", "from mtljax.a._y import z", False),
        ("mtljax/a/_x.py", "from mtljax.a._b._y import z", False),
        ("mtljax/a/_b/_x.py", "from mtljax.a._y import z", False),
        ("mtljax/a/_x.py", "from mtljax.b._y import z", True),
        ("mtljax/a/_x.py", "from mtljax.b import _y", True),
        ("mtljax/a/_x.py", "import mtljax.b._y", True),
        ("mtljax/a/_x.py", "def f():\n    from mtljax.b._y import z", True),
        ("mtljax/a/_x.py", "from mtljax import _y", True),
        ("mtljax/x.py", "from mtljax import _y", False),
        ("mtljax/x.py", "from mtljax.a import y as _y", False),
        ("experiments/a/train.py", "from mtljax.b._y import z", True),
        ("experiments/a/train.py", "from experiments.a import _y", False),
        ("experiments/a/train.py", "from experiments.common import _y", True),
        ("notebooks/a.py", "from mtljax.b._y import z", True),
        ("notebooks/a.py", "from jax._src import core", False),
        ("mtljax/a/_x.py", "import mtljax.__main__", False),
    ],
)
def test_the_reader_of_private_imports(tmp_path, place, line, private):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n")
    assert bool(list(private_imports(file, tmp_path))) == private


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
