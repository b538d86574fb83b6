"""Training loops for any step: checkpoints, rows, progress and tables.

A step is a function ``step(state, batch) -> (state, metrics)``. :func:`fit` runs it
with evaluation, checkpoints and signal handling. :func:`make_train` provides the same
training as a pure function. Orbax, rich, matplotlib and tensorboardX are imported at
first use.
"""

from mtljax.extras import require

require("mtljax.training", "train", "orbax.checkpoint")

from mtljax.training._digest import tree_digest
from mtljax.training._options import Checkpointing, Evaluation, Execution, Logging
from mtljax.training._run import Best, FitResult
from mtljax.training.checkpoint import Checkpointer, Restored
from mtljax.training.errors import (
    CheckpointError,
    ConfigMismatchError,
    NonFiniteLossError,
    NonPositiveLossError,
    OutputError,
    RunExistsError,
    RunLockedError,
    TrainingError,
    TreeMismatchError,
)
from mtljax.training.fit import fit
from mtljax.training.loop import (
    Step,
    epoch_order,
    make_chunk,
    make_runner,
    make_stream_step,
    make_train,
    split_run_key,
)
from mtljax.training.progress import Progress
from mtljax.training.records import MAY_DIFFER, environment, to_json
from mtljax.training.run_dir import load_run, lock_run
from mtljax.training.writers import (
    JsonlWriter,
    MemoryWriter,
    TensorBoardWriter,
    Writer,
    read_jsonl,
)

__all__ = [
    # the driver
    "fit",
    "Evaluation",
    "Checkpointing",
    "Logging",
    "Execution",
    "FitResult",
    "Best",
    "load_run",
    "lock_run",
    # pure loops
    "Step",
    "make_chunk",
    "make_runner",
    "make_stream_step",
    "make_train",
    "split_run_key",
    "epoch_order",
    # checkpoints
    "Checkpointer",
    "Restored",
    "tree_digest",
    # rows and progress
    "Writer",
    "JsonlWriter",
    "MemoryWriter",
    "TensorBoardWriter",
    "read_jsonl",
    "Progress",
    "environment",
    "to_json",
    "MAY_DIFFER",
    # errors
    "TrainingError",
    "NonFiniteLossError",
    "NonPositiveLossError",
    "CheckpointError",
    "ConfigMismatchError",
    "TreeMismatchError",
    "RunExistsError",
    "RunLockedError",
    "OutputError",
]
