"""Command lines that cannot be run, generated from tables with a seed."""

import contextlib
import dataclasses
import importlib
import io
import types
import typing

import numpy as np
import pytest
import tyro

from experiments.common.config import (
    ConfigError,
    check_batch,
    check_names,
    check_some,
    option,
)

NAMES = (
    *("multidigits", "fs_mtl", "igb", "forkmerge", "alternating", "trajectories"),
    "leaderboard",
)
SEED, NUMBER, FAST = 0, 350, 40

# None of these is a value of any option of its kind.
WHOLE = ("-1", "-3", "9" * 20, "-" + "9" * 20, "9" * 5000, "nan", "1.5", "ten", "1e3")
REAL = ("nan", "inf", "-inf", "-1", "-0.5", "1e39", "-1e-50", "0.1.2", "much")
ZERO = (
    "steps",
    "batch_size",
    "eval_every",
    "log_every",
    "seeds",
    "epochs",
    "lr",
    "lrs",
)
ALONE = {
    "multidigits": [["--methods"], ["--data", "mnist"], ["--lrs", "0.1", "0.1"]],
    "fs_mtl": [["--sets", "mnist"], ["--methods", "linear"], ["--ablations", "mgda"]],
    "igb": [
        ["--data"],
        ["--data", "wq"],
        ["--table.methods"],
        ["--table.methods", "x"],
    ],
    "forkmerge": [["--domains", "usps"], ["--parts"], ["--interval", "5"]],
    "alternating": [["--sets"], ["--digits.rows"], ["--digits.rows", "groups_35:slot"]],
    "trajectories": [["--settings"], ["--settings", "faces"], ["--methods", "adam"]],
    "leaderboard": [["--sets"], ["--methods", "adam"], ["--add", "mgda"]],
}
ALWAYS = [
    ["--first-seed", "2147483647"],
    ["--resume", "--overwrite"],
    ["--no-such", "1"],
]


def module(name):
    return importlib.import_module(f"experiments.{name}.config")


def fields_of(kind, prefix=""):
    """Options of numbers: name -> int or float."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        inner = hint
        while typing.get_origin(inner) in (typing.Union, types.UnionType, tuple):
            inner = typing.get_args(inner)[0]
        if dataclasses.is_dataclass(inner):
            found |= fields_of(inner, f"{prefix}{name}.")
        if inner in (int, float):
            found[prefix + name] = inner
    return found


def bad_lines(name, rng):
    """Arguments after the preset, for ever."""
    found = fields_of(module(name).Config)
    fixed = [*ALONE[name], *ALWAYS]
    while True:
        if rng.random() < 0.1:
            yield fixed[int(rng.integers(len(fixed)))]
            continue
        field = str(rng.choice(list(found)))
        values = WHOLE if found[field] is int else REAL
        if field.rpartition(".")[2] in ZERO:
            # 1e-50 is 0 in float32.
            values = (*values, "0" if found[field] is int else "1e-50")
        yield [option(field), str(rng.choice(values))]


def outcome(name, arguments):
    """2 and what is printed, or 0 if the line is accepted."""
    config = module(name)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            made = tyro.extras.overridable_config_cli(
                dict(config.PRESETS), args=["smoke", *arguments], prog=name
            )
        except SystemExit as stop:
            return stop.code, printed.getvalue()
        try:
            config.check(made)
        except ConfigError as error:
            return 2, str(error)
    return 0, ""


@pytest.mark.parametrize(
    ("number", "seed"),
    [(FAST, SEED), pytest.param(NUMBER, SEED + 1, marks=pytest.mark.deep)],
)
@pytest.mark.usefixtures("as_users")
def test_no_nonsense_is_accepted(number, seed, capsys):
    rng = np.random.default_rng(seed)
    lines = {name: bad_lines(name, rng) for name in NAMES}
    parser, check, wrong = 0, 0, []
    for count in range(number):
        name = NAMES[count % len(NAMES)]
        arguments = next(lines[name])
        status, printed = outcome(name, arguments)
        shown = [name, *(word[:30] for word in arguments)]
        if status != 2 or "Traceback" in printed:
            wrong.append((shown, status, printed[:200]))
        elif "\n" in printed:
            parser += 1  # the parser's own box
        else:
            check += 1
            if arguments[0] not in printed and not printed.startswith("--"):
                wrong.append((shown, status, printed[:200]))
    with capsys.disabled():
        print(
            f"\n{number} bad command lines: {parser} refused by the parser, {check} by "
            f"the checks, {len(wrong)} wrong"
        )
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_good_lines_are_accepted(name):
    for arguments in ([], ["--seeds", "7", "--first-seed", "11"], ["--overwrite"]):
        extra = ["--data-dir", "nowhere"]
        assert outcome(name, [*arguments, *extra])[0] == 0, arguments


def test_helpers_say_what_is_known():
    with pytest.raises(
        ConfigError, match=r"--a\.b-c: unknown name 'z'\. Choose from x"
    ):
        check_names("a.b_c", ["z"], ["x", "y"])
    with pytest.raises(ConfigError, match="must name each value once, not x, x"):
        check_names("a", ["x", "x"], ["x", "y"])
    with pytest.raises(ConfigError, match=r"--a is empty\. Give at least one name"):
        check_some("a", [])
    with pytest.raises(ConfigError, match="--batch-size 9 is more than the 8 training"):
        check_batch("batch_size", 9, 8)
