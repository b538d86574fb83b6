"""Exceptions that stop a run. Each message is one sentence."""


class TrainingError(RuntimeError):
    """Base class of the errors of :mod:`mtljax.training`."""


class NonFiniteLossError(TrainingError):
    """A loss or a parameter became NaN or infinite.

    Attributes:
      step: The 1-based step of the first non-finite value.
      task: Name of the first task with such a loss, or None for a parameter.
      checkpoint: Path of the last good checkpoint, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        task: str | None = None,
        checkpoint: str | None = None,
    ):
        super().__init__(message)
        self.step = step
        self.task = task
        self.checkpoint = checkpoint


class NonPositiveLossError(NonFiniteLossError):
    """A loss became zero or negative, but the method requires positive losses."""


class CheckpointError(TrainingError):
    """No usable checkpoint exists."""


class TreeMismatchError(CheckpointError):
    """The checkpoint contains a state tree that differs from the target."""


class ConfigMismatchError(CheckpointError):
    """The run to resume was started with another configuration."""


class RunExistsError(TrainingError):
    """The run directory already contains a run."""


class RunLockedError(RunExistsError):
    """Another process uses the run directory."""


class OutputError(TrainingError):
    """A file could not be written, for example because the disk is full."""
