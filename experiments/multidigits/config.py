"""Options and presets of the multidigits experiment."""

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
"""Methods that most published tables contain. Other methods can be named."""


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Trains single-task baselines and multi-task methods and compares them."""

    methods: tuple[str, ...] = CLASSICS
    """Method factories of mtljax, in table order. The single-task runs come first."""
    data: str = "multidigits"
    """multidigits needs no files, other data sets are read from --data-dir. Any data
    set of mtljax.data with class or number targets, NAME/SUBSET, or your own
    module:function."""
    source: Literal["files", "tfds"] = "files"
    """Source of the MultiMNIST family."""
    download: bool = False
    """Allow tensorflow-datasets to download absent data."""
    train_size: int | None = None
    """Training examples. None uses the default of the data set."""
    eval_size: int = 2000
    """Validation and test examples used, at most."""

    model: Literal["mlp", "lenet", "resnet18"] = "mlp"
    """Shared trunk. Each task has its own linear head."""
    hidden: Widths = (128, 128)
    """Widths of the MLP trunk."""
    kernels: tuple[int, int] = (9, 5)
    """Kernel sizes of LeNet. (5, 3) fits the 12x12 canvas of multidigits."""
    heads: Literal["own", "weighted"] = "own"
    """Heads descend their own loss, or their loss multiplied by the task weight."""
    steps: int = 1200
    """Updates of each run."""
    batch_size: int = 128
    """Examples per update."""
    lrs: Rates = (1e-3,)
    """Learning rates of Adam. Validation selects one of several for each method."""
    clip_norm: float | None = None
    """Maximum global norm of the balanced gradient, equal for all methods."""

    eval_every: int = 150
    """Steps between evaluations. Validation selects the reported step."""
    log_every: int = 30
    """Steps between rows of training losses and weights."""
    probe_size: int = 256
    """Training examples for the measurement of gradient cosines."""
    time_steps: Size = 50
    """Steps per timing round, of three rounds. 0 disables the timing."""

    out: pathlib.Path = pathlib.Path("results/multidigits")


PRESETS = {
    "smoke": (
        "About 15 seconds, mostly compilation: two methods, a few steps.",
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
        "The default, less than 3 minutes on 2 CPU cores: all methods, 3 seeds.",
        Config(),
    ),
    "full": (
        "About an hour on 2 CPU cores: LeNet, tuned learning rates, 5 seeds.",
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
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
    common.check_common(config)
    common.check_some("methods", config.methods)
    common.check_methods("methods", config.methods)
    check_data("data", (config.data,), data.available())
    if config.download and config.source != "tfds":
        raise ConfigError("--download requires --source tfds.")
