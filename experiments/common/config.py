"""The options that all experiments share, and the checks of all options.

Every number of a configuration is checked by its type, before anything is read or
compiled: an ``int`` is at least 1 and fits into 32 bits, a ``float`` is positive and
finite in float32, and a tuple of numbers is not empty. An ``Annotated`` type with
:class:`Bounds` says what differs.
"""

import dataclasses
import math
import pathlib
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

INT32 = 2**31 - 1
TINY, HUGE = 1.1754944e-38, 3.4028235e38  # the normal numbers of float32


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is for the user."""


class Bounds(NamedTuple):
    """What a number, or every number of a tuple, may be.

    Attributes:
      low: The smallest value.
      high: The largest value.
      once: Whether a tuple may name a value only once.
      empty: Whether a tuple may be empty.
    """

    low: float
    high: float
    once: bool = False
    empty: bool = False


COUNT, POSITIVE = Bounds(1, INT32), Bounds(TINY, HUGE)

Size = Annotated[int, Bounds(0, INT32)]
"""A whole number, zero included."""
Seed = Annotated[int, Bounds(0, INT32)]
Widths = Annotated[tuple[int, ...], Bounds(1, 2**16)]
"""Widths of layers."""
Rates = Annotated[tuple[float, ...], POSITIVE._replace(once=True)]
"""Learning rates, each once."""
NotNegative = Annotated[float, Bounds(0, HUGE)]
Share = Annotated[float, Bounds(0, 1)]
Finite = Annotated[float, Bounds(-HUGE, HUGE)]


@dataclasses.dataclass(frozen=True)
class Common:
    """What every experiment can be told."""

    data_dir: pathlib.Path | None = None
    """Folder with a folder for each data set."""
    seeds: Annotated[int, Bounds(1, 1000)] = 3
    """Runs of every row, trained together by vmap."""
    first_seed: Seed = 0
    """Seeds are first_seed, first_seed + 1, ..."""
    out: pathlib.Path = pathlib.Path("results")
    """Rows, checkpoints, tables and plots go here."""
    resume: bool = False
    """Resume an interrupted run; finished rows are not trained again."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    plots: bool = True
    """Write the PNGs."""
    tensorboard: bool = False
    """Write TensorBoard files as well (needs mtljax[tensorboard])."""
    quick_compile: bool = False
    """Compile without optimisation: starts sooner and runs slower."""

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclasses.dataclass(frozen=True)
class Tuned(Common):
    """An experiment whose rows choose from a grid of learning rates."""

    extensions: Size = 2
    """Times that the grid is extended by a factor of three, for all rows, where a row
    chose an end of it; 0 only marks such rows."""


def option(name: str) -> str:
    """A field as it is typed.

    Examples:
      >>> option("faces.sgd_lrs")
      '--faces.sgd-lrs'
    """
    return f"--{name.replace('_', '-')}"


def check_common(config: Common) -> None:
    """Checks every field by its type, and the flags that exclude each other.

    Raises:
      ConfigError: One sentence that names the option.
    """
    check_fields(config)
    if config.seed_range.stop - 1 > INT32:
        raise ConfigError(
            f"--first-seed {config.first_seed} leaves no seeds below 2**31."
        )
    flags = ("resume", "overwrite", "report_only")
    chosen = [option(f) for f in flags if getattr(config, f, False)]
    if len(chosen) > 1:
        raise ConfigError(f"{chosen[0]} and {chosen[1]} exclude each other.")


def check_fields(config: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass, and those of dataclasses in it, by type.

    Raises:
      ConfigError: One sentence that names the option.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name = f"{prefix}{field.name}"
        _check_value(name, hints[field.name], getattr(config, field.name), None)


def _check_value(name: str, hint: Any, value: Any, bounds: Bounds | None) -> None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = [a for a in args[1:] if isinstance(a, Bounds)]
        _check_value(name, args[0], value, found[0] if found else bounds)
    elif origin in (typing.Union, types.UnionType):
        if value is not None:
            (inner,) = (a for a in args if a is not type(None))
            _check_value(name, inner, value, bounds)
    elif dataclasses.is_dataclass(value):
        check_fields(value, f"{name}.")
    elif origin is tuple:
        _check_tuple(name, args[0], value, bounds)
    elif hint in (int, float):
        _check_number(name, hint, value, bounds)


def _check_tuple(name: str, inner: Any, value: Any, bounds: Bounds | None) -> None:
    for item in value:
        _check_value(name, inner, item, bounds)
    if typing.get_origin(inner) is Annotated:
        inner = typing.get_args(inner)[0]
    if inner in (int, float) and not value and not (bounds and bounds.empty):
        raise ConfigError(f"{option(name)} is empty; give at least one number.")
    if bounds and bounds.once and len(set(value)) < len(value):
        raise ConfigError(f"{option(name)} must name each value once, not {value}.")


def _check_number(name: str, kind: type, value: Any, bounds: Bounds | None) -> None:
    bounds = bounds or (COUNT if kind is int else POSITIVE)
    fits = math.isfinite(value) if kind is float else True
    if fits and bounds.low <= value <= bounds.high:
        return
    shown = f"{value:.6g}" if kind is float else str(value)
    shown = shown if len(shown) <= 24 else f"{shown[:12]}... ({len(shown)} digits)"
    if kind is int:
        wanted = f"a whole number from {bounds.low} to {bounds.high}"
    elif bounds.high < HUGE:
        wanted = f"a number from {bounds.low:g} to {bounds.high:g}"
    else:
        wanted = {TINY: "a positive number", 0: "zero or a positive number"}.get(
            bounds.low, "a finite number"
        )
    raise ConfigError(f"{option(name)} must be {wanted}, not {shown}.")


def check_names(field: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Checks that names are known, and that each comes once.

    Raises:
      ConfigError: One sentence with all known names.
    """
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{option(field)}: unknown name {name!r}. Choose from "
                f"{', '.join(known)}."
            )
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{option(field)} must name each once, not {', '.join(names)}."
        )


def check_some(field: str, names: Sequence[Any]) -> None:
    """Checks that a list is not empty.

    Raises:
      ConfigError: One sentence.
    """
    if not names:
        raise ConfigError(f"{option(field)} is empty; name at least one.")


def check_methods(field: str, names: Sequence[str]) -> None:
    """Checks that mtljax has all methods, and that each comes once.

    Raises:
      ConfigError: One sentence.
    """
    import mtljax

    for name in names:
        try:
            mtljax.get_method(name)
        except ValueError as error:
            raise ConfigError(f"{option(field)}: {error}") from None
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{option(field)} must name each once, not {', '.join(names)}."
        )


def check_batch(field: str, batch_size: int, examples: int) -> None:
    """Checks a batch size against the training data.

    Raises:
      ConfigError: One sentence.
    """
    if batch_size > examples:
        raise ConfigError(
            f"{option(field)} {batch_size} is more than the {examples} training "
            "examples."
        )
