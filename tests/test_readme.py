"""The README's Python blocks run, in order; its table is the registry."""

import pathlib
import re

import mtljax.methods

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_the_table_of_methods_is_the_registry():
    table = re.search(r"<!-- methods -->\n(.*)\n<!-- /methods -->", README, re.DOTALL)
    assert table
    assert table[1] == mtljax.methods.methods_table()


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
