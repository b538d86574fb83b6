"""Groups of options of :func:`mtljax.training.fit`."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jax.sharding import NamedSharding

from mtljax.training.writers import Writer

Mode = Literal["min", "max"]


def _at_least_one(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """When and how a run is evaluated.

    Args:
      function: ``function(state) -> dict`` of arrays (``[S, ...]`` with several seeds).
        Compile it yourself.
      every: Steps between evaluations. One is always made after the last step.
      at_start: Whether to evaluate the initial state as well.
      select: The entry (mean over all its elements, so over seeds) that picks the best
        checkpoint, normally a validation metric.
      mode: Whether the best is the smallest or the largest.

    Examples:
      >>> Evaluation(lambda state: {"loss": state}, every=0)
      Traceback (most recent call last):
      ...
      ValueError: Evaluation.every=0 must be at least 1.
    """

    function: Callable[[Any], Mapping[str, Any]]
    every: int | None = None
    at_start: bool = False
    select: str | None = None
    mode: Mode = "min"

    def __post_init__(self):
        _at_least_one(**{"Evaluation.every": self.every})
        if self.mode not in ("min", "max"):
            raise ValueError(f"Evaluation.mode={self.mode!r} must be 'min' or 'max'.")


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Where a run is kept, and how it starts.

    Args:
      directory: Receives ``metrics.jsonl`` and ``checkpoints/<step>``.
      every: Steps between checkpoints. One is also written at each new best, when a
        signal stops the run, and at the end.
      keep_last: How many of the newest checkpoints to keep, besides the best.
      resume: True continues from the newest undamaged checkpoint. ``"auto"`` does so if
        there is one and starts a new run otherwise. It then renames the rows of a run
        without a checkpoint.
      overwrite: Deletes the files of an earlier run first.
      config: Dataclass or mapping, stored with every checkpoint and in the header of
        the rows, and compared on resume.
      may_differ: Dotted names of fields of ``config`` that a resume may change,
        besides :data:`mtljax.training.MAY_DIFFER`.

    Examples:
      >>> Checkpointing("runs/a", resume=True, overwrite=True)
      Traceback (most recent call last):
      ...
      ValueError: resume and overwrite exclude each other.
    """

    directory: str | pathlib.Path
    every: int | None = None
    keep_last: int = 2
    resume: bool | Literal["auto"] = False
    overwrite: bool = False
    config: Any = None
    may_differ: Iterable[str] = ()

    def __post_init__(self):
        _at_least_one(
            **{
                "Checkpointing.every": self.every,
                "Checkpointing.keep_last": self.keep_last,
            }
        )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")


@dataclasses.dataclass(frozen=True)
class Logging:
    """Which rows a run writes, and what it shows.

    Args:
      every: Steps between train rows, which hold means over those steps.
      writers: Further receivers of the rows.
      tensorboard: Whether to write ``<directory>/tensorboard`` too.
      progress: Whether to show progress.
      title: Name of the run, shown before the progress.
    """

    every: int = 50
    writers: Sequence[Writer] = ()
    tensorboard: bool = False
    progress: bool = True
    title: str = ""

    def __post_init__(self):
        _at_least_one(**{"Logging.every": self.every})


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the steps of a run are executed.

    Args:
      chunk: The most steps of one call of the compiled program.
      loop_on: ``"device"`` loops over arrays inside the compiled program, ``"host"``
        calls one compiled step at a time. ``"auto"`` takes the host where
        :func:`~mtljax.training.loop.prefers_host_loop` recommends it.
      positive_losses: Whether a loss of zero or less stops the run. Pass the
        ``positive_losses`` of a balancer.
      batch_sharding: How a batch lies on the mesh of the state, e.g.
        ``NamedSharding(mesh, P("data"))``. By default each device has the whole batch.
        With several processes a stream needs it: each process then gives its part.
    """

    chunk: int = 1000
    loop_on: Literal["device", "host", "auto"] = "device"
    positive_losses: bool = False
    batch_sharding: NamedSharding | None = None

    def __post_init__(self):
        _at_least_one(**{"Execution.chunk": self.chunk})
        if self.loop_on not in ("device", "host", "auto"):
            raise ValueError(
                f"Execution.loop_on={self.loop_on!r} must be 'device', 'host' or "
                "'auto'."
            )
