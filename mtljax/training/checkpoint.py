"""Checkpoints: the whole state, atomically, with a digest, the last and the best.

A thin layer on Orbax. It keeps Orbax's on-disk layout (``<step>/state``,
``<step>/meta``) and its atomic rename, and decides itself which steps to keep: with
``best_fn`` and ``max_to_keep`` an Orbax manager deletes a newest step that is not
among the best, and skips a step it believes older than the latest without an error.
"""

import gc
import hashlib
import json
import logging
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from mtljax.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    TreeMismatchError,
)
from mtljax.training.records import to_json

Mode = Literal["min", "max"]


class Restored(NamedTuple):
    """What :meth:`Checkpointer.restore` gives."""

    state: Any  # like the target
    step: int
    meta: dict[str, Any]  # as given to save


def _orbax():
    """Imports Orbax (0.6 s to 2.4 s) when it is first needed, and keeps it quiet."""
    import orbax.checkpoint as ocp

    logger = logging.getLogger("absl")
    if not any(isinstance(f, _QuietOrbax) for f in logger.filters):
        logger.addFilter(_QuietOrbax())
    return ocp


class _QuietOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname or record.levelno >= logging.ERROR


def _collect_quietly() -> None:
    """Frees what a failed restore left, whose coroutines complain when they go."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        for _ in range(3):  # its threads may still hold some
            gc.collect()
            time.sleep(0.05)
    finally:
        sys.unraisablehook = hook


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)


def tree_spec(tree: PyTree) -> dict[str, str]:
    """Path -> ``dtype[shape]`` of every leaf.

    Examples:
      >>> tree_spec({"w": jnp.zeros((2, 3)), "key": jax.random.key(0)})
      {"['key']": 'key<fry>[]', "['w']": 'float32[2,3]'}
    """
    spec = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        shape = ",".join(map(str, array.shape))
        spec[jax.tree_util.keystr(path)] = f"{array.dtype}[{shape}]"
    return spec


def tree_digest(tree: PyTree) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of all leaves.

    Examples:
      >>> a = tree_digest({"w": jnp.zeros(3)})
      >>> a == tree_digest({"w": np.zeros(3, np.float32)})
      True
      >>> a == tree_digest({"w": jnp.zeros(3).at[1].set(1e-45)})
      False
    """
    digest = hashlib.sha256()
    for name, text in tree_spec(tree).items():
        digest.update(f"{name} {text}\n".encode())
    for leaf in jax.tree.leaves(tree):
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        flat = np.ascontiguousarray(jax.device_get(data)).reshape(-1)
        digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()


def _seal(meta: Mapping[str, Any]) -> str:
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def saved_steps(directory: str | pathlib.Path) -> list[int]:
    """Steps of the complete checkpoints in ``directory``, ascending.

    Examples:
      >>> saved_steps("/no/such/directory")
      []
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    names = [p.name for p in directory.iterdir() if p.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def our_leftovers(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Folders in ``directory`` that a killed save or deletion left behind."""
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    ours = lambda name: ".orbax-checkpoint-tmp" in name or name.endswith(".deleting")
    return [p for p in directory.iterdir() if p.is_dir() and ours(p.name)]


