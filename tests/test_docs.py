"""The pages of the site: their references exist, and their code is run.

The build of the site executes the code cells and checks all references. These tests
find the same mistakes without Sphinx.
"""

import importlib
import inspect
import pathlib
import posixpath
import re

import pytest

import mtljax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = ("_build", "_generated", "api", "notebooks", "repository")
PAGES = sorted(
    file
    for file in DOCS.rglob("*.md")
    if file.relative_to(DOCS).parts[0] not in GENERATED
)
# Texts of the repository that are pages of the site, and the number of their long
# blocks that other tests run (test_readme.py, experiments/test_common.py).
TEXTS = {"README.md": 1, "CONTRIBUTING.md": 0, "experiments/README.md": 1}
# A Python block in any of the notations of MyST, except for a code cell.
PYTHON = re.compile(
    r"^ *(`{3,}|~{3,}|:{3,}) *(?:\{[\w-]*code[\w-]*\} *)?"
    r"(?:python3?|pycon|py|ipython3?)\b[^\n]*\n(.*?)^ *\1",
    re.MULTILINE | re.DOTALL,
)
ROLE = re.compile(r"\{(\w+)\}`~?(?:[^`<]*<)?([^`<>]+)>?`")

pytestmark = pytest.mark.skipif(not PAGES, reason="the pages are not in this copy")


def name(file):
    return file.relative_to(DOCS).as_posix()


def target(file, path):
    """A path that a page names, from the folder of the documentation."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name(file)), path))


def exists(path):
    """Whether a page exists or is written by the build from the repository."""
    top, _, rest = path.partition("/")
    if top == "repository":
        return (ROOT / f"{rest}.md").exists()
    return top in GENERATED or (DOCS / f"{path}.md").exists()


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_references(file):
    text = file.read_text(encoding="utf-8")
    for role, given in ROLE.findall(text):
        if role == "doc":
            assert exists(target(file, given)), given
        if role in ("func", "class", "data", "mod"):
            owner, _, last = given.rpartition(".")
            found = importlib.import_module(owner)
            assert hasattr(found, last), given
    for kind, path in re.findall(r"\{(include|literalinclude)\} (\S+)", text):
        if "_generated" not in path:
            assert (DOCS / target(file, path)).exists(), (kind, path)
    for block in re.findall(r"```\{toctree\}(.*?)```", text, flags=re.DOTALL):
        entries = [line.strip() for line in block.splitlines()]
        for entry in entries:
            if entry and not entry.startswith(":") and "*" not in entry:
                path = re.sub(r".*<(.*)>", r"\1", entry)
                assert exists(target(file, path)), entry


def long_blocks(text):
    """Blocks of more than five lines that no build executes."""
    blocks = [match[2] for match in PYTHON.finditer(text)]
    return [block for block in blocks if len(block.strip().splitlines()) > 5]


def test_blocks_of_every_notation_are_found():
    code = "a = 1\n" * 6
    for start, end in [
        ("```python", "```"),
        ("````py", "````"),
        ("~~~pycon", "~~~"),
        ("  ```python title=x", "  ```"),
        ("```{code-block} python", "```"),
        (":::{code} ipython3", ":::"),
    ]:
        assert len(long_blocks(f"Text.\n\n{start}\n{code}{end}\n")) == 1, start
    for start in ("```{code-cell}", "```bash", "```text"):
        assert not long_blocks(f"{start}\n{code}```\n")
    assert not long_blocks("```python\na = 1\n```\n")


@pytest.mark.parametrize("path", TEXTS)
def test_other_texts_have_no_untested_block(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert len(long_blocks(text)) == TEXTS[path]


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_code_is_executed_or_short(file):
    """A block that is not a cell has at most five lines, so that it is a fragment."""
    text = file.read_text(encoding="utf-8")
    assert not long_blocks(text)
    cells = re.findall(r"^```\{code-cell\}\n(.*?)^```", text, re.M | re.S)
    if cells:
        assert text.startswith("---\nfile_format: mystnb\n")
    for cell in cells:
        # The site takes the alternative text of a figure from this comment.
        assert ("plt.show()" in cell) == ("\n# Figure: " in cell)
        code = re.sub(r"^:.*\n", "", cell, flags=re.M)
        compile(code, name(file), "exec")


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_every_page_is_in_a_table_of_contents(file):
    page = name(file).removesuffix(".md")
    if page == "index":
        return
    listed = []
    for other in PAGES:
        text = other.read_text(encoding="utf-8")
        for block in re.findall(r"```\{toctree\}(.*?)```", text, flags=re.DOTALL):
            paths = (re.sub(r".*<(.*)>", r"\1", x) for x in block.split("\n") if x)
            listed += [target(other, path.strip()) for path in paths]
    folder = posixpath.dirname(page)
    assert page in listed or f"{folder}/*" in listed


@pytest.mark.parametrize("method", mtljax.METHODS)
def test_every_method_has_an_equation_an_example_and_a_reference(method):
    text = inspect.getdoc(mtljax.METHODS[method].factory)
    summary = text.partition("\nArgs:\n")[0]
    formulas = re.findall(r"``([^`]+)``", summary)
    assert any(re.search("[=∝+]", formula) for formula in formulas)
    assert re.search(r"\nExamples:\n +>>> ", text)
    assert re.search(r"\nReferences:\n +\S+", text)
