"""Atomic checkpoints of the whole state, with digests and retention.

Orbax's ``CheckpointManager`` writes, retains and deletes them, for states on any mesh
and for several processes. This module adds a record with a digest, the verification of
restored arrays, and the fallback to an older step.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from mtljax.training import _hosts
from mtljax.training._digest import tree_digest, tree_spec
from mtljax.training._options import Mode
from mtljax.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    TreeMismatchError,
)
from mtljax.training.records import to_json
from mtljax.training.writers import writing

FORMAT = 2
TRASH = "deleted"  # steps are moved here before their files are deleted one by one


class Restored(NamedTuple):
    """Result of :meth:`Checkpointer.restore`."""

    state: Any  # like the target
    step: int
    meta: dict[str, Any]  # as passed to save


@functools.cache
def _orbax():
    """Imports Orbax (0.6 s to 2.4 s) at first use and silences its log messages."""
    import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_QuietOrbax())
    sys.unraisablehook = functools.partial(_quiet_hook, sys.unraisablehook)
    # A failed save leaves the writes of other arrays behind, which it has not started.
    late = "coroutine '.*serialize.*' was never awaited"
    warnings.filterwarnings("ignore", late, RuntimeWarning)
    return ocp


def _quiet_hook(hook: Callable[..., None], error: Any) -> None:
    """Suppresses the tracebacks of TensorStore's threads after a failed save.

    A failed save closes its event loop while other arrays are still written. Each late
    write then reports a closed loop, without an object that could name its origin.
    """
    closed = isinstance(error.exc_value, RuntimeError)
    closed = closed and str(error.exc_value) == "Event loop is closed"
    if not (closed and error.object is None):
        hook(error)


class _QuietOrbax(logging.Filter):
    """Suppresses Orbax messages. This module raises its errors in one sentence."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in f"{record.pathname} {record.getMessage()}"


