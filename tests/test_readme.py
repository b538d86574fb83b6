"""The README: its Python blocks run, its counts are those of the registry."""

import collections
import pathlib
import re

import mtljax
from mtljax.catalogue import WRAPPERS
from mtljax.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def families():
    """Rows ``(family, number, cost, examples)`` of the table of families."""
    found = re.search(r"<!-- families -->\n(.*)\n<!-- /families -->", README, re.DOTALL)
    assert found
    lines = found[1].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_code_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_families_are_those_of_the_registry():
    counts = collections.Counter(method.family for method in METHODS.values())
    counts["wrappers"] = len(WRAPPERS)
    assert {family: int(number) for family, number, *_ in families()} == counts
    assert f"It provides {len(METHODS)} methods" in README


def test_the_examples_belong_to_their_family():
    for family, *_, examples in families():
        members = [n for n, m in METHODS.items() if m.family == family]
        members = list(WRAPPERS) if family == "wrappers" else members
        names = re.findall(r"`(\w+)`", examples)
        assert names
        assert set(names) <= set(members)


def test_the_costs_are_those_of_most_methods():
    passes = {"mostly 1 backward pass": "1 backward", "mostly T backward passes": "T b"}
    for family, _, cost, _ in families():
        if family != "wrappers":
            costs = [m.cost for m in METHODS.values() if m.family == family]
            assert sum(passes[cost] in text for text in costs) > len(costs) / 2


def test_the_named_functions_exist():
    table = README.split("<!-- /families -->")[1].split("## ")[0]
    names = re.findall(r"`(\w+)[`(]", table)
    assert len(names) > 10
    keywords = {"mask", "measure", "micro_batches", "axis_name", "grad_shardings"}
    for name in set(names) - keywords:
        assert hasattr(mtljax, name), name


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
