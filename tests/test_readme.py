"""The README's Python blocks run, in order; its table is the registry."""

import pathlib
import re

import pytest

import mtljax.catalogue
import mtljax.methods

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("methods", mtljax.methods.methods_table),
        ("wrappers", mtljax.catalogue.wrappers_table),
    ],
)
def test_the_tables_are_those_of_the_registry(name, table):
    found = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", README, re.DOTALL)
    assert found
    assert found[1] == table()


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