def _reason(error: Exception) -> str:
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(r"os_error_code='?(\d+)", str(error)):
        return os.strerror(int(found[1]))  # TensorStore's errors
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def saved_steps(directory: str | pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in ``directory``, ascending.

    Examples:
      >>> from mtljax.training.checkpoint import saved_steps
      >>> saved_steps("/no/such/directory")
      []
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return []
    named = [p for p in directory.iterdir() if p.name.isdecimal() and p.is_dir()]
    parts = ("meta", "state", "_CHECKPOINT_METADATA")  # other folders lack these
    ours = [p for p in named if any((p / part).exists() for part in parts)]
    return sorted(int(p.name) for p in ours if p.name == str(int(p.name)))


def our_leftovers(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns folders in ``directory`` that an interrupted save or deletion left."""
    directory = pathlib.Path(directory)
    unfinished = directory.glob("*.orbax-checkpoint-tmp*")
    return [p for p in [*unfinished, directory / TRASH] if p.is_dir()]


class Checkpointer:
    """Saves and restores whole states. Use it as a context manager.

    A step is written under a temporary name and renamed when it is complete. After
    ``kill -9`` at any time, every listed step is therefore complete. The last
    ``keep_last`` steps and the best step by ``metric`` are kept. Among equal metrics
    the earliest step is the best. Saving runs in the background. It is durable after
    :meth:`wait` or at the end of the context. Several processes must call the same
    methods in the same order.

    Args:
      directory: Parent folder of the steps. It is created if absent.
      keep_last: Number of recent steps to keep. With two, an undamaged step remains if
        the newest step is damaged.
      mode: ``"min"`` or ``"max"``, the direction in which ``metric`` is better.

    Raises:
      ValueError: If ``keep_last`` is less than 1 or ``mode`` is unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from mtljax.training import Checkpointer
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
        self._manager: Any = None
        self._scores: dict[int, float | None] | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def _open(self):
        if self._manager is None:
            ocp = _orbax()
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self,  # pyright: ignore[reportArgumentType]
                todelete_subdir=TRASH,
                save_root_metadata=False,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Orbax's retention policy: keeps the last checkpoints and the best one."""
        del context
        ours = sorted(self._load_scores())
        keep = {*ours[-self._keep_last :], self.best_step()}
        gone = set(ours) - keep
        self._scores = {s: m for s, m in self._load_scores().items() if s in keep}
        return [info.step not in gone for info in checkpoints]

    def path(self, step: int) -> pathlib.Path:
        """Returns the path at which a step is or would be stored."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Returns the complete steps, ascending."""
        return saved_steps(self.directory)

    def best_step(self) -> int | None:
        """Returns the stored step with the best metric, or None."""
        scores = {s: m for s, m in self._load_scores().items() if m is not None}
        sign = 1 if self._mode == "min" else -1
        return min(scores, key=lambda s: (sign * scores[s], s)) if scores else None

    def _load_scores(self) -> dict[int, float | None]:
        if self._scores is None:
            self._scores = {}
            for step in self.steps():
                try:
                    self._scores[step] = self._read_record(step)["metric"]
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
        """Saves a state under a new step.

        Args:
          step: Number of completed steps.
          state: Any pytree of arrays, including typed keys, bfloat16 and NamedTuples.
            Its buffers may be donated when this method has returned.
          meta: Plain JSON that is stored with the state (configuration, position, ...).
            With several processes, the value of the first process is stored.
          metric: Validation score that ranks this step. None and NaN are not ranked.

        Raises:
          CheckpointError: If the step exists (checkpoints are never overwritten), or a
            save failed.
        """
        self.wait()
        if self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} exists already.")
        if metric is not None and not np.isfinite(metric):
            metric = None
        record = {
            "format": FORMAT,
            "meta": to_json(meta),
            "metric": to_json(metric),
            "step": step,
            "spec": tree_spec(state),
            "digest": tree_digest(state),
        }
        record["seal"] = _seal(record)
        self._load_scores()[step] = record["metric"]
        with self._saying_so():
            args = _orbax().args
            items = args.Composite(
                state=args.StandardSave(state), meta=args.JsonSave(record)
            )
            # Without force, Orbax skips steps before its latest step, even foreign
            # ones.
            self._open().save(step, args=items, force=True)

    @contextlib.contextmanager
    def _saying_so(self):
        reason = ""
        try:
            yield
        except Exception as error:
            reason = _reason(error)
        if reason:
            self._scores = None
            raise CheckpointError(
                f"Saving a checkpoint in {self.directory} failed: {reason}."
            )

    def wait(self) -> None:
        """Waits until the last save is durable and the replaced steps are deleted."""
        if self._manager is None:
            return
        with self._saying_so():
            self._manager.wait_until_finished()
        if _hosts.is_main():
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def clean(self) -> None:
        """Removes remains of an interrupted save. Only for the saving process."""
        for leftover in our_leftovers(self.directory):
            shutil.rmtree(leftover, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[pathlib.Path]:
        """Renames the checkpoints that are newer than ``step``.

        A run that falls back to an older step will write these steps again.

        Args:
          step: Newest step that is not renamed.

        Returns:
          The new paths, ``<directory>/<step>.damaged``.
        """
        newer = [s for s in self.steps() if s > step]
        moved = [self.directory / f"{s}.damaged" for s in newer]
        _hosts.gather(None)  # all processes have listed the steps
        if _hosts.is_main():
            with writing(self.directory):
                for old, target in zip(newer, moved, strict=True):
                    shutil.rmtree(target, ignore_errors=True)
                    self.path(old).rename(target)
        _hosts.gather(None)
        self._scores = None
        return moved

    def _read_record(self, step: int) -> dict[str, Any]:
        try:
            record = json.loads((self.path(step) / "meta" / "metadata").read_bytes())
            seal = record.pop("seal")
        except Exception as error:
            raise CheckpointError(
                f"its record is unreadable ({_reason(error)})."
            ) from error
        if seal != _seal(record):
            raise CheckpointError("its record does not match its digest.")
        if record.get("format") != FORMAT:
            raise CheckpointError("its format is that of another version of mtljax.")
        if record["step"] != step:
            raise CheckpointError(f"its record is that of step {record['step']}.")
        return record

    def _read_state(self, step: int, target: PyTree, digest: str) -> PyTree:
        state, reason = None, ""
        try:
            ocp = _orbax()
            with ocp.StandardCheckpointer() as io:
                state = io.restore(self.path(step) / "state", target)
        except Exception as error:
            reason = _reason(error)
        if any(reasons := _hosts.gather(reason)):
            found = next(filter(None, reasons))
            raise CheckpointError(f"its arrays are unreadable ({found}).")
        if tree_digest(state) != digest:
            raise CheckpointError("its arrays do not match their digest.")
        return state

    def restore(
        self,
        target: PyTree,
        step: int | Literal["latest", "best"] = "latest",
        *,
        warn: Callable[[str], None] | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> Restored:
        """Restores a state like ``target`` and verifies its digest.

        The state may have been saved on another number of devices or processes.

        Args:
          target: A state of the same structure, or its shapes (:func:`jax.eval_shape`).
            Its values are not read. Its shardings place the arrays. A leaf without a
            sharding is placed on the default device.
          step: A step, ``"best"``, or ``"latest"``. ``"latest"`` falls back to the
            newest undamaged step, with one warning per skipped step.
          warn: Function that receives these warnings. The default is
            :func:`warnings.warn`.
          check: Function that is called with ``meta`` before arrays are read. It may
            raise.

        Returns:
          The state, its step, and the ``meta`` that was stored with it.

        Raises:
          CheckpointError: If there is no undamaged checkpoint. The message names the
            path.
          TreeMismatchError: If the stored tree is different. The message names the
            leaf.
        """
        self.wait()
        warn = warn or (lambda text: warnings.warn(text, RuntimeWarning, stacklevel=3))
        shapes = jax.tree.map(_with_sharding, target)
        problems = []
        candidates = self._candidates(step)
        for candidate in candidates:
            try:
                record = self._read_record(candidate)
                if check is not None:
                    check(record["meta"])
                self._check_tree(candidate, record["spec"], tree_spec(target))
                state = self._read_state(candidate, shapes, record["digest"])
            except (TreeMismatchError, ConfigMismatchError):
                raise
            except CheckpointError as error:
                reason = str(error).removesuffix(".")
                problem = f"Checkpoint {self.path(candidate)} is damaged: {reason}"
                problems.append(problem)
                if candidate != candidates[-1]:
                    warn(f"{problem}; trying the one before it.")
                continue
            return Restored(state, candidate, record["meta"])
        more = f" (and {len(problems) - 1} newer ones)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[-1]}{more}.")

    def _candidates(self, step: int | Literal["latest", "best"]) -> list[int]:
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"No checkpoint in {self.directory}.")
        if step == "latest":
            return steps[::-1]
        wanted = self.best_step() if step == "best" else step
        if wanted is None:
            raise CheckpointError(
                f"No checkpoint in {self.directory} was saved with a metric."
            )
        if wanted not in steps:
            raise CheckpointError(
                f"No checkpoint of step {wanted} in {self.directory}; the steps are "
                f"{steps}."
            )
        return [wanted]

    def _check_tree(
        self, step: int, saved: Mapping[str, str], wanted: Mapping[str, str]
    ) -> None:
        for leaf in [*saved, *wanted]:
            if saved.get(leaf) != wanted.get(leaf):
                raise TreeMismatchError(
                    f"Checkpoint {self.path(step)} has {saved.get(leaf, 'nothing')} at "
                    f"{leaf or '(root)'}, but the state has "
                    f"{wanted.get(leaf, 'nothing')}."
                )

    def close(self) -> None:
        """Waits for the last save and stops the background threads."""
        manager = self._manager
        if manager is None:
            return
        try:
            self.wait()
        finally:
            self._manager = None
            with contextlib.suppress(Exception):  # already raised by wait
                manager.close()


def _with_sharding(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        if jax.process_count() > 1:
            raise ValueError(
                "With several processes, a target needs shardings. Pass arrays, or "
                "shapes with sharding=."
            )
        sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
