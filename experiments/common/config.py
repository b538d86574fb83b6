"""Shared options of all experiments, and the checks of all options.

Each number of a configuration is checked by its type, before any data are read or
compiled. An ``int`` is at least 1 and fits into 32 bits. A ``float`` is positive and
finite in float32. A tuple of numbers is not empty. An ``Annotated`` type with
:class:`Bounds` states other limits.
"""

import dataclasses
import math
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, NamedTuple

INT32 = 2**31 - 1
TINY, HUGE = 1.1754944e-38, 3.4028235e38  # the normal numbers of float32


class ConfigError(ValueError):
    """An invalid configuration. The message is intended for the user."""


class Bounds(NamedTuple):
    """Limits of a number, or of each number of a tuple.

    Attributes:
      low: The smallest value.
      high: The largest value.
      once: Whether the values of a tuple must be distinct.
      empty: Whether a tuple may be empty.
    """

    low: float
    high: float
    once: bool = False
    empty: bool = False


COUNT, POSITIVE = Bounds(1, INT32), Bounds(TINY, HUGE)

Size = Annotated[int, Bounds(0, INT32)]
"""A non-negative integer."""
Seed = Annotated[int, Bounds(0, INT32)]
Widths = Annotated[tuple[int, ...], Bounds(1, 2**16)]
"""Widths of layers."""
Rates = Annotated[tuple[float, ...], POSITIVE._replace(once=True)]
"""Distinct learning rates."""
NotNegative = Annotated[float, Bounds(0, HUGE)]
Share = Annotated[float, Bounds(0, 1)]


@dataclasses.dataclass(frozen=True)
class Common:
    """Shared options of all experiments."""

    data_dir: pathlib.Path | None = None
    """Folder that contains one folder per data set."""
    seeds: Annotated[int, Bounds(1, 1000)] = 3
    """Number of runs of each row. They are trained together by vmap."""
    first_seed: Seed = 0
    """First seed. The seeds are first_seed, first_seed + 1, ..."""
    out: pathlib.Path = pathlib.Path("results")
    """Folder for rows, checkpoints, tables and plots."""
    resume: bool = False
    """Resume an interrupted run. Finished rows are not trained again."""
    overwrite: bool = False
    """Replace an earlier run in --out."""
    plots: bool = True
    """Write the figures as PNG files."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs mtljax[tensorboard])."""
    quick_compile: bool = False
    """Compile without optimisation. The run starts sooner and is slower."""

    @property
    def seed_range(self) -> range:
        """Returns the seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def folder(self, name: str) -> pathlib.Path:
        """Returns the folder of a data set."""
        return self.out / folder_name(name)


@dataclasses.dataclass(frozen=True)
class Tuned(Common):
    """An experiment whose rows choose from a grid of learning rates."""

    extensions: Size = 2
    """Times that the grid is extended by a factor of three, for all rows, where a row
    chose an end of it; 0 only marks such rows."""


def folder_name(name: str) -> str:
    """Returns the name of the folder of a data set or a row.

    Examples:
      >>> folder_name("equal weights, other seeds"), folder_name("mine:sum")
      ('equal-weights-other-seeds', 'mine-sum')
    """
    return re.sub(", |[ :/]", "-", name)


def option(name: str) -> str:
    """Returns the command-line option of a field.

    Examples:
      >>> option("faces.sgd_lrs")
      '--faces.sgd-lrs'
    """
    return f"--{name.replace('_', '-')}"


def check_common(config: Common) -> None:
    """Checks each field by its type, and rejects flags that exclude each other.

    A :class:`ConfigError` names the option, also in all other checks.
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
    """Checks the fields of a dataclass and of nested dataclasses by type."""
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
        raise ConfigError(f"{option(name)} is empty. Give at least one number.")
    if bounds and bounds.once:
        check_distinct(name, value)


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


def check_distinct(field: str, values: Sequence[Any]) -> None:
    """Raises a :class:`ConfigError` if a value occurs twice."""
    if len(set(values)) < len(values):
        shown = ", ".join(map(str, values))
        raise ConfigError(f"{option(field)} must name each value once, not {shown}.")


def check_names(field: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises a :class:`ConfigError` if a name is unknown or repeated."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{option(field)}: unknown name {name!r}. Choose from "
                f"{', '.join(known)}."
            )
    check_distinct(field, names)


def check_some(field: str, names: Sequence[Any]) -> None:
    """Raises a :class:`ConfigError` if the list is empty."""
    if not names:
        raise ConfigError(f"{option(field)} is empty. Give at least one name.")


def check_methods(field: str, names: Sequence[str]) -> None:
    """Raises a :class:`ConfigError` if a name is no method of mtljax, or repeated."""
    import mtljax

    for name in names:
        try:
            mtljax.get_method(name)
        except ValueError as error:
            raise ConfigError(f"{option(field)}: {error}") from None
    check_distinct(field, names)


def check_batch(field: str, batch_size: int, examples: int) -> None:
    """Raises a :class:`ConfigError` if a batch is larger than the training data."""
    if batch_size > examples:
        raise ConfigError(
            f"{option(field)} {batch_size} is more than the {examples} training "
            "examples."
        )