class Checkpointer:
    """Saves and restores whole states; use it as a context manager.

    A step is written beside its final name and renamed when complete, so after
    ``kill -9`` at any instant every listed step is complete. Kept are the last
    ``keep_last`` steps and the best by ``metric`` (the earliest of equals), whatever
    their order. Saving runs in the background: :meth:`wait` or leaving the context
    makes it durable.

    Args:
      directory: Where the steps go; made if absent.
      keep_last: How many of the newest steps to keep. Two, so that a damaged newest
        one leaves another.
      mode: Whether the best ``metric`` is the smallest or the largest.

    Examples:
      >>> import tempfile
      >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(1)}
      >>> with Checkpointer(tempfile.mkdtemp(), mode="max") as ckpt:
      ...     for step, score in [(1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)]:
      ...         ckpt.save(step, state, {"note": "hello"}, metric=score)
      ...     ckpt.wait()
      ...     restored = ckpt.restore(state)
      ...     ckpt.steps(), ckpt.best_step(), restored.step, restored.meta["note"]
      ([1, 3, 4], 1, 4, 'hello')
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        keep_last: int = 2,
        mode: Mode = "min",
    ):
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last} must be at least 1.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r} must be 'min' or 'max'.")
        self.directory = pathlib.Path(directory).absolute()
        self._keep_last = keep_last
        self._mode = mode
        self._io = None
        self._scores: dict[int, float | None] | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def _open(self):
        if self._io is None:
            ocp = _orbax()
            self._io = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        return self._io

    def path(self, step: int) -> pathlib.Path:
        """Where a step is (or would be) kept."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Complete steps, ascending."""
        return saved_steps(self.directory)

    def best_step(self) -> int | None:
        """The kept step with the best metric, None if none was saved with one."""
        scores = {s: m for s, m in self._load_scores().items() if m is not None}
        sign = 1 if self._mode == "min" else -1
        return min(scores, key=lambda s: (sign * scores[s], s)) if scores else None

    def _load_scores(self) -> dict[int, float | None]:
        if self._scores is None:
            self._scores = {}
            for step in self.steps():
                try:
                    self._scores[step] = self._read_meta(step)["metric"]
                except CheckpointError:
                    self._scores[step] = None
        return self._scores

    def save(
        self,
        step: int,
        state: PyTree,
        meta: Mapping[str, Any],
        *,
        metric: float | None = None,
    ) -> None:
        """Saves a state under a step that is not saved yet.

        Args:
          step: Number of completed steps.
          state: Any pytree of arrays; typed keys, bfloat16 and NamedTuples included.
            Its buffers may be donated as soon as this returns.
          meta: Plain JSON that travels with it (configuration, position, ...).
          metric: Validation score that ranks this step; None or NaN does not rank.

        Raises:
          CheckpointError: If the step is there already (a checkpoint is never written
            over), or the previous save failed in the background.
        """
        ocp, io = _orbax(), self._open()
        self.wait()
        if self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} exists already.")
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
        if metric is not None and not np.isfinite(metric):
            metric = None
        record = {
            "meta": to_json(meta),
            "metric": to_json(metric),
            "step": step,
            "spec": tree_spec(state),
            "digest": tree_digest(state),
        }
        record["seal"] = _seal(record)
        self._load_scores()[step] = record["metric"]
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record)
        )
        io.save(self.path(step), args=items)

    def wait(self) -> None:
        """Returns when the last save is durable, and drops what need not be kept."""
        if self._io is None:
            return
        try:
            self._io.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"Saving a checkpoint in {self.directory} failed: {error}"
            ) from error
        steps = self.steps()
        keep = {*steps[-self._keep_last :], self.best_step()}
        for step in steps:
            if step not in keep:
                self._delete(step)
                self._load_scores().pop(step, None)

    def _delete(self, step: int) -> None:
        # Renamed first: a kill halfway must not leave half a step under its name.
        doomed = self.directory / f"{step}.deleting"
        shutil.rmtree(doomed, ignore_errors=True)
        self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def clean(self) -> None:
        """Removes what a killed save left behind. Only the process that saves may."""
        for leftover in our_leftovers(self.directory):
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[pathlib.Path]:
        """Moves the checkpoints newer than ``step`` out of the way.

        After falling back to an older step, the run will come to those steps again.

        Args:
          step: The newest one to stay.

        Returns:
          Where they went: ``<directory>/<step>.damaged``.
        """
        moved = []
        for newer in [s for s in self.steps() if s > step]:
            target = self.directory / f"{newer}.damaged"
            shutil.rmtree(target, ignore_errors=True)
            moved.append(self.path(newer).rename(target))
            self._load_scores().pop(newer, None)
        return moved

    def _read_meta(self, step: int) -> dict[str, Any]:
        ocp, io = _orbax(), self._open()
        try:
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            record = io.restore(self.path(step), args=items).meta
            seal = record.pop("seal")
        except Exception as error:
            raise CheckpointError(f"its record is unreadable ({error})") from error
        if seal != _seal(record):
            raise CheckpointError("its record does not match its digest")
        return record

    def _read_state(self, step: int, target: PyTree, digest: str) -> PyTree:
        ocp, io = _orbax(), self._open()
        state, reason = None, ""
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = io.restore(self.path(step), args=items).state
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = lines[0][:120]
        if reason:
            _collect_quietly()
            raise CheckpointError(f"its arrays are unreadable ({reason})")
        if tree_digest(state) != digest:
            raise CheckpointError("its arrays do not match their digest")
        return state

    def restore(
        self,
        target: PyTree,
        step: int | Literal["latest", "best"] = "latest",
        *,
        warn: Callable[[str], None] | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> Restored:
        """Restores a state like ``target``, verified against its digest.

        Args:
          target: A state of the right structure (its values are not read), or its
            shapes (:func:`jax.eval_shape`).
          step: A step, ``"best"``, or ``"latest"``, which falls back to the newest
            undamaged one, with a warning for each it passes over.
          warn: What to do with such a warning; default :func:`warnings.warn`.
          check: Called with ``meta`` before any array is read; may raise.

        Returns:
          The state, its step, and the ``meta`` it was saved with.

        Raises:
          CheckpointError: No checkpoint, or none undamaged; names the path.
          TreeMismatchError: It holds another tree; names the leaf.
        """
        self.wait()
        warn = warn or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3))
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"No checkpoint in {self.directory}.")
        if step == "latest":
            candidates = steps[::-1]
        else:
            wanted = self.best_step() if step == "best" else step
            if wanted is None:
                raise CheckpointError(
                    f"No checkpoint in {self.directory} was saved with a metric."
                )
            if wanted not in steps:
                raise CheckpointError(
                    f"No checkpoint of step {wanted} in {self.directory}; "
                    f"there are {steps}."
                )
            candidates = [wanted]
        shapes = jax.tree.map(_orbax().utils.to_shape_dtype_struct, target)
        problems = []
        for candidate in candidates:
            try:
                record = self._read_meta(candidate)
                if check is not None:
                    check(record["meta"])
                self._check_tree(candidate, record["spec"], tree_spec(target))
                state = self._read_state(candidate, shapes, record["digest"])
            except (TreeMismatchError, ConfigMismatchError):
                raise
            except CheckpointError as error:
                problem = f"Checkpoint {self.path(candidate)} is damaged: {error}"
                problems.append(problem)
                if candidate != candidates[-1]:
                    warn(f"{problem}; trying the one before it.")
                continue
            return Restored(state, candidate, record["meta"])
        more = f" (and {len(problems) - 1} newer ones)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[-1]}{more}.")

    def _check_tree(
        self, step: int, saved: Mapping[str, str], wanted: Mapping[str, str]
    ) -> None:
        for leaf in [*saved, *wanted]:
            if saved.get(leaf) != wanted.get(leaf):
                raise TreeMismatchError(
                    f"Checkpoint {self.path(step)} has {saved.get(leaf, 'nothing')} at "
                    f"{leaf or '(root)'} where the state has "
                    f"{wanted.get(leaf, 'nothing')}."
                )

    def close(self) -> None:
        """Waits for the last save and releases the background threads."""
        if self._io is not None:
            try:
                self.wait()
            finally:
                self._io.close()
                self._io = None
