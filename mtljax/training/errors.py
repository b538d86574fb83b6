"""Errors that stop a run, each with a message of one sentence."""


class TrainingError(RuntimeError):
    """Base of the errors raised by :mod:`mtljax.training`."""


class NonFiniteLossError(TrainingError):
    """A loss (or a parameter) became NaN or infinite.

    Attributes:
      step: The 1-based step in which it happened.
      task: Name of the first offending task, None if a parameter was the first.
      checkpoint: Path of the last good checkpoint, None if there is none.
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
    """A loss whose logarithm the method takes was zero or negative."""


class CheckpointError(TrainingError):
    """No usable checkpoint: none there, or all of them damaged."""


class TreeMismatchError(CheckpointError):
    """The checkpoint holds another state tree than the one asked for."""


class ConfigMismatchError(CheckpointError):
    """The run to resume was started with another configuration."""


class RunExistsError(TrainingError):
    """The run directory already holds a run."""


class RunLockedError(RunExistsError):
    """Another process is working in the run directory."""


class OutputError(TrainingError):
    """A file could not be written, e.g. because the disk is full."""
