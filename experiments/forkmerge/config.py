"""What can be set, and the presets."""

import dataclasses
import pathlib
from typing import Literal

from mtljax.data._digit_domains import DOMAINS

LABELS = {
    "stl": "target only (STL)",
    "ew": "EW",
    "gcs": "GCS",
    "ol_aux": "OL-AUX",
    "arml": "ARML",
    "auto_lambda": "Auto-λ",
    "post_train": "post-train",
    "lambda_grid": "grid search of λ",
    "forkmerge": "ForkMerge, B = 2",
    "forkmerge_each": "ForkMerge‡, target + each",
}
"""Rows of the table, in its order."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains every method for every target domain and compares them on the target."""

    data_dir: pathlib.Path | None = None
    """Folder with mnist/, usps/, mnist_m/, optdigits/ and semeion/."""
    domains: tuple[str, ...] = DOMAINS
    """Tasks. Each is the target of runs of its own, the others its auxiliaries."""
    methods: tuple[str, ...] = tuple(LABELS)
    """Rows of the table; stl always runs, as the reference."""
    seeds: int = 3
    """Runs of every method and target, all in one program."""
    first_seed: int = 0
    """Seeds are first_seed, first_seed + 1, ..."""

    train_size: int | None = 300
    """Training examples of a domain (few: auxiliaries can help); None is all."""
    val_size: int = 200
    """Validation examples of a domain; with --held-out a half is searched on."""
    test_size: int = 2000
    """Test examples of a domain, at most."""
    image_size: int = 16
    """Side of the images, in pixels."""
    held_out: bool = False
    """Keep a half of the validation set out of the search, to show its optimism."""

    model: Literal["mlp", "lenet", "resnet18"] = "mlp"
    """Trunk that the domains share; each has a linear head of its own."""
    hidden: tuple[int, ...] = (256, 128)
    """Widths of the MLP's trunk."""
    steps: int = 2000
    """Updates of every run (of every branch)."""
    interval: int = 500
    """Δt: steps between merges."""
    batch_size: int = 48
    """Examples per update, of one domain or of all together."""
    lr: float = 0.03
    """First learning rate of SGD with Nesterov momentum 0.9; it decays as a cosine."""
    weight_decay: float = 5e-4
    """Of all parameters."""
    share: bool = True
    """Auxiliary weights of a branch are divided by their number (released code)."""
    keep: int = 3
    """Branches of forkmerge_each after the first merge."""
    merge_source: Literal["last", "best_in_round", "best_ever"] = "last"
    """What is merged; see mtljax.forkmerge.ForkMerge."""
    lambdas: tuple[float, ...] = (0.0625, 0.25, 1.0, 4.0)
    """Auxiliary weights of the grid, which also shows transfer gain and discrepancy."""
    ol_aux_lr: float = 1e-4
    """β of OL-AUX."""
    arml_lr: float = 0.05
    """β of ARML."""
    auto_lambda_lr: float = 1e-3
    """β of Auto-λ."""
    auto_lambda_initial: float = 1.0
    """Its first weights. One, so that it starts as EW: the learning rate is shared; the
    released code starts at 0.1 with a learning rate of its own."""

    eval_every: int = 100
    """Steps between evaluations; validation picks the step that is reported."""
    strategy: Literal["auto", "vmap", "map"] = "auto"
    """How branches, targets and seeds run: in one batch or in turn."""
    out: pathlib.Path = pathlib.Path("results/forkmerge")
    """Rows, checkpoints, table and plots go here."""
    resume: bool = False
    """Go on where an interrupted run stopped; what is finished is not run again."""
    overwrite: bool = False
    """Delete an earlier run in --out first."""
    plots: bool = True
    """Write the PNGs."""
    quick_compile: bool = False
    """Compile without optimisation: starts sooner and runs slower."""


PRESETS = {
    "smoke": (
        "Some fifteen seconds, mostly compilation: three rows, a few steps.",
        Config(
            domains=("usps", "semeion"),
            methods=("stl", "ew", "forkmerge"),
            seeds=2,
            train_size=64,
            val_size=40,
            test_size=50,
            image_size=8,
            hidden=(16,),
            steps=12,
            interval=4,
            eval_every=4,
            batch_size=16,
            quick_compile=True,
            out=pathlib.Path("results/forkmerge-smoke"),
        ),
    ),
    "cpu": (
        "The default, below 25 minutes on 2 CPU cores: all rows, 5 targets, 3 seeds.",
        Config(),
    ),
    "paper": (
        "Hours on one GPU: a residual network, all examples, the paper's lengths.",
        Config(
            model="resnet18",
            image_size=32,
            train_size=None,
            val_size=200,
            test_size=7000,
            steps=50_000,
            interval=12_500,
            eval_every=2500,
            lr=0.01,
            strategy="vmap",
            out=pathlib.Path("results/forkmerge-paper"),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises on what only shows later, before anything is written.

    Raises:
      ConfigError: One sentence that names the field.
    """
    for field, known in (("domains", DOMAINS), ("methods", tuple(LABELS))):
        names = getattr(config, field)
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"--{field}: there is no {name!r}; there are {', '.join(known)}."
                )
        if len(set(names)) != len(names):
            raise ConfigError(f"--{field} names one twice: {', '.join(names)}.")
    if len(config.domains) < 2:
        raise ConfigError("--domains must name a target and an auxiliary at least.")
    for field in ("seeds", "steps", "interval", "batch_size", "eval_every", "keep"):
        if getattr(config, field) < 1:
            raise ConfigError(
                f"--{field.replace('_', '-')} must be positive, "
                f"not {getattr(config, field)}."
            )
    if config.interval % config.eval_every:
        raise ConfigError(
            f"--interval {config.interval} must be a multiple of --eval-every "
            f"{config.eval_every}."
        )
    if config.batch_size < len(config.domains):
        raise ConfigError(
            f"--batch-size {config.batch_size} is below the {len(config.domains)} "
            "domains that share a joint batch."
        )
    if not config.lambdas or min(config.lambdas) <= 0:
        raise ConfigError(f"--lambdas must be positive, not {config.lambdas}.")
    if config.resume and config.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other.")
