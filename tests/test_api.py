"""One list of public names; everything that repeats it is compared with it."""

import ast
import builtins
import doctest
import importlib
import inspect
import pathlib
import re

import pytest

import mtljax
from mtljax import methods

ROOT = pathlib.Path(__file__).parent.parent
SUBPACKAGES = (
    *("alternating", "data", "forkmerge", "metrics", "models", "sharpness", "solvers"),
    *("training", "trajectory"),
)


def test_all_is_complete_and_without_repeats():
    assert len(mtljax.__all__) == len(set(mtljax.__all__))
    for name in mtljax.__all__:
        assert hasattr(mtljax, name), name
    # What is imported as `x as x` is meant to be public, and then it is listed.
    text = pathlib.Path(mtljax.__file__).read_text()
    exported = re.findall(r"^from .* import \w+ as (\w+)$", text, re.MULTILINE)
    assert set(exported) == set(mtljax.__all__)


@pytest.mark.parametrize("name", mtljax.__all__)
def test_every_public_name_is_documented(name):
    value = getattr(mtljax, name)
    if name == "METHODS":  # a dict of documented rows
        value = methods.Method
    assert len(inspect.getdoc(value) or "") > 20
    if inspect.isfunction(value):
        doc = inspect.getdoc(value)
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"\b{parameter}\b", doc), f"{name}: {parameter}"


def test_the_registry_lists_the_public_factories():
    factories = {
        name
        for name, value in vars(methods).items()
        if inspect.isfunction(value)
        and next(iter(inspect.signature(value).parameters), "") == "num_tasks"
    }
    assert set(mtljax.METHODS) == factories
    assert factories <= set(mtljax.__all__)
    for name, method in mtljax.METHODS.items():
        assert method.factory is getattr(mtljax, name)
        assert method.name == name


@pytest.mark.parametrize("name", mtljax.METHODS)
def test_a_factory_takes_num_tasks_and_keywords(name):
    first, *others = inspect.signature(mtljax.METHODS[name].factory).parameters.values()
    assert first.name == "num_tasks"
    assert first.kind is first.POSITIONAL_OR_KEYWORD
    assert first.default is first.empty
    assert others, "at least scale="
    for parameter in others:
        assert parameter.kind is parameter.KEYWORD_ONLY, parameter
        # Everything has the paper's default, but for the key: no default seed.
        assert (parameter.default is parameter.empty) == (parameter.name == "key")
    assert "scale" in {parameter.name for parameter in others}


def test_rows_of_the_registry_are_filled_in():
    for method in mtljax.METHODS.values():
        assert method.family in ("loss balancing", "gradient balancing")
        assert re.fullmatch(r"\d{4}\.\d{5}|[A-Za-z]+ \d{4}", method.source), method
        for text in (method.label, method.cost, method.state, method.promise):
            assert text.strip(), method
        # The link of the docstring leads to the paper of the row.
        if "." in method.source:
            assert f"arxiv.org/abs/{method.source}" in method.factory.__doc__


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("PCGrad", "pcgrad"),
        ("nash-mtl", "nash_mtl"),
        ("Nash-MTL", "nash_mtl"),
        ("Aligned_MTL", "aligned_mtl"),
        ("ConFIG", "conflict_free"),
        ("GEOMETRIC MEAN", "geometric_mean"),
    ],
)
def test_spelling_does_not_matter(name, found):
    assert mtljax.get_method(name).name == found


def test_an_unknown_method_is_answered_with_the_closest():
    with pytest.raises(ValueError, match=r"name 'nash-mlt'; did you mean 'nash_mtl'"):
        mtljax.get_method("nash-mlt")
    with pytest.raises(ValueError, match=r"name 'qqq'; mtljax.METHODS lists all"):
        mtljax.get_method("qqq")


def modules(folder):
    return [f.stem[1:] for f in sorted((ROOT / "mtljax" / folder).glob("_[a-z]*.py"))]


@pytest.mark.parametrize("folder", ["methods", "solvers", "gradients"])
def test_tests_mirror_the_package(folder):
    # In the room of methods the helpers are tested by the methods that they help.
    names = list(mtljax.METHODS) if folder == "methods" else modules(folder)
    assert names
    assert set(names) <= set(modules(folder))
    for name in names:
        assert (ROOT / "tests" / folder / f"test_{name}.py").is_file(), name


def test_every_file_with_a_factory_is_a_registered_method():
    for name in modules("methods"):
        text = (ROOT / "mtljax" / "methods" / f"_{name}.py").read_text()
        if re.search(rf"^def {name}\(", text, re.MULTILINE):
            assert name in mtljax.METHODS, name


@pytest.mark.parametrize("name", ["stack", "balancer", "per_task"])
def test_modules_are_mirrored_too(name):
    assert (ROOT / "mtljax" / f"{name}.py").is_file()
    assert (ROOT / "tests" / f"test_{name}.py").is_file()


def _undefined(doc):
    """The names that the examples of a docstring use without defining them."""
    parser = doctest.DocTestParser()
    source = "".join(example.source for example in parser.get_examples(doc))
    defined, used = {*dir(builtins)}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return used - defined


def test_examples_run_as_they_are_copied():
    """pytest gives examples the names of their module, so it does not see this."""
    assert _undefined(">>> f(1)") == {"f"}
    names = ("mtljax", *(f"mtljax.{name}" for name in SUBPACKAGES))
    seen = 0
    for package in map(importlib.import_module, names):
        for name in dir(package):
            found = getattr(package, name)
            if name.startswith("_") or not callable(found):
                continue
            doc = inspect.getdoc(found) or ""
            seen += ">>>" in doc
            assert not _undefined(doc), (package.__name__, name, _undefined(doc))
    assert seen > 200
