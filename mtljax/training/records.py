"""Plain-JSON records: configurations, differences, the environment."""

import base64
import dataclasses
import datetime
import enum
import functools
import importlib.metadata
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtljax.balancer import task_vector

MAY_DIFFER = frozenset(
    {
        "num_steps", "epochs", "num_epochs", "log_every", "eval_every",
        "checkpoint_every", "chunk", "progress", "tensorboard", "plots", "resume",
        "overwrite", "run_dir", "out_dir", "output_dir", "out",
    }
)  # fmt: skip
"""Fields of a configuration that a resumed run may change by default."""


def to_json(value: Any) -> Any:  # noqa: PLR0911 one return for each kind
    """Converts a configuration, array or number to plain JSON types.

    Dataclasses and NamedTuples become dicts. Tuples and arrays become lists. Paths and
    enumerations become strings. NaN and infinities become ``None``, because JSON has
    neither.

    Args:
      value: A value of a configuration or of a metric row.

    Returns:
      Dicts, lists, strings, numbers, booleans and None.

    Raises:
      TypeError: If a value has no plain form. The message names its type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.training import to_json
      >>> to_json({"lr": jnp.float32(0.5), "sizes": (3, 4), "best": float("inf")})
      {'lr': 0.5, 'sizes': [3, 4], 'best': None}
    """
    if value is None or isinstance(value, bool | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind not in "biuSU":
            array = array.astype(np.float64)
        return to_json(array.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {k: to_json(v) for k, v in value._asdict().items()}  # pyright: ignore
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_json(v) for v in items]
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"A {type(value).__name__} cannot be written as JSON: {value!r}.")


def by_task(
    metrics: Mapping[str, Any], task_names: Sequence[str] | None, axis: int = 0
) -> dict[str, Any]:
    """Converts the metrics that are dicts by task to arrays.

    Args:
      metrics: Metrics on the host.
      task_names: Names of the tasks, which determine the order.
      axis: Axis of the tasks.

    Returns:
      The metrics. Those that are no dicts are unchanged.

    Raises:
      ValueError: If a metric is a dict and there are no names, or its names differ.

    Examples:
      >>> from mtljax.training.records import by_task
      >>> by_task({"losses": {"b": 2.0, "a": 1.0}}, ["a", "b"])["losses"]
      array([1., 2.])
    """
    found = dict(metrics)
    for name, value in metrics.items():
        if not isinstance(value, Mapping):
            continue
        if not task_names:
            raise ValueError(
                f"Metric {name!r} is a dict by task. Pass task_names=, which determine "
                "the order of the tasks."
            )
        try:
            found[name] = task_vector(value, task_names, axis=axis, numpy=np)
        except ValueError as error:
            raise ValueError(f"Metric {name!r}: {error}") from None
    return found


def pack_bytes(value: Any) -> Any:
    """Converts the state of an iterator to JSON. Some loaders return it as bytes."""
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode("ascii")}
    return to_json(value)


def unpack_bytes(value: Any) -> Any:
    """Inverse of :func:`pack_bytes`."""
    if isinstance(value, Mapping) and set(value) == {"__bytes__"}:
        return base64.b64decode(value["__bytes__"])
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts into one level with dotted names.

    Examples:
      >>> from mtljax.training.records import flatten
      >>> flatten({"lr": 0.1, "model": {"width": 8}})
      {'lr': 0.1, 'model.width': 8}
    """
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Iterable[str] = ()
) -> list[str]:
    """Describes the fields in which two plain configurations differ.

    Args:
      old: Configuration of the stored run.
      new: Requested configuration.
      may_differ: Dotted names, or first parts of dotted names, to ignore.

    Returns:
      One string ``"name: old -> new"`` per differing field, sorted by name.

    Examples:
      >>> from mtljax.training.records import differences
      >>> differences({"lr": 0.1, "num_steps": 5}, {"lr": 0.2, "num_steps": 9},
      ...             may_differ=["num_steps"])
      ['lr: 0.1 -> 0.2']
    """
    flat_old, flat_new, free = flatten(old), flatten(new), set(may_differ)
    found = []
    for name in sorted(flat_old.keys() | flat_new.keys()):
        parts = name.split(".")
        if any(".".join(parts[: i + 1]) in free for i in range(len(parts))):
            continue
        before, after = flat_old.get(name, "(absent)"), flat_new.get(name, "(absent)")
        if before != after:
            found.append(f"{name}: {before} -> {after}")
    return found


@functools.cache
def git_commit(directory: str | None = None) -> str | None:
    """Returns the commit of the checkout that contains ``directory``.

    The default directory is that of this package.

    Returns:
      The hash, with ``+changes`` if tracked files differ from it. None outside a git
      checkout.
    """
    where = directory or str(pathlib.Path(__file__).parent)

    def run(*words: str):
        # Without optional locks, git does not write the index of the user. A run that
        # is killed or finds a full disk would leave its lock behind.
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(
            command, cwd=where, capture_output=True, text=True, timeout=10, check=False
        )

    try:
        head = run("rev-parse", "HEAD")
        if head.returncode != 0:
            return None
        status = run("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Returns versions, commit and device of this process as plain JSON.

    Examples:
      >>> from mtljax.training import environment
      >>> sorted(environment())
      ['commit', 'device', 'versions']
      >>> sorted(environment()["versions"])
      ['jax', 'mtljax', 'optax', 'python']
    """
    devices = jax.devices()
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("jax", "optax", "mtljax")},
        },
        "commit": git_commit(),
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
    }


def now() -> str:
    """Returns the UTC time in ISO form, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
