"""What can be set, the rows there are, and the presets."""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

SINGLE_TASK = "single_task"


class Row(NamedTuple):
    """A row of the table: how the tasks' gradients become steps.

    Either ``options`` of ``mtljax.alternating.alternate``, or a ``balancer`` of mtljax.
    ``rate`` multiplies the learning rate: "T" for the joint steps whose length matches
    that of T alternating ones.
    """

    label: str
    options: tuple[tuple[str, Any], ...] = ()
    balancer: str | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: Literal["1", "T"] = "1"


def _alternating(
    label: str, optimizer: Literal["adam", "sgd"] = "adam", **options: Any
):
    return Row(label, tuple(options.items()), optimizer=optimizer)


def _groups(number: int) -> dict[str, Row]:
    return {
        f"groups_{number}:{state}": _alternating(
            f"G = {number}, {state.replace('_', ' ')}", groups=number, state=state
        )
        for state in ("slot", "shared", "per_task")
    }


_MEAN: dict[str, Any] = {"groups": 1, "group_loss": "mean"}

ROWS: dict[str, Row] = {
    # Plain SGD: the second and third differ by the second-order term alone.
    "sgd:mean": _alternating("SGD, mean", "sgd", **_MEAN),
    "sgd:mean_T": Row("SGD, mean, lr x T", tuple(_MEAN.items()), None, "sgd", "T"),
    "sgd:alternating": _alternating("SGD, alternating", "sgd"),
    "mean": _alternating("mean", **_MEAN),
    "mean_T": Row("mean, lr x T", tuple(_MEAN.items()), rate="T"),
    "sum": _alternating("sum", groups=1),
    "alternating:shared": _alternating("alternating, shared state", state="shared"),
    "alternating": _alternating("alternating, per task"),
    "alternating:fixed": _alternating("alternating, fixed order", order="fixed"),
    "alternating:largest": _alternating(
        "alternating, largest loss first", order="largest_loss_first"
    ),
    "alternating:per_batch": _alternating(
        "alternating, task per batch", schedule="per_batch"
    ),
    **_groups(2),
    **_groups(4),
    "groups_4:never": _alternating(
        "G = 4, slot, fixed partition", groups=4, regroup_every="never"
    ),
    "adatask": _alternating("AdaTask", groups=1, state="per_task"),
    "uncertainty": Row("UW", balancer="uncertainty"),
    "random_loss_weighting": Row("RLW", balancer="random_loss_weighting"),
    "mgda": Row("MGDA", balancer="mgda"),
    "pcgrad": Row("PCGrad", balancer="pcgrad"),
    "cagrad": Row("CAGrad", balancer="cagrad"),
}


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Joint, alternating and grouped steps on tasks of different nature."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Rows of the table (ROWS in config.py), in its order; single-task comes first."""
    seeds: int = 3
    """Runs of every row, trained together by vmap."""
    first_seed: int = 0
    """Seeds are first_seed, first_seed + 1, ..."""

    tasks: Literal["classes", "modalities"] = "classes"
    """Every class of either digit a one-vs-rest task, with the ink: 21 tasks; or
    left, right and ink: 3 tasks."""
    ink_scale: float = 1.0
    """Factor of the regression's loss in training; 1 is its natural scale."""
    train_size: int = 6000
    """Training canvases."""
    eval_size: int = 2000
    """Validation and test canvases used, at most."""

    model: Literal["mlp", "lenet"] = "mlp"
    """Trunk that the tasks share; each has a linear head of its own."""
    hidden: tuple[int, ...] = (128, 64)
    """Widths of the MLP's trunk."""
    steps: int = 1200
    """Batches of every run."""
    batch_size: int = 64
    """Examples per batch."""
    lrs: tuple[float, ...] = (3e-4, 1e-3)
    """Learning rates of Adam; validation picks one for each row."""
    sgd_lrs: tuple[float, ...] = (3e-3, 1e-2)
    """The same for SGD."""

    eval_every: int = 50
    """Batches between evaluations (validation picks the one that is reported)."""
    log_every: int = 25
    """Batches between rows of training losses and measures of exploration."""
    probe_size: int = 256
    """Training examples on which cosines of the gradients are measured."""
    time_steps: int = 20
    """Steps of one timing round, of three; 0 leaves the timing out."""

    out: pathlib.Path = pathlib.Path("results/alternating")
    """Rows, checkpoints, table and plots go here."""
    resume: bool = False
    """Go on where an interrupted run stopped; what is finished is not run again."""
    overwrite: bool = False
    """Delete an earlier run in --out first."""
    tensorboard: bool = False
    """Write TensorBoard files as well (needs mtljax[tensorboard])."""
    plots: bool = True
    """Write the PNGs."""
    quick_compile: bool = False
    """Compile without optimisation: starts sooner and runs slower."""


PRESETS = {
    "smoke": (
        "A quarter of a minute, mostly compilation: two rows, a few batches.",
        Config(
            rows=("sum", "alternating"),
            seeds=2,
            tasks="modalities",
            train_size=512,
            eval_size=256,
            hidden=(16,),
            steps=8,
            lrs=(1e-3,),
            eval_every=4,
            log_every=2,
            probe_size=64,
            time_steps=0,
            plots=False,
            quick_compile=True,
            out=pathlib.Path("results/alternating-smoke"),
        ),
    ),
    "cpu": (
        "Meant to stay below 20 minutes on 2 CPU cores: 21 tasks, 3 seeds, an MLP.",
        Config(),
    ),
    "paper": (
        "For an accelerator: LeNet, 5 seeds, longer runs, a wider grid of rates.",
        Config(
            model="lenet",
            seeds=5,
            steps=20_000,
            batch_size=128,
            lrs=(1e-4, 3e-4, 1e-3, 3e-3),
            sgd_lrs=(1e-3, 3e-3, 1e-2, 3e-2),
            eval_every=250,
            log_every=100,
            out=pathlib.Path("results/alternating-paper"),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises on what only shows later, before anything is written.

    Raises:
      ConfigError: One sentence that names the field.
    """
    if not config.rows:
        raise ConfigError("--rows is empty; name at least one row.")
    for name in config.rows:
        if name not in ROWS:
            raise ConfigError(
                f"--rows: there is no row {name!r}; the rows are {', '.join(ROWS)}."
            )
        groups = dict(ROWS[name].options).get("groups", 1)
        if config.tasks == "modalities" and groups > 3:
            raise ConfigError(
                f"--rows {name} has {groups} groups, but --tasks modalities has 3."
            )
    for field in ("seeds", "steps", "batch_size", "eval_every", "log_every"):
        if getattr(config, field) < 1:
            raise ConfigError(
                f"--{field.replace('_', '-')} must be positive, "
                f"not {getattr(config, field)}."
            )
    for field in ("lrs", "sgd_lrs"):
        rates = getattr(config, field)
        if not rates or min(rates) <= 0:
            raise ConfigError(
                f"--{field.replace('_', '-')} must be positive numbers, not {rates}."
            )
    if not config.ink_scale > 0:
        raise ConfigError(f"--ink-scale must be positive, not {config.ink_scale}.")
    if config.resume and config.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
