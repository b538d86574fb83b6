"""Option groups of :func:`mtljax.training.fit`."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jax.sharding import NamedSharding

from mtljax.balancer import check_choice
from mtljax.training.writers import Writer

Mode = Literal["min", "max"]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of a run.

    Args:
      function: ``function(state) -> dict`` of arrays (``[S, ...]`` with several seeds).
        It is not compiled by :func:`fit`.
      every: Number of steps between evaluations. The final state is always evaluated.
      at_start: Whether to evaluate the initial state as well.
      select: Name of the metric that selects the best checkpoint, normally a validation
        metric. It is averaged over all its elements, including seeds.
      mode: ``"min"`` or ``"max"``, the direction in which ``select`` is better.

    Examples:
      >>> from mtljax.training import Evaluation
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
        _at_least_one("Evaluation.every", self.every)
        check_choice("Evaluation", "mode", self.mode, Mode)


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Storage of a run, and the way it starts.

    Args:
      directory: Folder for ``metrics.jsonl`` and ``checkpoints/<step>``.
      every: Number of steps between checkpoints. Checkpoints are also written at each
        new best value, after a signal, and at the end.
      keep_last: Number of recent checkpoints to keep, in addition to the best one.
      resume: With True, the run continues from the newest undamaged checkpoint. With
        ``"auto"`` it does so if a checkpoint exists, and starts a new run otherwise.
        The rows of a run without a checkpoint are then renamed.
      overwrite: Whether to delete the files of an earlier run first.
      config: Dataclass or mapping that is stored with each checkpoint and in the header
        of the rows. It is compared when the run is resumed.
      may_differ: Dotted names of fields of ``config`` that a resumed run may change, in
        addition to :data:`mtljax.training.MAY_DIFFER`.

    Examples:
      >>> from mtljax.training import Checkpointing
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
        _at_least_one("Checkpointing.every", self.every)
        _at_least_one("Checkpointing.keep_last", self.keep_last)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")


@dataclasses.dataclass(frozen=True)
class Logging:
    """Metric rows and progress of a run.

    Args:
      every: Number of steps between train rows. A row contains means over these steps.
      writers: Additional writers that receive the rows.
      tensorboard: Whether to write ``<directory>/tensorboard`` as well.
      progress: Whether to show the progress.
      title: Name of the run, shown with the progress.
    """

    every: int = 50
    writers: Sequence[Writer] = ()
    tensorboard: bool = False
    progress: bool = True
    title: str = ""

    def __post_init__(self):
        _at_least_one("Logging.every", self.every)


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execution of the steps of a run.

    Args:
      chunk: Maximum number of steps in one call of the compiled program.
      loop_on: ``"device"`` loops over arrays inside the compiled program. ``"host"``
        calls one compiled step at a time. ``"auto"`` selects the host if
        :func:`~mtljax.training.loop.prefers_host_loop` recommends it.
      positive_losses: Whether a loss of zero or less stops the run. Pass the attribute
        ``positive_losses`` of the balancer.
      batch_sharding: Sharding of a batch on the mesh of the state, for example
        ``NamedSharding(mesh, P("data"))``. By default a batch is replicated. With
        several processes, a stream requires this option, and each process provides its
        part.
    """

    chunk: int = 1000
    loop_on: Literal["device", "host", "auto"] = "device"
    positive_losses: bool = False
    batch_sharding: NamedSharding | None = None

    def __post_init__(self):
        _at_least_one("Execution.chunk", self.chunk)
        check_choice("Execution", "loop_on", self.loop_on, ("device", "host", "auto"))
