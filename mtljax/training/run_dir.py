"""The folder of a run: whether there is one, removing it, loading from it."""

import contextlib
import pathlib
import shutil
from typing import Literal

from jaxtyping import PyTree

from mtljax.training import checkpoint as checkpoints


def holds_run(run_dir: str | pathlib.Path) -> bool:
    """Whether a directory holds the files of a run.

    Examples:
      >>> holds_run("/no/such/directory")
      False
    """
    run_dir = pathlib.Path(run_dir)
    metrics = run_dir / "metrics.jsonl"
    return metrics.exists() or bool(checkpoints.saved_steps(run_dir / "checkpoints"))


def remove_run(run_dir: str | pathlib.Path) -> None:
    """Deletes the files that :func:`fit` wrote into a directory, and nothing else."""
    run_dir = pathlib.Path(run_dir)
    for name in ("metrics.jsonl", "metrics.jsonl.new"):
        (run_dir / name).unlink(missing_ok=True)
    folder = run_dir / "checkpoints"
    ours = [folder / str(step) for step in checkpoints.saved_steps(folder)]
    ours += checkpoints.our_leftovers(folder)
    ours += folder.glob("*.damaged")
    for path in ours:
        shutil.rmtree(path)
    for path in (run_dir / "tensorboard").glob("events.out.tfevents.*"):
        path.unlink()
    for path in (folder, run_dir / "tensorboard"):
        with contextlib.suppress(OSError):  # absent, or not empty
            path.rmdir()


def set_rows_aside(run_dir: str | pathlib.Path) -> pathlib.Path | None:
    """Renames the rows of a run, which may be all that is left of it."""
    rows = pathlib.Path(run_dir) / "metrics.jsonl"
    if not rows.exists():
        return None
    number = 1
    while (aside := rows.with_name(f"{rows.name}.{number}")).exists():
        number += 1
    return rows.rename(aside)


def load_run(
    run_dir: str | pathlib.Path,
    target: PyTree,
    which: int | Literal["latest", "best"] = "best",
    *,
    mode: checkpoints.Mode = "min",
) -> checkpoints.Restored:
    """Loads a state of a finished (or running) run for evaluation.

    Args:
      run_dir: Directory given to :func:`fit`.
      target: A state of the right structure, or its shapes.
      which: ``"best"``, ``"latest"`` or a step that was kept.
      mode: The ``select_mode`` of the run.

    Returns:
      State, step and record.

    Raises:
      CheckpointError: No such checkpoint, or it is damaged.
      TreeMismatchError: It holds another tree.
    """
    with checkpoints.Checkpointer(
        pathlib.Path(run_dir) / "checkpoints", mode=mode
    ) as ckpt:
        return ckpt.restore(target, which)
