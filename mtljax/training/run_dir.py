"""The folder of a run: its lock, its files, and restoring from it."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator
from typing import Literal

from jaxtyping import PyTree

from mtljax.training import checkpoint as checkpoints
from mtljax.training.errors import OutputError, RunLockedError
from mtljax.training.writers import writing

# Held paths. The locks of the operating system do not exclude the same process.
_held: set[pathlib.Path] = set()


@contextlib.contextmanager
def lock_run(run_dir: str | pathlib.Path) -> Iterator[None]:
    """Excludes other processes from a run directory, which is created if absent.

    The operating system releases the lock when the process ends for any reason. The
    file ``.lock`` is not deleted.

    Args:
      run_dir: The directory.

    Raises:
      RunLockedError: If another process uses the directory. The message names it.
      OutputError: If the directory cannot be written.

    Examples:
      >>> import tempfile
      >>> from mtljax.training import lock_run
      >>> with lock_run(folder := tempfile.mkdtemp()), lock_run(folder):
      ...     pass
      Traceback (most recent call last):
      ...
      mtljax.training.errors.RunLockedError: ... is in use by process ...
    """
    run_dir = pathlib.Path(run_dir)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir.resolve() / ".lock"
        taken = path in _held  # opening the file twice would release the lock
        file = None if taken else os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if file is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                taken = True
            except OSError as error:
                why = error.strerror
                raise OutputError(f"{run_dir} cannot be locked: {why}.") from error
        if file is None or taken:
            owner = f"process {os.getpid()}" if file is None else path.read_text()
            raise RunLockedError(
                f"{run_dir} is in use by {owner or 'another process'}."
            )
        _held.add(path)
        try:
            with writing(path):
                os.truncate(file, 0)
                name = f"process {os.getpid()} on {socket.gethostname()}"
                os.pwrite(file, name.encode(), 0)
            yield
        finally:
            _held.discard(path)
    finally:
        if file is not None:
            os.close(file)


def holds_run(run_dir: str | pathlib.Path) -> bool:
    """Returns whether a directory contains the files of a run.

    Examples:
      >>> from mtljax.training.run_dir import holds_run
      >>> holds_run("/no/such/directory")
      False
    """
    run_dir = pathlib.Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() or bool(checkpoints.saved_steps(run_dir / "checkpoints"))


def remove_run(run_dir: str | pathlib.Path) -> None:
    """Deletes the files that :func:`fit` wrote into a directory, and no others.

    Raises:
      OutputError: If a file cannot be deleted, or a file with the name of a run's file
        was not written by a run.
    """
    run_dir = pathlib.Path(run_dir)
    rows = run_dir / "metrics.jsonl"
    with writing(run_dir):
        if rows.exists() and b'"kind": "header"' not in rows.read_bytes()[:100]:
            raise OutputError(f"{rows} was not written by a run: move it away.")
        folder = run_dir / "checkpoints"
        trash = folder / checkpoints.TRASH
        for path in checkpoints.our_leftovers(folder):
            shutil.rmtree(path)
        old = [folder / str(step) for step in checkpoints.saved_steps(folder)]
        old += [p for p in folder.glob("*.damaged") if p.stem.isdecimal()]
        for path in old:  # renamed first, so that a kill leaves no partial checkpoint
            trash.mkdir(exist_ok=True)
            path.rename(trash / path.name)
        if old:
            shutil.rmtree(trash)
        for path in (rows, run_dir / "metrics.jsonl.new"):
            path.unlink(missing_ok=True)
        for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
            path.unlink()
        for path in (folder, run_dir / "tensorboard"):
            with contextlib.suppress(OSError):  # absent or not empty
                path.rmdir()


def set_rows_aside(run_dir: str | pathlib.Path) -> pathlib.Path | None:
    """Renames the rows of a run that has no checkpoint.

    At most one renamed file is kept, the longer one. A run that is killed again before
    its first checkpoint writes the same rows again.
    """
    rows = pathlib.Path(run_dir) / "metrics.jsonl"
    aside = rows.with_name(f"{rows.name}.1")
    if not rows.exists():
        return None
    with writing(rows):
        if aside.exists() and aside.stat().st_size >= rows.stat().st_size:
            rows.unlink()
            return None
        return rows.rename(aside)


def load_run(
    run_dir: str | pathlib.Path,
    target: PyTree,
    which: int | Literal["latest", "best"] = "best",
    *,
    mode: checkpoints.Mode = "min",
) -> checkpoints.Restored:
    """Restores a state of a finished or active run for evaluation.

    Args:
      run_dir: Directory of the run, see :class:`Checkpointing`.
      target: A state of the same structure, or its shapes, see
        :meth:`Checkpointer.restore`.
      which: ``"best"``, ``"latest"`` or a stored step.
      mode: The ``mode`` of the run's :class:`Evaluation`.

    Returns:
      The state, its step and its record.

    Raises:
      CheckpointError: If the checkpoint does not exist or is damaged.
      TreeMismatchError: If the checkpoint contains another tree.
    """
    with checkpoints.Checkpointer(
        pathlib.Path(run_dir) / "checkpoints", mode=mode
    ) as ckpt:
        return ckpt.restore(target, which)
