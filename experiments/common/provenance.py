"""Where rows come from: the header of a ``results.jsonl``, and its check."""

import datetime
import importlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments.common import claims
from experiments.common.problem import LOADED
from mtljax import training
from mtljax.training.cli import without_paths

SCHEMA = 1
STARTED = time.time()
PACKAGES = ("jaxlib", "flax", "numpy", "scipy")
KEYS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "schema": int,
    "experiment": str,
    "command": str,
    "config": dict,
    "commit": str,
    "dirty": bool,
    "versions": dict,
    "device": str,
    "cores": int,
    "xla_flags": str,
    "x64": bool,
    "data": dict,
    "shared": dict,
    "claims": (str, type(None)),
    "started": str,
    "wall_s": (int, float),
}
LOCAL = ("data_dir", "out", "resume", "overwrite", "report_only", "report_to")
"""Fields that belong to a machine or a call, not to a result."""
VERSIONS = ("python", "jax", "optax", "mtljax", *PACKAGES)


def settings(config: Any) -> dict[str, Any]:
    """A configuration as results quote it."""
    found = training.to_json(config)
    return {name: value for name, value in found.items() if name not in LOCAL}


def header(config: Any, **about: Any) -> dict[str, Any]:
    """Row 0 of a ``results.jsonl``.

    It has the digests of the data that this process loaded, and the numbers of examples
    that their splits share.

    Args:
      config: Of the experiment.
      **about: More entries.

    Returns:
      Versions, commit, command and settings, as plain JSON.
    """
    found, loaded = training.environment(), dict(LOADED)
    commit = found["commit"]
    experiment = type(config).__module__.removeprefix("experiments.").split(".")[0]
    path = claims.claims_path(experiment)
    start = datetime.datetime.fromtimestamp(STARTED, datetime.UTC)
    return {
        "kind": "header",
        "schema": SCHEMA,
        "experiment": experiment,
        "command": " ".join(
            [f"python -m experiments.{experiment}", *without_paths(sys.argv[1:])]
        ),
        **about,
        "config": settings(config),
        "commit": commit and commit.removesuffix("+changes"),
        "dirty": bool(commit) and commit.endswith("+changes"),
        "versions": {
            **found["versions"],
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": found["device"],
        "cores": usable_cores(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "data": {name: noted["digest"] for name, noted in loaded.items()},
        "shared": {name: noted["shared"] for name, noted in loaded.items()},
        "claims": (
            claims.claims_digest(claims.load_claims(path)) if path.is_file() else None
        ),
        "started": start.isoformat(timespec="seconds"),
        "wall_s": round(time.time() - STARTED, 1),
    }


def usable_cores() -> int:
    """Returns the number of cores that this process may use, as with ``taskset``."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- the check ----------------------------------------------------------------------


def check_provenance(path: pathlib.Path) -> list[str]:
    """What is wrong with the header of a committed ``results.jsonl``.

    The commit and the claims at that commit are checked where the checkout has them.

    Returns:
      One sentence for each fault; none if the file may be cited.
    """
    from experiments.common.report import read_rows

    head, lines = read_rows(path)
    faults = check_form(head)
    if faults:
        return faults
    faults = check_header(head)
    if not lines:
        faults.append("There are no rows.")
    faults += _check_preset(head) + _check_splits(head)
    known = claims.claims_path(head["experiment"])
    if known.is_file():
        digest = claims.claims_digest(claims.load_claims(known))
        if head["claims"] != digest:
            faults.append("The claims differ from those that the rows were run for.")
        faults += _check_history(head)
    return faults


def check_form(head: Mapping[str, Any]) -> list[str]:
    """Entries that are absent or of another type."""
    if head.get("kind") != "header" or head.get("schema") != SCHEMA:
        return [f"Row 0 is not a header of schema {SCHEMA}."]
    return [
        f"The header has no valid {key!r}: {head.get(key)!r}."
        for key, kind in KEYS.items()
        if key not in head or not isinstance(head[key], kind)
    ]


def check_header(head: Mapping[str, Any]) -> list[str]:
    """Faults that a header of the right form shows by itself."""
    found = {
        "The rows were trained with uncommitted changes.": head["dirty"],
        "The header has no digest of the data.": not head["data"],
    }
    for name in VERSIONS:
        found[f"The version of {name} is missing."] = not head["versions"].get(name)
    return [fault for fault, holds in found.items() if holds]


def _check_preset(head: Mapping[str, Any]) -> list[str]:
    """Whether a preset of today has the configuration of the rows."""
    name = head["experiment"]
    module = importlib.import_module(f"experiments.{name}.config")
    presets = [settings(config) for _, config in module.PRESETS.values()]
    readme = claims.ROOT / name / "README.md"
    if head["config"] in presets or "older preset" in readme.read_text("utf-8"):
        return []
    return ["No preset has this configuration, and the README names no older preset."]


def _check_splits(head: Mapping[str, Any]) -> list[str]:
    """Whether splits are disjoint, or the README says that examples are repeated."""
    readme = claims.ROOT / head["experiment"] / "README.md"
    if "repeated examples" in readme.read_text("utf-8"):
        return []
    return [
        f"{count} examples of {name} are in two splits ({pair})."
        for name, pairs in head["shared"].items()
        for pair, count in pairs.items()
        if count
    ]


def _git(*words: str) -> str | None:
    run = subprocess.run(
        ["git", *words], cwd=claims.ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout if run.returncode == 0 else None


def _check_history(head: Mapping[str, Any]) -> list[str]:
    """Whether the claims were committed before the rows were run."""
    name, commit = head["experiment"], head["commit"]
    if _git("cat-file", "-e", f"{commit}^{{commit}}") is None:
        shallow = _git("rev-parse", "--is-shallow-repository")
        if shallow is None or shallow.strip() == "true":
            return []  # no history to check with
        return [f"The history has no commit {commit}."]
    text = _git("show", f"{commit}:./{name}/claims.toml")
    if text is None:
        return ["The claims were not committed before the rows were run."]
    if claims.claims_digest(claims.parse_claims(text, name)) != head["claims"]:
        return ["The claims at the commit of the rows are other ones."]
    return []
