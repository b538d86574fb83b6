"""What can be set, and the presets."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config as common
from experiments.common.config import ConfigError, Rates, Size, Widths
from experiments.common.problem import check_data
from mtljax import data

SINGLE_TASK = "single_task"

CLASSICS = (
    "linear",
    "scale_invariant",
    "random_loss_weighting",
    "uncertainty",
    "dwa",
    "famo",
    "mgda",
    "pcgrad",
    "imtl_g",
    "cagrad",
    "nash_mtl",
)
"""The methods that most tables of the field share; any other can be named."""


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Trains single-task baselines and multi-task methods and compares them."""

    methods: tuple[str, ...] = CLASSICS
    """Factories of mtljax, in the order of the table; single-task runs come first."""
    data: str = "multidigits"
    """multidigits needs no files; the others read --data-dir. Any set of mtljax.data
    with classes and numbers as targets, NAME/SUBSET, or module:function of your own."""
    source: Literal["files", "tfds"] = "files"
    """Where the MultiMNIST family comes from."""
    download: bool = False
    """Let tensorflow-datasets download what is absent."""
    train_size: int | None = None
    """Training examples; None is the data set's default."""
    eval_size: int = 2000
    """Validation and test examples used, at most."""

    model: Literal["mlp", "lenet", "resnet18"] = "mlp"
    """Trunk that the tasks share; each has a linear head of its own."""
    hidden: Widths = (128, 128)
    """Widths of the MLP's trunk."""
    kernels: tuple[int, int] = (9, 5)
    """Kernel sizes of LeNet; (5, 3) fits the 12x12 canvas of multidigits."""
    heads: Literal["own", "weighted"] = "own"
    """Heads follow their own loss, or their loss times the task's weight."""
    steps: int = 1200
    """Updates of every run."""
    batch_size: int = 128
    """Examples per update."""
    lrs: Rates = (1e-3,)
    """Learning rates of Adam; with several, validation picks one for each method."""
    clip_norm: float | None = None
    """Clips the global norm of the balanced gradient, for all methods alike."""

    eval_every: int = 150
    """Steps between evaluations (validation picks the step that is reported)."""
    log_every: int = 30
    """Steps between rows of training losses and weights."""
    probe_size: int = 256
    """Training examples on which the cosines of task gradients are measured."""
    time_steps: Size = 50
    """Steps of one timing round, of three; 0 leaves the timing out."""

    out: pathlib.Path = pathlib.Path("results/multidigits")


PRESETS = {
    "smoke": (
        "Some fifteen seconds, mostly compilation: two methods, a few steps.",
        Config(
            methods=("linear", "cagrad"),
            seeds=2,
            train_size=512,
            eval_size=256,
            hidden=(32,),
            steps=12,
            batch_size=64,
            eval_every=6,
            log_every=3,
            probe_size=64,
            time_steps=0,
            quick_compile=True,
            out=pathlib.Path("results/multidigits-smoke"),
        ),
    ),
    "demo": (
        "The default, below 3 minutes on 2 CPU cores: all methods, 3 seeds.",
        Config(),
    ),
    "full": (
        "About an hour on 2 CPU cores: LeNet, learning rates tuned, 5 seeds.",
        Config(
            model="lenet",
            kernels=(5, 3),
            seeds=5,
            steps=4000,
            eval_every=250,
            log_every=50,
            lrs=(3e-4, 1e-3, 3e-3),
            out=pathlib.Path("results/multidigits-full"),
        ),
    ),
}


def check(config: Config) -> None:
    """Validates the configuration before anything is read.

    Raises:
      ConfigError: One sentence that names the field.
    """
    common.check_common(config)
    common.check_some("methods", config.methods)
    common.check_methods("methods", config.methods)
    check_data("data", (config.data,), data.available())
    if config.download and config.source != "tfds":
        raise ConfigError("--download works with --source tfds only.")
