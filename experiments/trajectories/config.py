"""Options and presets of the trajectories experiment."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config as common
from experiments.common.config import Rates, Widths
from experiments.common.problem import check_data
from mtljax import data

SUM = "linear"
"""The uniform multi-task gradient with C = 1, the plain sum."""

SETTINGS = ("fashion_mtl", "cmu_faces", "cifar100", "celeba")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a setting is trained and measured. Examples are per task."""

    train_size: int | None = None
    """Training images per task, or None for all."""
    val_size: int = 1000
    """Validation images."""
    test_size: int | None = None
    """Test images, or None for all."""
    eval_size: int | None = None
    """Training images on which the training loss is measured; None for all."""
    steps: int = 2400
    """Updates of each run, including single-task runs."""
    batch_size: int = 32
    """Images of each task per update."""
    eval_every: int = 120
    """Steps between checkpoints of the trajectory."""
    lrs: Rates = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    """Learning rates of SGD with momentum, constant in a run. The validation scores of
    the single-task rows choose one for all rows."""
    rho: float = 1e-3
    """Half-width of the sharpness box, relative to the weights."""


@dataclasses.dataclass(frozen=True)
class Config(common.Tuned):
    """Trains single tasks and sets of tasks, measures their runs and compares them."""

    settings: tuple[str, ...] = ("fashion_mtl",)
    """Data of the settings. cifar100 and celeba come from tensorflow-datasets. The
    options --other.* apply to any data set of mtljax.data with class targets, to
    NAME/SUBSET, and to your own module:function."""
    methods: tuple[str, ...] = ()
    """Multi-task optimizers compared with the plain sum (optimiser_sets in data.py)."""
    download: bool = False
    """Allow tensorflow-datasets to download absent data."""

    blocks: Literal["chosen", "all"] = "chosen"
    """Rates that all rows are trained at: the chosen one, or all, that one first. Rows
    are compared at one rate only."""

    together: bool = False
    """Train the runs of a row together by vmap. Otherwise they are trained one after
    the other, which is faster for convolutions on a CPU."""

    model: Literal["mlp", "lenet", "resnet18"] = "lenet"
    """Shared trunk. Each task has its own linear head."""
    hidden: Widths = (32,)
    """Widths of the MLP."""
    fashion_mtl: Scale = Scale(
        train_size=4500,
        eval_size=2000,
        steps=10_000,
        eval_every=500,
        lrs=(0.003, 0.01, 0.03),
    )
    """Two halves of FashionMNIST, noisy labels, another domain (MNIST), and a copy of
    the first half: more tasks without new information."""
    cmu_faces: Scale = Scale()
    """Attributes of faces, split by person."""
    cifar100: Scale = Scale(train_size=2000, val_size=500, steps=9375, eval_every=125)
    """Twenty superclasses, one task each."""
    celeba: Scale = Scale(steps=15900, batch_size=256, eval_every=636)
    """Forty attributes."""
    other: Scale = Scale()
    """Any other data set, with its own sizes."""
    sets: Literal["pairs", "all", "largest"] = "pairs"
    """The target of FashionMTL with the other half, the noisy labels and the copy; all
    sets of tasks (random ones where tasks are many); or the largest only."""
    random_sets: tuple[int, ...] = (1, 1, 1, 1, 1, 3, 3, 3, 9)
    """Numbers of auxiliary tasks in the random sets."""
    num_targets: int = 3
    """Number of targets of the random sets."""

    sharpness_batches: int = 4
    """Batches of 128 probe images for the worst-case search."""
    sharpness_every: int = 4
    """Checkpoints between two measurements of sharpness, the most expensive measurement
    by far."""
    fisher_size: int = 256
    """Probe images with one sampled label each."""
    covariance_size: int = 256
    """Probe images, in micro-batches of 16."""
    similarity_batches: int = 10
    """Batches of the training size (twice as many half-batches for the split form)."""

    last: int = 8
    """Number of final checkpoints averaged for sharpness and covariance (paper: 20)."""
    largest: int = 5
    """Number of largest values averaged for the Fisher trace (paper: 20)."""
    best: int = 3
    """Number of checkpoints with the best validation score averaged for generalisation
    (paper: 10)."""

    out: pathlib.Path = pathlib.Path("results/trajectories")

    def scale(self, setting: str) -> Scale:
        """Returns the scale of a setting."""
        return getattr(self, setting if setting in SETTINGS else "other")


_TINY = Scale(
    train_size=256, val_size=64, test_size=128, steps=12, eval_every=4, lrs=(0.03,)
)

PRESETS = {
    "smoke": (
        "About 15 seconds, mostly compilation: the faces only, a few steps.",
        Config(
            settings=("cmu_faces",),
            methods=("pcgrad",),
            model="mlp",
            sets="largest",
            seeds=2,
            together=True,
            hidden=(8,),
            cmu_faces=dataclasses.replace(_TINY, train_size=160),
            sharpness_batches=1,
            fisher_size=32,
            covariance_size=64,
            similarity_batches=4,
            last=2,
            largest=2,
            best=1,
            quick_compile=True,
            out=pathlib.Path("results/trajectories-smoke"),
        ),
    ),
    "cpu": (
        "Three hours of one CPU core: halves of FashionMNIST, and the faces with other "
        "optimizers; LeNet, 5 seeds.",
        Config(
            settings=("fashion_mtl", "cmu_faces"),
            methods=("mgda", "pcgrad", "gradnorm"),
            seeds=5,
            cmu_faces=Scale(lrs=(0.003, 0.01, 0.03)),
        ),
    ),
    "large": (
        "Hours of 2 CPU cores: FashionMTL at three rates, the faces at six.",
        Config(
            settings=("fashion_mtl", "cmu_faces"),
            methods=("mgda", "pcgrad", "gradnorm"),
            seeds=5,
            sets="all",
            blocks="all",
            fashion_mtl=dataclasses.replace(
                Config.fashion_mtl, steps=12_000, eval_every=250
            ),
            best=10,
            out=pathlib.Path("results/trajectories-large"),
        ),
    ),
    "gpu": (
        "10 minutes on one GPU: FashionMTL at six rates, 10 seeds.",
        Config(
            seeds=10,
            together=True,
            blocks="all",
            fashion_mtl=dataclasses.replace(
                Config.fashion_mtl, lrs=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
            ),
            sharpness_batches=8,
            fisher_size=1000,
            covariance_size=1024,
            out=pathlib.Path("results/trajectories-gpu"),
        ),
    ),
    "paper": (
        "For an accelerator: all four settings, the paper's sizes if files allow.",
        Config(
            settings=SETTINGS,
            methods=("mgda", "pcgrad", "gradnorm"),
            seeds=3,
            sets="all",
            model="resnet18",
            fashion_mtl=Scale(
                train_size=25_000,
                val_size=5000,
                test_size=5000,
                steps=23_400,
                eval_every=390,
                lrs=(0.001, 0.005, 0.01, 0.05, 0.1),
            ),
            cifar100=Scale(
                train_size=2000,
                val_size=500,
                batch_size=16,
                steps=9375,
                eval_every=125,
                lrs=(0.0005, 0.001, 0.005, 0.01, 0.05),
                rho=0.01,
            ),
            sharpness_batches=16,
            sharpness_every=5,
            fisher_size=2000,
            covariance_size=1024,
            similarity_batches=200,
            last=20,
            largest=20,
            best=10,
            out=pathlib.Path("results/trajectories-paper"),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
    common.check_common(config)
    common.check_methods("methods", config.methods)
    common.check_some("settings", config.settings)
    check_data("settings", config.settings, (*SETTINGS, *data.available()))
